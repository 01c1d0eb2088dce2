"""Resolution by direction: conical FSC and how unequal it is; viewing directions of a set of poses."""

import dataclasses

import numpy as np
import scipy.ndimage

from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, Resolution, correlation, friedel_mates, resolution, shell_index

HALF_ANGLE_DEG = 20.0
"""Half-angle of a cone, as 3DFSC (Tan et al., Nature Methods 14 (2017) 793) and cryoSPARC have it."""

DIRECTIONS = 100
"""Directions over half of the sphere; neighbours are some 14 degrees apart, so the cones cover it several times."""

FEWEST_VOXELS = 10
"""Voxels of a cone in a shell below which the shell's own FSC stands for it: the first shells are too coarse."""

ANISOTROPIC_BELOW = 0.5
"""An anisotropy below this is worth a warning: the value at which cryoSPARC flags its cFAR, a similar number."""


@dataclasses.dataclass(frozen=True, eq=False)
class DirectionalFsc:
    """FSC within double cones round directions.

    Attributes:
        directions: (N, 3) unit vectors (x, y, z) with z >= 0: a cone and the opposite one are the same.
        fsc: (N, box // 2 + 1).
        box, pixel_size_a: of the maps.
        half_angle_deg: of the cones.
    """

    directions: np.ndarray
    fsc: np.ndarray
    box: int
    pixel_size_a: float
    half_angle_deg: float

    def curve(self, number: int) -> FscCurve:
        """The curve of one direction, as it is."""
        return FscCurve(self.fsc[number], self.box, self.pixel_size_a)

    @property
    def resolutions(self) -> list[Resolution]:
        """Resolution at 0.143 in every direction, of the running mean over three shells.

        A molecule has little signal where its transform is near zero, which in a cone, other than in a whole shell, can
        make a dip of one or two shells that is no limit of the resolution.
        """
        smooth = scipy.ndimage.uniform_filter1d(self.fsc, 3, axis=1, mode="nearest")
        curves = [FscCurve(values, self.box, self.pixel_size_a) for values in smooth]
        return [resolution(curve, RESOLUTION_THRESHOLD_HALF_MAPS) for curve in curves]

    @property
    def areas(self) -> np.ndarray:
        """(N,) area under each curve, in shells: its sum from shell 1 to Nyquist; noise averages out."""
        return self.fsc[:, 1:].sum(axis=1)

    @property
    def worst(self) -> int:
        """Number of the direction with the smallest area."""
        return int(np.argmin(self.areas))

    @property
    def best(self) -> int:
        """Number of the direction with the largest area."""
        return int(np.argmax(self.areas))

    @property
    def anisotropy(self) -> float:
        """Smallest area over largest: 1 is alike in all directions, 0 is nothing in one; 0 if there is no signal."""
        areas = self.areas
        return max(0.0, float(areas.min() / areas.max())) if areas.max() > 0 else 0.0


def directions_on_half_sphere(number: int) -> np.ndarray:
    """Nearly even directions on the half sphere z >= 0, on a golden spiral: float64 (number, 3), (x, y, z)."""
    z = 1 - (np.arange(number) + 0.5) / number
    angle = np.pi * (3 - np.sqrt(5)) * np.arange(number)
    across = np.sqrt(1 - z**2)
    return np.stack([across * np.cos(angle), across * np.sin(angle), z], axis=1)


def directional_fsc(
    spectrum1: np.ndarray,
    spectrum2: np.ndarray,
    pixel_size_a: float,
    half_angle_deg: float = HALF_ANGLE_DEG,
    number: int = DIRECTIONS,
) -> DirectionalFsc:
    """FSC over the Fourier voxels of a shell within ``half_angle_deg`` of a direction or its opposite.

    Args:
        spectrum1, spectrum2: half-spectra (D, D, D // 2 + 1), as ``fsc.masked_spectrum`` gives them.
        pixel_size_a: A/px.
        half_angle_deg: of the cones.
        number: directions.
    """
    box = len(spectrum1)
    last = box // 2
    shells = shell_index(box)
    inside = (shells > 0) & (shells <= last)
    bins = shells[inside].astype(np.intp)
    full = np.fft.fftfreq(box, 1 / box).astype(np.float32)
    half = np.arange(last + 1, dtype=np.float32)
    x, y, z = (axis[inside] for axis in np.broadcast_arrays(half, full[:, None], full[:, None, None]))
    vectors = np.stack([x, y, z])
    vectors /= np.linalg.norm(vectors, axis=0)
    a, b = spectrum1[inside], spectrum2[inside]
    mates = np.broadcast_to(friedel_mates(box), shells.shape)[inside]
    products = (mates * (a.real * b.real + a.imag * b.imag), mates * np.abs(a) ** 2, mates * np.abs(b) ** 2)
    whole = correlation(np.stack([np.bincount(bins, product, last + 1) for product in products]))
    directions = directions_on_half_sphere(number)
    cosine = np.float32(np.cos(np.radians(half_angle_deg)))
    curves = np.zeros((number, last + 1))
    for curve, direction in zip(curves, directions.astype(np.float32), strict=True):
        cone = np.flatnonzero(np.abs(direction @ vectors) >= cosine)
        where = bins[cone]
        counts = np.bincount(where, mates[cone], last + 1)
        sums = np.stack([np.bincount(where, product[cone], last + 1) for product in products])
        curve[:] = np.where(counts >= FEWEST_VOXELS, correlation(sums), whole)
    curves[:, 0] = 1.0
    return DirectionalFsc(directions, curves, box, float(pixel_size_a), half_angle_deg)


def viewing_directions(rotations: np.ndarray) -> np.ndarray:
    """Where the particles were seen from: the image's z axis in the volume, R^T (0, 0, 1).

    Args:
        rotations: (N, 3, 3), ``x_image = R x_volume``.

    Returns:
        float64 (N, 3), unit vectors (x, y, z).

    Raises:
        InputError: another shape, or no rotation at all.
    """
    rotations = np.asarray(rotations, dtype=np.float64)
    if rotations.ndim != 3 or rotations.shape[1:] != (3, 3) or len(rotations) == 0:
        raise InputError(f"viewing directions: expected rotations (N, 3, 3), found shape {rotations.shape}")
    return rotations[:, 2, :]


SIDE_VIEWS_EVENNESS = 0.81
"""``view_evenness`` of nothing but side views, evenly spread: the value below which cryoSPARC flags its SCF*."""

_VIEWS_AT_MOST, _BAND = 20_000, 0.08


def view_evenness(rotations: np.ndarray, operators: np.ndarray | None = None, number: int = 300) -> float:
    """How evenly the views sample Fourier space: about the SCF of Baldwin & Lyumkin (Prog. Biophys. Mol. Biol. 150
    (2020) 160), the harmonic over the arithmetic mean of the sampling over directions.

    An image samples the directions across its view: here those within 4.6 degrees of its plane. A direction that no
    image samples counts as sampled by half an image. 1 is even, 0.81 side views alone, near 0 leaves a cone empty.

    Args:
        rotations: (N, 3, 3), ``x_image = R x_volume``; of more than 20,000, that many spread over all.
        operators: (K, 3, 3) of a point group, by each of which an image is also one of the molecule; None: none.
        number: directions.
    """
    views = viewing_directions(rotations)
    copies = 1 if operators is None else len(operators)
    views = views[:: -(-len(views) * copies // _VIEWS_AT_MOST)]
    if operators is not None:
        views = np.einsum("kij,nj->nki", operators, views).reshape(-1, 3)
    sampled = (np.abs(directions_on_half_sphere(number) @ views.T) < _BAND).sum(1)
    return float(1 / (np.mean(1 / np.maximum(sampled, 0.5)) * np.mean(np.maximum(sampled, 0.5))))
