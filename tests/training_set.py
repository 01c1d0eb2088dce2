"""A tiny simulated stack of a chiral molecule with known truth, and one run trained on it, each made once a session.

The molecule is a few round blobs along a right-handed spiral with one arm off it, so it equals neither its mirror
image nor itself under any rotation. Images come from ``cryosplat simulate``: Fourier slices, not the splat kernel.
"""

import contextlib
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import mrcfile
import numpy as np
import torch

from cryosplat import figures, train
from cryosplat.config import load_config
from cryosplat.dataset import ParticleDataset
from cryosplat.monitor import Monitor
from cryosplat.particles import read_particles
from cryosplat.settings import Config
from cryosplat.simulate import SimulateOptions, simulate
from cryosplat.volumes import write_map

BOX, PIXEL_SIZE_A, IMAGES, SNR = 32, 4.0, 301, 1.0
"""An odd number of particles, so that halves, shards and batches are all uneven."""

BLOB_SIGMA_A = 5.0

_TURN = np.radians(55) * np.arange(9)
BLOBS_A = np.concatenate(
    [
        np.stack([19 * np.cos(_TURN), 19 * np.sin(_TURN), -24 + 6 * np.arange(9)], 1),  # right-handed along +z
        [(0, 0, -10), (7, 2, -20), (29, -8, -22)],
    ]
)
"""Positions of the blobs, x, y, z in A from the origin, (12, 3)."""

SETTINGS = (
    "recipe=images",
    "model.gaussians=128",
    "model.spread=0.12",
    "model.scale=0.03",
    "model.scale_min=0.01",
    "train.epochs=3",
    "train.batch=16",
    "train.lr=0.02",
    "train.threads=1",
    "train.log_every=7",
    "maps.every=100",
)
"""What makes a run small that trains image by image; two seconds."""

VOLUME_SETTINGS = ("model.gaussians=200", "model.scale=0.03", "train.threads=1")
"""The same for one that fits in the volume, as the default recipe does."""


def true_map() -> np.ndarray:
    """The molecule on the grid (D, D, D) [z, y, x], its origin at voxel D//2."""
    z, y, x = (np.indices((BOX, BOX, BOX)) - BOX // 2) * PIXEL_SIZE_A
    squares = ((np.stack([x, y, z], -1)[..., None, :] - BLOBS_A) ** 2).sum(-1)
    return np.exp(-squares / (2 * BLOB_SIGMA_A**2)).sum(-1).astype(np.float32)


def training_set(tmp_path_factory) -> Path:
    """Folder of the stack: particles.mrcs, particles.star, poses.pkl, ctf.pkl, truth.mrc, mask.mrc. To be read only."""
    folder = tmp_path_factory.getbasetemp() / "training_set"
    if not folder.exists():
        source = tmp_path_factory.mktemp("molecule") / "molecule.mrc"
        write_map(source, true_map(), PIXEL_SIZE_A)
        simulate(SimulateOptions(out=str(folder), map=str(source), images=IMAGES, snr=SNR, seed=1))
    return folder


def settings(stack: Path, run_dir: Path, *others: str, of=SETTINGS) -> list[str]:
    """The words of a small run on a folder like that of ``training_set``; ``others`` come last, so they win."""
    return [
        f"data_root={stack}",
        "data.particles=particles.star",
        "data.poses=poses.pkl",
        "data.ctf=ctf.pkl",
        "data.truth=truth.mrc",
        f"run_dir={run_dir}",
        *of,
        *others,
    ]


def config(stack: Path, run_dir: Path, *others: str, of=SETTINGS) -> Config:
    return load_config(None, settings(stack, run_dir, *others, of=of))


def images(tmp_path_factory) -> ParticleDataset:
    """All particles, read and normalised."""
    stack = training_set(tmp_path_factory)
    of_run = config(stack, stack, of=VOLUME_SETTINGS)
    table = read_particles(of_run.data, of_run.data_root, 0, True)
    dataset = ParticleDataset(table, np.arange(len(table)))
    dataset.normalise(dataset.statistics.deviation)
    return dataset


@contextlib.contextmanager
def without_figures() -> Iterator[None]:
    """No figure is drawn inside, which would take longer than these trainings; all else is as ever."""
    drawing = [name for name in vars(figures) if name.endswith("_figure") or name == "save"]
    nothing = {name: lambda *_args, **_words: None for name in drawing}
    with mock.patch.multiple(figures, **nothing), mock.patch.object(Monitor, "evaluation"):
        yield


def trained(stack: Path, run_dir: Path, *others: str, of=SETTINGS) -> Path:
    """Train a small run to its end in this process, without figures; returns its directory."""
    threads = torch.get_num_threads()
    with without_figures():
        train.train(config(stack, run_dir, *others, of=of))
    torch.set_num_threads(threads)
    return run_dir


def fitted(stack: Path, run_dir: Path, *others: str) -> Path:
    """The same of a run that is fitted in the volume."""
    return trained(stack, run_dir, *others, of=VOLUME_SETTINGS)


def noise_in_half_b(stack: Path, folder: Path) -> Path:
    """A copy of a training set, every image of half b replaced by noise of another mean and strength."""

    def change(images):
        in_b = halves(stack) == 1
        images[in_b] = np.random.default_rng(0).normal(3, 5, images[in_b].shape)
        return images

    return altered(stack, folder, change)


def reference_run(tmp_path_factory) -> Path:
    """The run of the settings above, in one process and with figures; its directory, to be read only."""
    run_dir = tmp_path_factory.getbasetemp() / "reference_run"
    if not run_dir.exists():
        threads = torch.get_num_threads()
        train.train(config(training_set(tmp_path_factory), run_dir))
        torch.set_num_threads(threads)
    return run_dir


def altered(stack: Path, folder: Path, change) -> Path:
    """A copy of a training set whose images (N, D, D) went through ``change``."""
    shutil.copytree(stack, folder)
    with mrcfile.open(folder / "particles.mrcs", "r+") as handle:
        handle.set_data(change(np.array(handle.data)).astype(np.float32))
    return folder


def leaked(stack: Path, folder: Path, share=0.25, again=lambda images: 3 * images + 2) -> tuple[Path, int]:
    """A copy of a stack in which that share of half b are images of half a, with other grey levels (or what ``again``
    makes of them), and their poses; and how many they are."""
    images = len(halves(stack))
    of_a = np.arange(0, images, 2)[: int(share * images / 2)]
    rows = np.arange(images)
    rows[of_a + 1] = of_a

    def copy(pixels):
        pixels = pixels[rows]
        pixels[of_a + 1] = again(pixels[of_a + 1])
        return pixels

    altered(stack, folder, copy)
    rotations, shifts = pickle.loads((folder / "poses.pkl").read_bytes())
    (folder / "poses.pkl").write_bytes(pickle.dumps((rotations[rows], shifts[rows])))
    ctf = pickle.loads((folder / "ctf.pkl").read_bytes())
    (folder / "ctf.pkl").write_bytes(pickle.dumps(ctf[rows]))
    return folder, len(of_a)


def halves(stack: Path) -> np.ndarray:
    """Half of every particle, (N,) 0 or 1, as the star file has it: the simulator deals them in turn."""
    return np.arange(len(pickle.loads((stack / "poses.pkl").read_bytes())[0])) % 2


def last_checkpoint(run_dir: Path) -> dict:
    return torch.load(sorted((run_dir / "checkpoints").glob("step_*.pt"))[-1], weights_only=True)["state"]
