"""Fourier insertion again, written from csrc/insert.h alone: a loop over views, np.add.at, float64."""

import numpy as np


def insert_reference(
    values: np.ndarray,
    weights: np.ndarray,
    rotations: np.ndarray,
    shifts: np.ndarray,
    grid: np.ndarray,
    grids: int,
    padded: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What insertion adds to the accumulators.

    Args:
        values: (V, D, D/2+1) complex half-spectra, phases referring to the first pixel.
        weights: (V, D, D/2+1).
        rotations: (V, 3, 3) with x_image = R x_volume.
        shifts: (V, 2) in pixels.
        grid: (V,) which grid each view goes to.
        grids: K.
        padded: P, side of a grid in voxels, even.

    Returns:
        n complex, d, g real: (K, P, P, P/2+1) each, axes [grid, z, y, x].
    """
    values, weights, rotations, shifts = (
        np.asarray(values, np.complex128),
        *(np.asarray(array, np.float64) for array in (weights, rotations, shifts)),
    )
    box = values.shape[1]
    size = (grids, padded, padded, padded // 2 + 1)
    n, d, g = np.zeros(size, np.complex128), np.zeros(size), np.zeros(size)
    kx, ky = half_disc(box)
    for view in range(len(values)):
        turns = (kx * (box // 2 - shifts[view, 0]) + ky * (box // 2 - shifts[view, 1])) / box
        value = values[view, ky % box, kx] * np.exp(2j * np.pi * turns)
        weight = weights[view, ky % box, kx]
        points = padded / box * np.stack([kx, ky, np.zeros_like(kx)], axis=1) @ rotations[view]  # R^T k, a row each
        mates = points[:, 0] < 0
        points[mates] *= -1
        value[mates] = value[mates].conj()
        low = np.floor(points).astype(int)
        for corner in np.ndindex(2, 2, 2):
            at = low + corner
            t = np.clip(1 - np.abs(at - points), 0, None).prod(axis=1)
            place = (int(grid[view]), at[:, 2] % padded, at[:, 1] % padded, at[:, 0])
            np.add.at(n, place, t * value)
            np.add.at(d, place, t * weight)
            np.add.at(g, place, t * (weight != 0))
    return n, d, g


def half_disc(box: int) -> tuple[np.ndarray, np.ndarray]:
    """kx, ky of the coefficients that are inserted."""
    ky, kx = np.meshgrid(np.arange(-box // 2, box // 2), np.arange(box // 2 + 1), indexing="ij")
    inside = (kx**2 + ky**2 < (box / 2) ** 2) & ((kx > 0) | (ky >= 0))
    return kx[inside], ky[inside]
