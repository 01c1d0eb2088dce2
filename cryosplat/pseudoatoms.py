"""Gaussian mixtures as pseudo-atoms, for programs that show or fit atoms."""

import os
from collections.abc import Mapping

import numpy as np

from cryosplat.atoms import write_pseudo_atoms


def write_mixture_atoms(
    path: str | os.PathLike,
    mixture: Mapping[str, np.ndarray],
    box: int,
    pixel_size_a: float,
    overwrite: bool = False,
) -> None:
    """Write a mixture as pseudo-atoms that lie on the run's maps as they are.

    A Gaussian's covariance is the pseudo-atom's mean square displacement U, its B factor 8 pi^2 tr(U) / 3; occupancies
    are amplitudes over the largest magnitude of one, negative ones too.

    Args:
        path: .pdb or .cif.
        mixture: means (G, 3) and scales (G, 3) in A, quaternions (G, 4) wxyz, amplitudes (G,).
        box, pixel_size_a: of its maps, whose first voxel other programs put at 0, 0, 0.
        overwrite: replace a file that is there.

    Raises:
        InputError: too much for the columns of a PDB file, or the file cannot be written.
    """
    positions = np.asarray(mixture["means"], np.float64) + box // 2 * pixel_size_a
    amplitudes = np.asarray(mixture["amplitudes"], np.float64)
    occupancies = amplitudes / (np.abs(amplitudes).max() or 1.0)
    write_pseudo_atoms(path, positions, covariances(mixture), occupancies, box * pixel_size_a, overwrite)


def covariances(mixture: Mapping[str, np.ndarray]) -> np.ndarray:
    """R diag(s^2) R^T (G, 3, 3) of a mixture, A^2."""
    w, x, y, z = np.asarray(mixture["quaternions"], np.float64).T / np.linalg.norm(mixture["quaternions"], axis=1)
    rotations = np.empty((len(w), 3, 3))
    rotations[:, 0] = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], 1)
    rotations[:, 1] = np.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], 1)
    rotations[:, 2] = np.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], 1)
    squares = np.asarray(mixture["scales"], np.float64)[:, None, :] ** 2
    return (rotations * squares) @ rotations.transpose(0, 2, 1)
