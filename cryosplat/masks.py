"""Soft masks: a sphere, one round the density of a map however noisy it is, and what a mask must not be."""

import logging
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import scipy.fft
import scipy.ndimage

from cryosplat.conventions import centre
from cryosplat.errors import InputError

logger = logging.getLogger(__name__)

RANGE_SLACK = 1e-4
"""How far a mask may leave 0 to 1: resampled masks overshoot a little."""

MINIMUM_FRACTION = 1e-3
"""Fraction of the box a mask must keep; with less, the FSC says what the mask's shape is and no more."""

NEARLY_FULL_FRACTION = 0.7
"""Above this fraction of the box a mask hardly masks: a sphere that touches the box keeps 0.52."""

LOW_PASS_A = 15.0
LOW_PASS_PX = 4.0
"""What the map is smoothed to before it is thresholded: the larger of the two. Molecules keep their outline at 15 A."""

NOISE_LEVELS = 3.5
"""Standard deviations of the smoothed background above which a voxel is density: a box of 128 px at 2.2 A has some
7000 independent places when smoothed to 15 A, of which a normal background then passes 2, as specks."""

SEED_LEVELS = 6.0
"""Standard deviations that the brightest voxels must reach, or there is no molecule to be seen."""

DENSITY_FRACTION = 0.12
"""Fraction of the molecule's own level (the median of what is above half the highest) that is density, noise aside."""

CLEAR_FRACTION = 0.3
SMOOTHER = 1.25
LARGEST_LOW_PASS_A = 48.0
"""While the noise puts the threshold above this fraction of the molecule's level, which would cut into its weaker
parts, the map is smoothed by this factor more, up to this."""

RING = (0.85, 1.0)
"""Where background is looked for inside the inscribed sphere, in units of its radius."""

BLANK = 0.3
"""Corners with less than this fraction of the ring's noise have been set to zero; smoothing carries some back in."""

SPECK_FRACTION = 0.02
"""Parts smaller than this fraction of the largest are noise."""


class Margin(NamedTuple):
    """How far a mask reaches beyond the thresholded density: fully, and then with a cosine edge, both in A."""

    dilation_a: float
    edge_a: float


MARGINS = {"tight": Margin(4.0, 10.0), "loose": Margin(12.0, 16.0)}
"""Margins by kind of mask. An edge is never narrower than 4 px, so that it makes no ripples in Fourier space."""

EDGE_PX = 4.0


def radii(box: int) -> np.ndarray:
    """Distance of every voxel from the origin, voxel box // 2: float32 (box, box, box), px."""
    squares = (np.arange(box, dtype=np.float32) - centre(box)) ** 2
    return np.sqrt(squares[:, None, None] + squares[:, None] + squares)


def cosine_edge(distance: np.ndarray, width: float) -> np.ndarray:
    """1 up to a distance of 0, then half a cosine down to 0 at ``width``: float32 of the same shape.

    >>> cosine_edge(np.array([-1.0, 0.0, 2.0, 4.0, 9.0]), 4.0)
    array([1. , 1. , 0.5, 0. , 0. ], dtype=float32)
    """
    falling = np.clip(distance / width, 0, 1) if width > 0 else (distance > 0).astype(float)
    return (0.5 + 0.5 * np.cos(np.pi * falling)).astype(np.float32)


def spherical_mask(box: int, radius_px: float | None = None, edge_px: float | None = None) -> np.ndarray:
    """A ball about the origin with a cosine edge outside its radius.

    Args:
        box: voxels a side.
        radius_px: where the mask begins to fall; None: so that the edge ends at the box's faces.
        edge_px: width of the edge; None: a tenth of the box, at least 4 px, at most a quarter of the box.

    Returns:
        float32 (box, box, box), 0 to 1.

    Raises:
        InputError: a radius or edge that is not positive.
    """
    edge_px = min(max(EDGE_PX, 0.1 * box), 0.25 * box) if edge_px is None else edge_px
    radius_px = box / 2 - edge_px if radius_px is None else radius_px
    if radius_px <= 0 or edge_px < 0:
        raise InputError(f"a spherical mask of radius {radius_px:g} px and edge {edge_px:g} px: both must be positive")
    return cosine_edge(radii(box) - radius_px, edge_px)


def mask_from_map(
    volume: np.ndarray, pixel_size_a: float, kind: Literal["tight", "loose"] = "tight", low_pass_a: float | None = None
) -> np.ndarray:
    """A soft mask round the molecule of a map, made for noisy linear reconstructions as well as for clean maps.

    The map is smoothed (Gaussian, half amplitude at the larger of 15 A and 4 px, or more while noise hides its weaker
    parts), thresholded where it is clear of its background as seen outside the inscribed sphere or in a ring inside
    it, freed of specks, filled, and widened by ``MARGINS``. Give it the sum of two half maps, not one of them: a mask
    of one half carries its noise.

    Args:
        volume: (D, D, D), density positive.
        pixel_size_a: its A/px.
        kind: "tight" or "loose".
        low_pass_a: another smoothing.

    Returns:
        float32 (D, D, D), 0 to 1.

    Raises:
        InputError: nothing in the map is clear of its background (or its contrast is inverted).
    """
    return _widen(_distance(molecule(volume, pixel_size_a, low_pass_a)), pixel_size_a, kind)


def masks_from_map(volume: np.ndarray, pixel_size_a: float) -> dict[str, np.ndarray]:
    """``mask_from_map`` of every kind, by its name; the molecule is looked for once."""
    distance_px = _distance(molecule(volume, pixel_size_a))
    return {kind: _widen(distance_px, pixel_size_a, kind) for kind in MARGINS}


def _distance(inside: np.ndarray) -> np.ndarray:
    return scipy.ndimage.distance_transform_edt(~inside).astype(np.float32)


def _widen(distance_px: np.ndarray, pixel_size_a: float, kind: str) -> np.ndarray:
    margin = MARGINS[kind]
    edge_px = max(EDGE_PX, margin.edge_a / pixel_size_a)
    return cosine_edge(distance_px - margin.dilation_a / pixel_size_a, edge_px)


def molecule(volume: np.ndarray, pixel_size_a: float, low_pass_a: float | None = None) -> np.ndarray:
    """Where a map has density: bool (D, D, D), without margin. Arguments and errors of ``mask_from_map``."""
    cut_off_a = max(LOW_PASS_A, LOW_PASS_PX * pixel_size_a) if low_pass_a is None else low_pass_a
    largest_a = LARGEST_LOW_PASS_A if low_pass_a is None else low_pass_a
    smooth, noise, highest, typical = _smoothed(volume, cut_off_a, pixel_size_a)
    while NOISE_LEVELS * noise > CLEAR_FRACTION * typical and cut_off_a * SMOOTHER <= largest_a:
        cut_off_a *= SMOOTHER
        smooth, noise, highest, typical = _smoothed(volume, cut_off_a, pixel_size_a)
    if not highest > SEED_LEVELS * noise:
        raise InputError(
            f"cannot make a mask: smoothed to {cut_off_a:.3g} A, nothing in the map is clear of its background "
            f"({highest / noise if noise else 0:.1f} standard deviations; is its contrast inverted?); give a mask"
        )
    dense = smooth > max(NOISE_LEVELS * noise, DENSITY_FRACTION * typical)
    dense &= radii(len(dense)) <= len(dense) / 2  # nothing is reconstructed from all sides further out
    return scipy.ndimage.binary_fill_holes(_without_specks(dense))


def _smoothed(volume: np.ndarray, cut_off_a: float, pixel_size_a: float) -> tuple[np.ndarray, float, float, float]:
    """The map smoothed, above its background; the background's standard deviation; its highest and usual level."""
    smooth = low_pass(volume, cut_off_a, pixel_size_a)
    level, noise = _background(smooth)
    smooth -= level
    few = len(volume)  # voxels that may be hot
    lowest, highest = (float(level) for level in np.partition(smooth.ravel(), [few, -few])[[few, -few]])
    if highest < -lowest:  # the molecule is darker than its surroundings, or there is none
        highest = 0.0
    typical = float(np.median(smooth[smooth > 0.5 * highest])) if highest > 0 else 0.0
    return smooth, noise, highest, typical


def low_pass(volume: np.ndarray, cut_off_a: float, pixel_size_a: float) -> np.ndarray:
    """A map (D, D, D) through a Gaussian low-pass that halves the amplitude at ``cut_off_a``: float32."""
    volume = np.asarray(volume, dtype=np.float32)
    full = np.fft.fftfreq(len(volume), pixel_size_a).astype(np.float32)
    factors = 0.5 ** ((full * cut_off_a) ** 2)
    spectrum = scipy.fft.rfftn(volume)
    spectrum *= factors[:, None, None]
    spectrum *= factors[:, None]
    spectrum *= factors[: spectrum.shape[2]]
    return scipy.fft.irfftn(spectrum, volume.shape, overwrite_x=True)


def _background(smooth: np.ndarray) -> tuple[float, float]:
    """Level and standard deviation of what is not molecule, by medians, which a molecule that reaches it moves little.

    It is looked for in the corners and in a ring inside the inscribed sphere, and the quieter of the two is believed: a
    molecule may reach into the ring, and gridding may have raised the noise of the corners. But corners that have been
    set to zero are no background.
    """
    radius = radii(len(smooth)) / (len(smooth) / 2)
    found = []
    for where in (radius > 1, (radius > RING[0]) & (radius <= RING[1])):
        values = smooth[where]
        level = float(np.median(values))
        found.append((level, 1.4826 * float(np.median(np.abs(values - level)))))
    corners, ring = found
    return corners if BLANK * ring[1] < corners[1] < ring[1] else ring


def _without_specks(dense: np.ndarray) -> np.ndarray:
    """The connected parts (over faces) that are not much smaller than the largest."""
    labels, _ = scipy.ndimage.label(dense)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= max(1.0, SPECK_FRACTION * sizes.max()))[labels]


def check_mask(mask: np.ndarray, name: str = "the mask", warn: Callable[[str], object] = logger.warning) -> None:
    """Refuse a mask that leaves 0 to 1 (slack 1e-4) or keeps less than 0.1 % of the box; warn of one that keeps most.

    Args:
        mask: (D, D, D).
        name: what to call it.
        warn: takes the sentence.

    Raises:
        InputError: saying which, with the values found.
    """
    low, high = float(mask.min()), float(mask.max())
    if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
        raise InputError(f"{name}: expected values from 0 to 1, found {low:.4g} to {high:.4g}; rescale the mask")
    kept = float(np.mean(mask, dtype=np.float64))
    if kept < MINIMUM_FRACTION:
        raise InputError(
            f"{name}: keeps {100 * kept:.3g} % of the box; an FSC needs at least {100 * MINIMUM_FRACTION:g} %"
        )
    if kept > NEARLY_FULL_FRACTION:
        warn(f"{name} keeps {100 * kept:.3g} % of the box, more than a sphere that touches its faces: it hardly masks")
