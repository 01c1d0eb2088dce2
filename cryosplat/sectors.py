"""Sums over shells of Fourier space, sector by sector, so that what is made of them has a jackknife error."""

from collections.abc import Callable

import numpy as np

from cryosplat.fsc import friedel_mates, shell_index
from cryosplat.symmetry import fold

BANDS, WEDGES = 4, 6
"""Sectors of equal area on the half-sphere x >= 0: bands round x times wedges. 24 give an error known to 15 %, and are
large enough against the few Fourier voxels over which a mask makes noise correlate."""

STRIPS, TABLE = 4, 512
"""Of maps with a symmetry: strips of an asymmetric unit, and wedges of the table of directions it is looked up in."""

SMOOTHING = 2
"""Shells on either side that are averaged. One shell of a map of 128 px at its limit of resolution has some thousand
independent numbers, too few to be divided by."""

UNSMOOTHED_FRACTION = 4
"""Shell k is averaged over k / 4 shells on either side at most: low shells differ from their neighbours and need no
averaging."""


class SectorSums:
    """Sums over the voxels of half-spectra (D, D, D//2+1) by shell 0 .. D//2 and sector: (D//2+1, 24).

    With a point group the copies of a voxel say all the same. A sector then is a part of the asymmetric unit with all
    its copies, so that sectors are as independent as they are taken to be.

    Args:
        box: D.
        symmetry: (K, 3, 3) operators of the point group of the maps; None: none.

    Attributes:
        shell: (D, D, D//2+1) shell of every voxel, D//2 in the corners.
        inside: (D, D, D//2+1) whether a voxel lies within the sphere of Nyquist, where images have told of it.
        voxels: (D//2+1, 24) numbers of voxels.
    """

    def __init__(self, box: int, symmetry: np.ndarray | None = None):
        self.box, self.shells = box, box // 2 + 1
        full = np.fft.fftfreq(box, 1 / box)
        half = np.fft.rfftfreq(box, 1 / box)
        index = shell_index(box)
        radius = np.maximum(np.sqrt(full[:, None, None] ** 2 + full[:, None] ** 2 + half**2), 1)
        bands, wedges = (BANDS, WEDGES) if symmetry is None else (TABLE // 4, TABLE)
        band = np.minimum((bands * half / radius).astype(np.int32), bands - 1)
        turn = (np.arctan2(full[:, None], full) / (2 * np.pi)) % 1.0
        wedge = np.minimum((wedges * turn).astype(np.int32), wedges - 1)[:, :, None]
        sector = band * WEDGES + wedge if symmetry is None else _of_units(symmetry)[band, wedge]
        sectors = self.sectors = BANDS * WEDGES if symmetry is None else STRIPS * parts(len(symmetry))
        self._place = np.where(index < self.shells, index * sectors + sector, self.shells * sectors)
        self._place = self._place.astype(np.int32)
        self.shell = np.minimum(index, self.shells - 1)
        self.inside = radius < box / 2
        self._mates = np.broadcast_to(friedel_mates(box), index.shape)
        self.voxels = self(np.ones(index.shape, np.float32))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Sums of real values (D, D, D//2+1), Friedel mates counted."""
        sectors, total = self.sectors, np.zeros(self.shells * self.sectors + 1)
        for place, plane, mates in zip(self._place, values, self._mates, strict=True):  # no large temporaries
            total += np.bincount(place.ravel(), (plane * mates).ravel(), len(total))
        return total[:-1].reshape(self.shells, sectors)

    def cross(self, spectrum1: np.ndarray, spectrum2: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Sums of Re F1 conj(F2), times weights (D, D, D//2+1) if there are any."""
        product = spectrum1.real * spectrum2.real
        product += spectrum1.imag * spectrum2.imag
        return self(product if weights is None else product * weights)


def parts(copies: int) -> int:
    """Into how many sectors a strip of an asymmetric unit is cut: as few voxels as it has must not be cut too small."""
    return int(np.clip(round(WEDGES * 4 / copies), 2, WEDGES))


def _of_units(symmetry: np.ndarray) -> np.ndarray:
    """Sectors (TABLE // 4, TABLE) by direction: bands round x, of equal area on the half-sphere x >= 0, by wedges.

    All copies of a direction and of its opposite are taken into one asymmetric unit, which is cut into strips and these
    into parts of equal areas.
    """
    along, turn = (np.arange(TABLE // 4) + 0.5) / (TABLE // 4), 2 * np.pi * (np.arange(TABLE) + 0.5) / TABLE
    across = np.sqrt(1 - along**2)[:, None]
    x = np.broadcast_to(along[:, None], (TABLE // 4, TABLE))
    directions = np.stack([x, across * np.cos(turn), across * np.sin(turn)], -1).reshape(-1, 3)
    unit = fold(directions, np.concatenate([symmetry, -symmetry]))
    along_unit = np.linalg.svd(unit - unit.mean(0), full_matrices=False)[2]
    first, second = unit @ along_unit[0], unit @ along_unit[1]
    sectors = np.empty(len(unit), np.int32)
    for strip, members in enumerate(np.array_split(np.argsort(first), STRIPS)):
        for part, its in enumerate(np.array_split(members[np.argsort(second[members])], parts(len(symmetry)))):
            sectors[its] = strip * parts(len(symmetry)) + part
    return sectors.reshape(TABLE // 4, TABLE)


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
