"""Sums over shells of Fourier space, sector by sector, so that what is made of them has a jackknife error."""

from collections.abc import Callable

import numpy as np

from cryosplat.fsc import friedel_mates, shell_index

BANDS, WEDGES = 4, 6
"""Sectors of equal area on the half-sphere x >= 0: bands round x times wedges. 24 give an error known to 15 %, and are
large enough against the few Fourier voxels over which a mask makes noise correlate."""

SMOOTHING = 2
"""Shells on either side that are averaged. One shell of a map of 128 px at its limit of resolution has some thousand
independent numbers, too few to be divided by."""

UNSMOOTHED_FRACTION = 4
"""Shell k is averaged over k / 4 shells on either side at most: low shells differ from their neighbours and need no
averaging."""


class SectorSums:
    """Sums over the voxels of half-spectra (D, D, D//2+1) by shell 0 .. D//2 and sector: (D//2+1, 24).

    Args:
        box: D.

    Attributes:
        shell: (D, D, D//2+1) shell of every voxel, D//2 in the corners.
        inside: (D, D, D//2+1) whether a voxel lies within the sphere of Nyquist, where images have told of it.
        voxels: (D//2+1, 24) numbers of voxels.
    """

    def __init__(self, box: int):
        self.box, self.shells = box, box // 2 + 1
        full = np.fft.fftfreq(box, 1 / box)
        half = np.fft.rfftfreq(box, 1 / box)
        index = shell_index(box)
        radius = np.maximum(np.sqrt(full[:, None, None] ** 2 + full[:, None] ** 2 + half**2), 1)
        band = np.minimum((BANDS * half / radius).astype(np.int32), BANDS - 1)
        turn = (np.arctan2(full[:, None], full) / (2 * np.pi)) % 1.0
        wedge = np.minimum((WEDGES * turn).astype(np.int32), WEDGES - 1)[:, :, None]
        sectors = BANDS * WEDGES
        self._place = np.where(index < self.shells, index * sectors + band * WEDGES + wedge, self.shells * sectors)
        self._place = self._place.astype(np.int32)
        self.shell = np.minimum(index, self.shells - 1)
        self.inside = radius < box / 2
        self._mates = np.broadcast_to(friedel_mates(box), index.shape)
        self.voxels = self(np.ones(index.shape, np.float32))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Sums of real values (D, D, D//2+1), Friedel mates counted."""
        sectors, total = BANDS * WEDGES, np.zeros(self.shells * BANDS * WEDGES + 1)
        for place, plane, mates in zip(self._place, values, self._mates, strict=True):  # no large temporaries
            total += np.bincount(place.ravel(), (plane * mates).ravel(), len(total))
        return total[:-1].reshape(self.shells, sectors)

    def cross(self, spectrum1: np.ndarray, spectrum2: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Sums of Re F1 conj(F2), times weights (D, D, D//2+1) if there are any."""
        product = spectrum1.real * spectrum2.real
        product += spectrum1.imag * spectrum2.imag
        return self(product if weights is None else product * weights)


def smooth(curve: np.ndarray, reach: np.ndarray | int = SMOOTHING) -> np.ndarray:
    """Mean (S, ...) of a curve over neighbouring shells, over fewer at the ends; shell 0 is left as it is.

    ``reach``: shells on either side, one number or one for every shell.
    """
    reach = np.broadcast_to(reach, len(curve))
    smoothed = np.array(curve, dtype=np.float64)
    for shell in range(1, len(curve)):
        sides = min(int(reach[shell]), shell // UNSMOOTHED_FRACTION, len(curve) - 1 - shell)
        smoothed[shell] = np.mean(curve[shell - sides : shell + sides + 1], axis=0)
    return smoothed


def jackknife(statistic: Callable[..., np.ndarray], *sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of sums over sectors, and its standard error by leaving out one sector at a time (Tukey).

    Args:
        statistic: of as many arrays (S,) as there are sums, gives (S,).
        sums: (S, sectors) each.

    >>> sums = np.array([[1.0, 2.0, 3.0]])
    >>> [round(float(x[0]), 3) for x in jackknife(lambda s: s / 3, sums)]
    [2.0, 0.577]
    """
    whole = [part.sum(1) for part in sums]
    value = statistic(*whole)
    sectors = sums[0].shape[1]
    # Scaled to the whole: what is left out is as much as what is there.
    factor = sectors / (sectors - 1)
    without = np.stack(
        [
            statistic(*(factor * (total - part[:, j]) for total, part in zip(whole, sums, strict=True)))
            for j in range(sectors)
        ]
    )
    spread = without - without.mean(0)
    return value, np.sqrt((sectors - 1) / sectors * (spread**2).sum(0))
