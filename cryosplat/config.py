"""The typed configuration: defaults here, differences in YAML, ``key=value`` last."""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cryosplat.errors import InputError


@dataclass
class DataConfig:
    """Where the particles are and how they are read."""

    particles: str = ""  # .mrcs, .star, .cs or .txt
    poses: str = ""  # cryoDRGN's poses.pkl
    ctf: str | None = None  # cryoDRGN's ctf.pkl; none: images without CTF
    datadir: str | None = None  # folder of the stacks that a .star or .cs names
    indices: str | None = None  # subset of rows, .pkl or .npy of integers
    halves: str | None = None  # half set of every particle (0 or 1), .pkl or .npy; none: from the input or drawn
    first: int | None = None  # use only the first particles
    invert: bool = True  # cryoDRGN's default: true for particles white on dark
    check_sign: bool = True  # stop if the images are clearly of the other sign
    box: int | None = None  # px, even; images are Fourier-cropped to it
    pixel_size: float | None = None  # A/px of the stored images; only without a CTF
    truth: str | None = None  # map to compare with, simulations only
    mask: str | None = None  # soft mask for FSC, 0 to 1; none: no mask
    precision: str = "half"  # images in memory: half or single


@dataclass
class ModelConfig:
    """The Gaussian mixture and its random start (lengths in fractions of the box)."""

    gaussians: int = 2048
    amplitudes: str = "signed"  # signed, or positive (the paper's softplus)
    spread: float = 0.075  # standard deviation of the initial positions
    scale: float = 0.0075  # initial standard deviation of a Gaussian
    scale_min: float = 0.004
    scale_max: float = 0.05
    cutoff: float = 3.5  # standard deviations; relative L2 error of an image 2e-3


@dataclass
class TrainConfig:
    epochs: int = 5
    batch: int = 32  # images a step, over all ranks
    lr: float = 3e-3  # one rate for all parameters
    schedule: str = "cosine"  # cosine, exponential or constant
    lr_final: float = 0.01  # cosine: last rate as a fraction of the first
    lr_gamma: float = 0.1  # exponential: factor an epoch
    whiten: bool = False  # weigh frequencies by each half's noise spectrum
    seed: int = 0
    device: str = "auto"  # auto, cpu or cuda
    threads: int | None = None  # CPU threads a rank; none: cores / ranks on the host
    log_every: int = 20  # steps between looks at the losses


@dataclass
class MapsConfig:
    halves: bool = True  # train half a and half b beside the full model
    every: int = 1  # epochs between FSC evaluations; the last epoch always is one


@dataclass
class CheckpointConfig:
    every_minutes: float = 10.0
    keep: int = 2


@dataclass
class DistributedConfig:
    backend: str = "auto"  # auto, gloo or nccl
    timeout_minutes: float = 30.0


@dataclass
class Config:
    """Everything a run depends on. Paths that are not absolute are relative to ``data_root``."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    maps: MapsConfig = field(default_factory=MapsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    data_root: str = "."
    run_dir: str = "runs/run"
    resume: str = "auto"  # auto: go on where the run directory stands; never: refuse a used one
