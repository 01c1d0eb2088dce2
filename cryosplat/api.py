"""What programs may use: ``import cryosplat`` has these names. Arrays are NumPy's, lengths are in A."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosplat import fsc as _fsc
from cryosplat import ops
from cryosplat.config import check_files, load_config
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, Resolution, resolution
from cryosplat.gaussianfiles import export_mixture
from cryosplat.gaussians import VOXEL_CUTOFF, mixture_to_map
from cryosplat.outputs import read_mixture
from cryosplat.particles import ParticleTable, read_particles
from cryosplat.records import Record, read_record
from cryosplat.settings import Config
from cryosplat.train import train
from cryosplat.volumes import read_map, write_map

__all__ = [
    "FscCurve",
    "InputError",
    "Mixture",
    "ParticleTable",
    "Resolution",
    "Run",
    "fsc_curve",
    "load_mixture",
    "load_particles",
    "load_run",
    "project",
    "read_map",
    "reconstruct",
    "resolution",
    "voxelise",
    "write_map",
]


@dataclass(frozen=True, eq=False)
class Mixture:
    """G Gaussians, each an integral ``amplitude`` times a normal density.

    Attributes:
        means: (G, 3) x, y, z in A from the origin, which is voxel ``box // 2`` of a map.
        scales: (G, 3) standard deviations in A along the columns of the rotation.
        quaternions: (G, 4) that rotation, w, x, y, z.
        amplitudes: (G,) integrals, image units times A^2, of either sign.
        box, pixel_size_a: the grid it was made for, px and A/px.

    >>> import numpy as np
    >>> ball = Mixture(np.zeros((1, 3)), np.full((1, 3), 4.0), np.array([[1.0, 0, 0, 0]]), np.array([100.0]), 32, 2.0)
    >>> len(ball)
    1
    """

    means: np.ndarray
    scales: np.ndarray
    quaternions: np.ndarray
    amplitudes: np.ndarray
    box: int
    pixel_size_a: float

    def __len__(self) -> int:
        return len(self.amplitudes)

    def export(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write it in the format of the suffix: .npz, .ply, or pseudo-atoms in .pdb or .cif.

        Raises:
            InputError: another suffix, a file that exists, or too much for the columns of a PDB file.
        """
        export_mixture(path, vars(self), overwrite)

    def _tensors(self) -> dict[str, torch.Tensor]:
        names = ("means", "scales", "quaternions", "amplitudes")
        return {name: torch.as_tensor(np.asarray(getattr(self, name)), dtype=torch.float32) for name in names}


def load_mixture(path: str | os.PathLike, model: str = "full") -> Mixture:
    """Read the Gaussians of a run.

    Args:
        path: a run directory, or its gaussians.npz or gaussians.ply.
        model: "full", "half_a" or "half_b"; a .ply holds "full" alone.

    Raises:
        InputError: no such file, no mixture in it, or one that does not say its grid.
    """
    file = Path(path) / "gaussians.npz" if Path(path).is_dir() else Path(path)
    found = read_mixture(file, model)
    if found["box"] is None or found["pixel_size_a"] is None:
        raise InputError(f"{file}: the file does not say its box and A/px; expected one that a run wrote")
    return Mixture(**found)


def voxelise(mixture: Mixture, box: int | None = None, pixel_size_a: float | None = None) -> np.ndarray:
    """The map of a mixture.

    Args:
        mixture: the Gaussians.
        box: voxels a side; None: the mixture's own.
        pixel_size_a: A/px; None: the mixture's own.

    Returns:
        float32 (D, D, D), [z, y, x], its origin at voxel D // 2, in image units a voxel of depth: summed along a view
        it is the projection.

    >>> import numpy as np
    >>> ball = Mixture(np.zeros((1, 3)), np.full((1, 3), 4.0), np.array([[1.0, 0, 0, 0]]), np.array([100.0]), 32, 2.0)
    >>> volume = voxelise(ball)
    >>> volume.shape, [int(i) for i in np.unravel_index(volume.argmax(), volume.shape)]
    ((32, 32, 32), [16, 16, 16])
    >>> round(float(volume.sum()), 3)  # amplitude over the area of a pixel: 100 / 2**2
    25.0
    """
    return mixture_to_map(mixture._tensors(), box or mixture.box, pixel_size_a or mixture.pixel_size_a).numpy()


def project(
    mixture: Mixture,
    rotations: np.ndarray,
    shifts_a: np.ndarray | None = None,
    box: int | None = None,
    pixel_size_a: float | None = None,
) -> np.ndarray:
    """Images of a mixture, without CTF and noise.

    Args:
        mixture: the Gaussians.
        rotations: (V, 3, 3) or (3, 3), with x_image = R x_volume.
        shifts_a: (V, 2) in A; the origin is then seen at ``box // 2 - shift``, as in RELION's files. None: no shift.
        box: pixels a side; None: the mixture's own.
        pixel_size_a: A/px; None: the mixture's own.

    Returns:
        float32 (V, D, D), [y, x].

    Raises:
        InputError: arrays of another shape.

    >>> import numpy as np
    >>> ball = Mixture(np.zeros((1, 3)), np.full((1, 3), 4.0), np.array([[1.0, 0, 0, 0]]), np.array([100.0]), 32, 2.0)
    >>> images = project(ball, np.eye(3), shifts_a=np.array([[6.0, 0.0]]))
    >>> images.shape, [int(i) for i in np.unravel_index(images[0].argmax(), (32, 32))]
    ((1, 32, 32), [16, 13])
    """
    box, pixel_size_a = box or mixture.box, pixel_size_a or mixture.pixel_size_a
    rotations = np.asarray(rotations)[None] if np.ndim(rotations) == 2 else np.asarray(rotations)
    shifts = np.zeros((len(rotations), 2)) if shifts_a is None else np.atleast_2d(shifts_a)
    if rotations.shape[1:] != (3, 3) or shifts.shape != (len(rotations), 2):
        raise InputError(f"expected rotations (V, 3, 3) and shifts (V, 2), found {rotations.shape} and {shifts.shape}")
    tensors = mixture._tensors()
    covariances = ops.covariances(tensors["quaternions"], tensors["scales"] / pixel_size_a)
    poses = [torch.as_tensor(values, dtype=torch.float32) for values in (rotations, shifts / pixel_size_a)]
    gaussians = (tensors["means"] / pixel_size_a, covariances, tensors["amplitudes"] / pixel_size_a**2)
    model = torch.zeros(len(rotations), dtype=torch.int64)
    return ops.splat(*(each[None] for each in gaussians), *poses, model, box, VOXEL_CUTOFF).numpy()


def load_particles(particles: str | os.PathLike, **data: Any) -> ParticleTable:
    """Read and check everything about particles but their pixels, which ``read(ids)`` of the result reads.

    Args:
        particles: .star, .cs or .txt, as ``data.particles``.
        data: other settings of the section ``data``, such as ``poses="poses.pkl"`` and ``first=1000``.

    Raises:
        InputError: anything wrong with the files, with the fix.
    """
    config = _config(None, {f"data.{name}": value for name, value in {"particles": particles, **data}.items()})
    check_files(config)
    return read_particles(config.data, config.data_root, config.train.seed, half_maps=False)


def fsc_curve(one: np.ndarray, other: np.ndarray, pixel_size_a: float, mask: np.ndarray | None = None) -> FscCurve:
    """Fourier shell correlation of two maps (D, D, D) on one grid, under a mask that both are multiplied with.

    Raises:
        InputError: maps of other shapes, or not of finite numbers.

    >>> import numpy as np
    >>> noise = np.random.default_rng(0).normal(size=(2, 16, 16, 16))
    >>> curve = fsc_curve(noise[0], noise[0] + 0.1 * noise[1], pixel_size_a=2.0)
    >>> print(resolution(curve, 0.143))
    4.00 A (Nyquist)
    """
    return _fsc.fsc(one, other, pixel_size_a, mask)


@dataclass(frozen=True, eq=False)
class Run:
    """A complete run on disk.

    Attributes:
        folder: the run directory.
        record: its numbers and curves.
    """

    folder: Path
    record: Record

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json says (docs/formats.md); "resolution_a" is that of the delivered map."""
        return self.record.summary

    @property
    def curves(self) -> dict[str, FscCurve]:
        """FSC curves by column of fsc.csv; empty of a run with neither half maps nor a truth."""
        return self.record.curves

    def map(self, name: str = "map") -> tuple[np.ndarray, float]:
        """A map (D, D, D) [z, y, x] by its file's name without suffix, and its A/px."""
        return read_map(self.folder / f"{name}.mrc")

    def mixture(self, model: str = "full") -> Mixture:
        """Its Gaussians, see ``load_mixture``."""
        return load_mixture(self.folder, model)


def load_run(folder: str | os.PathLike) -> Run:
    """A complete run.

    Raises:
        InputError: it is not complete, or not one.
    """
    return Run(Path(folder), read_record(Path(folder), curves_needed=False))


def reconstruct(settings: Mapping[str, Any], config: str | os.PathLike | None = None) -> Run:
    """Reconstruct a particle stack, as ``cryosplat train`` does; a run that is there goes on, or is complete already.

    Under torchrun or Slurm every process calls it.

    Args:
        settings: by full key (docs/formats.md), such as ``{"data.particles": "particles.star", "run_dir": "runs/my"}``.
        config: YAML file of others, which ``settings`` override.

    Raises:
        InputError: anything wrong with input or settings, with the fix.
    """
    return load_run(train(_config(config, settings))["run_dir"])


def _config(path: str | os.PathLike | None, settings: Mapping[str, Any]) -> Config:
    words = {None: "null", True: "true", False: "false"}
    said = [
        f"{key}={words[value] if value is None or isinstance(value, bool) else value}"
        for key, value in settings.items()
    ]
    return load_config(path, said)
