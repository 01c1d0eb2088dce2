"""What can be set: every setting with its default and what it may be, and the recipes; ``config`` reads them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryosplat.pointgroups import KNOWN as KNOWN_GROUPS
from cryosplat.pointgroups import canonical


@dataclass
class DataConfig:
    """Where the particles are and how they are read."""

    particles: str = ""  # .mrcs, .star, .cs or .txt
    passthrough: str | None = None  # further .cs files with columns of the same particles, separated by commas
    poses: str | None = None  # cryoDRGN's poses.pkl; none: those of the .star or .cs file
    ctf: str | None = None  # cryoDRGN's ctf.pkl, or NO_CTF; none: that of the .star or .cs file, if it has one
    datadir: str | None = None  # folder of the stacks that a .star or .cs names
    prefix: str | None = None  # old=new: how names of stacks begin, and are to begin; several separated by commas
    indices: str | None = None  # subset of rows, .pkl or .npy of integers
    halves: str | None = None  # half set of every particle (0 or 1), .pkl or .npy; none: from the input or drawn
    first: int | None = None  # use only the first particles
    invert: bool | None = None  # true for particles white on dark; none: as a .cs file says, else true as in cryoDRGN
    check_sign: bool = True  # stop if the images are clearly of the other sign
    check_signal: bool = True  # stop after the first pass if the linear half maps agree on nothing
    box: int | None = None  # px, even; images are Fourier-cropped to it
    pixel_size: float | None = None  # A/px of the stored images; only without a CTF
    truth: str | None = None  # map to compare with, simulations only
    mask: str | None = None  # soft mask for FSC, 0 to 1; none: made from the linear half maps
    precision: str = "half"  # images in memory: half or single
    cache: str = "auto"  # where they are held: auto, device (a GPU's own memory), host or disk
    holdout: float = 0.0  # fraction of the images that nothing is trained on, to watch overfitting with
    null: str = "none"  # null test: phases (random beyond null_shell_a) or noise (no particle at all)
    null_shell_a: float | None = None  # A; null=phases: resolution from which on phases are random
    null_seed: int = 0  # of the random phases or noise


@dataclass
class CacheConfig:
    """The cache of prepared images on the node's disk (data.cache=disk)."""

    dir: str | None = None  # folder on a disk of the node; none: what SLURM_TMPDIR, TMPDIR or XDG_CACHE_HOME offer
    max_gb: float | None = None  # GiB that all sets in it may take; none: as much as the disk has, but for a twentieth


@dataclass
class ModelConfig:
    """The Gaussian mixtures and their start (lengths in fractions of the box)."""

    gaussians: int | None = None  # none: from each model's own volume and resolution (start=map only)
    start: str = "map"  # map: drawn from the density of its linear map; random: at random round the centre
    amplitudes: str = "signed"  # signed, or positive (the paper's softplus)
    spread: float = 0.075  # standard deviation of the initial positions (start=random only)
    scale: float = 0.0075  # initial standard deviation of a Gaussian (start=random only)
    scale_min: float = 0.004
    scale_max: float = 0.05
    cutoff: float = 3.5  # standard deviations drawn in images; relative L2 error of an image 2e-3
    symmetry: str = "C1"  # point group of the particle, in RELION's axes; C1: none


@dataclass
class VolumeConfig:
    """The fit in the volume, to the likelihood of all images at once, before any image by itself."""

    steps: int = 120  # 0: none
    step_px: float = 0.06  # first step of a position, px
    prior: float = 0.5  # nats; how firmly amplitudes are held to the mean one where images do not tell


@dataclass
class TrainConfig:
    """Training image by image, after the fit in the volume or instead of it; seed, device and threads of all."""

    epochs: int = 0  # passes over the images, image by image; none are needed after a fit in the volume
    batch: int = 64  # images a step, over all ranks
    micro_batch: int | None = None  # images of a rank at a time, gradients added up; none: as many as memory takes
    lr: float = 1e-4  # one rate for all parameters
    schedule: str = "cosine"  # cosine, exponential or constant
    lr_final: float = 0.01  # cosine: last rate as a fraction of the first
    lr_gamma: float = 0.1  # exponential: factor an epoch
    whiten: bool = False  # weigh frequencies by each half's noise spectrum
    seed: int = 0
    device: str = "auto"  # auto, cpu or cuda
    threads: int | None = None  # CPU threads a rank; none: cores / ranks on the host
    log_every: int = 20  # steps between looks at the losses
    cuda_graph: str = "auto"  # auto: on one GPU the step is recorded and replayed; off: never


@dataclass
class MapsConfig:
    halves: bool = True  # train half a and half b beside the full model
    every: int = 1  # epochs between FSC evaluations; the last epoch always is one
    particles: bool = True  # measure every particle against the other half's model at the end


@dataclass
class CheckpointConfig:
    every_minutes: float = 10.0
    keep: int = 2


@dataclass
class DistributedConfig:
    backend: str = "auto"  # auto, gloo or nccl
    timeout_minutes: float = 30.0
    share_gpus: bool = False  # let several ranks compute on one GPU


@dataclass
class Config:
    """Everything a run depends on.

    Inputs whose paths are not absolute are relative to ``data_root``; ``data_root`` and ``run_dir`` themselves to the
    current folder.
    """

    recipe: str = "default"  # what the defaults below are: default, random, images or paper
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    volume: VolumeConfig = field(default_factory=VolumeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    maps: MapsConfig = field(default_factory=MapsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    data_root: str = "."  # folder that the paths under data start from
    run_dir: str = "runs/run"  # everything the run writes
    resume: str = "auto"  # auto: go on where the run directory stands; never: refuse a used one


RECIPES: dict[str, dict[str, Any]] = {
    # Drawn from each half's own linear map and fitted in the volume.
    "default": {},
    # No map to start from: Gaussians anywhere round the centre, fitted in the volume.
    "random": {
        "model.start": "random",
        "model.gaussians": 16384,
        "model.spread": 0.11,
        "model.scale": 0.016,
        "volume.steps": 200,
        "volume.step_px": 0.6,
    },
    # From random Gaussians image by image, as the paper does it, with the settings that did best.
    "images": {
        "model.start": "random",
        "model.gaussians": 8192,
        "model.amplitudes": "positive",
        "volume.steps": 0,
        "train.epochs": 5,
        "train.batch": 32,
        "train.lr": 1e-2,
    },
    # The settings of the CryoSplat paper.
    "paper": {
        "model.start": "random",
        "model.gaussians": 30000,
        "model.amplitudes": "positive",
        "volume.steps": 0,
        "train.epochs": 5,
        "train.batch": 1,
        "train.lr": 1e-3,
        "train.schedule": "exponential",
        "train.lr_gamma": 0.1,
    },
}
"""Defaults by ``recipe``, where they differ from those of the classes above. What is set explicitly comes on top."""

CHOICES = {
    "recipe": tuple(RECIPES),
    "data.precision": ("half", "single"),
    "data.cache": ("auto", "device", "host", "disk"),
    "data.null": ("none", "phases", "noise"),
    "model.amplitudes": ("signed", "positive"),
    "model.start": ("map", "random"),
    "train.schedule": ("cosine", "exponential", "constant"),
    "train.device": ("auto", "cpu", "cuda"),
    "train.cuda_graph": ("auto", "off"),
    "distributed.backend": ("auto", "gloo", "nccl"),
    "resume": ("auto", "never"),
}

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data.first": (lambda value: value >= 1, "at least 1 particle"),
    "data.box": (lambda value: value >= 8 and value % 2 == 0, "an even number of pixels, at least 8"),
    "data.pixel_size": (lambda value: value > 0, "more than 0 A/px"),
    "data.holdout": (lambda value: 0 <= value <= 0.5, "a fraction of the images from 0 to 0.5"),
    "data.null_shell_a": (lambda value: value > 0, "a resolution above 0 A"),
    "data.null_seed": (lambda value: 0 <= value < 2**32, "0 to 4294967295"),
    "cache.max_gb": (lambda value: value > 0, "more than 0 GiB"),
    "model.gaussians": (lambda value: value >= 1, "at least 1"),
    "model.spread": (lambda value: 0 < value <= 0.5, "a fraction of the box above 0 and at most 0.5"),
    "model.scale_min": (lambda value: value > 0, "a fraction of the box above 0"),
    "model.scale_max": (lambda value: value <= 0.5, "a fraction of the box, at most 0.5"),
    "model.symmetry": (lambda value: canonical(value) is not None, KNOWN_GROUPS),
    "model.cutoff": (lambda value: 2 <= value <= 8, "2 to 8 standard deviations"),
    "train.epochs": (lambda value: value >= 0, "0 or more"),
    "volume.steps": (lambda value: value >= 0, "0 or more"),
    "volume.step_px": (lambda value: value > 0, "more than 0 px"),
    "volume.prior": (lambda value: value >= 0, "0 or more nats"),
    "train.batch": (lambda value: value >= 1, "at least 1 image"),
    "train.micro_batch": (lambda value: value >= 1, "at least 1 image"),
    "train.lr": (lambda value: value > 0, "more than 0"),
    "train.lr_final": (lambda value: 0 <= value <= 1, "a fraction of train.lr, 0 to 1"),
    "train.lr_gamma": (lambda value: 0 < value <= 1, "a factor above 0 and at most 1"),
    "train.seed": (lambda value: 0 <= value < 2**32, "0 to 4294967295"),
    "train.threads": (lambda value: value >= 1, "at least 1"),
    "train.log_every": (lambda value: value >= 1, "at least 1 step"),
    "maps.every": (lambda value: value >= 1, "at least 1 epoch"),
    "checkpoint.every_minutes": (lambda value: value > 0, "more than 0 minutes"),
    "checkpoint.keep": (lambda value: value >= 1, "at least 1"),
    "distributed.timeout_minutes": (lambda value: value > 0, "more than 0 minutes"),
}
"""Key: (whether a value is allowed, in words). A setting that is null is not checked."""

NO_CTF = "none"
"""``data.ctf`` of images without a CTF whose file has one."""

INPUTS = ("particles", "passthrough", "poses", "ctf", "datadir", "indices", "halves", "truth", "mask")
"""The settings under ``data`` that are paths."""

LISTS = ("data.passthrough", "data.prefix")
"""Settings that may be several words, separated by commas or, in YAML, a list."""

WITH_POSES = (".star", ".cs")
"""Extensions of tables that may have poses of their own."""
