"""Local resolution: FSC of two half maps within a soft ball round every voxel."""

from collections.abc import Iterator

import numpy as np
import scipy.fft

from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS, shell_to_angstrom
from cryosplat.errors import InputError
from cryosplat.fsc import check_maps
from cryosplat.masks import cosine_edge, radii

WINDOW_RESOLUTIONS = 7.0
"""Default diameter of the ball in units of the resolution: with 7, its error is small enough to read (Cardone et al.,
J. Struct. Biol. 184 (2013) 226)."""

SMALLEST_WINDOW_PX = 12.0
"""A ball needs enough voxels for the curve of a band to mean something."""

LARGEST_WINDOW_FRACTION = 0.5
"""Of the box: a larger ball sees the periodic neighbour of the map."""

STEPS_PER_BAND = 2
"""Bands overlap by half."""


def default_window_a(resolution_a: float, box: int, pixel_size_a: float) -> float:
    """Diameter of the ball for maps of a resolution (A), A.

    >>> default_window_a(6.0, 128, 2.0)
    42.0
    """
    smallest = SMALLEST_WINDOW_PX * pixel_size_a
    return float(np.clip(WINDOW_RESOLUTIONS * resolution_a, smallest, LARGEST_WINDOW_FRACTION * box * pixel_size_a))


def local_resolution(
    half_a: np.ndarray,
    half_b: np.ndarray,
    pixel_size_a: float,
    window_a: float,
    threshold: float = RESOLUTION_THRESHOLD_HALF_MAPS,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Resolution round every voxel.

    Both maps are split into frequency bands, each as wide as the ball can tell apart (1 / its diameter), half
    overlapping. In a band the correlation at a voxel is that of the two band-passed maps over the ball round it,

        FSC(r, f) = (w * a_f b_f)(r) / sqrt( (w * a_f^2)(r) (w * b_f^2)(r) ),

    w being the soft ball; the resolution is where this first falls below the threshold, linear in frequency between
    bands. What it cannot tell: detail of the resolution finer than the ball, a resolution worse than its diameter
    (that is the largest value) or better than Nyquist (the smallest). Near the threshold its error is about
    1 / sqrt(n), n being 4 pi f^2 V / diameter, with V the ball's volume: for 7 resolutions, n is about 320.

    Args:
        half_a, half_b: (D, D, D), unmasked.
        pixel_size_a: A/px.
        window_a: diameter of the ball at half height, A.
        threshold: FSC at which resolution is read.
        mask: (D, D, D); where it is 0 the largest value is written.

    Returns:
        float32 (D, D, D), A.

    Raises:
        InputError: a ball of less than 12 px or more than half of the box.
    """
    check_maps({"half map a": half_a, "half map b": half_b} | ({} if mask is None else {"the mask": mask}))
    box = len(half_a)
    window_px = window_a / pixel_size_a
    if not SMALLEST_WINDOW_PX - 1e-6 <= window_px <= LARGEST_WINDOW_FRACTION * box + 1e-6:
        raise InputError(
            f"a window of {window_a:g} A ({window_px:.3g} px): expected {SMALLEST_WINDOW_PX:g} to "
            f"{LARGEST_WINDOW_FRACTION * box:g} px, that is {SMALLEST_WINDOW_PX * pixel_size_a:.4g} to "
            f"{LARGEST_WINDOW_FRACTION * box * pixel_size_a:.4g} A"
        )
    width = box / window_px  # of a band, in shells
    crossing = np.full(half_a.shape, np.float32(width))
    before = np.ones(half_a.shape, np.float32)
    reached = np.ones(half_a.shape, bool)
    centres = _band_centres(width, box // 2)
    bands = _band_correlations(half_a, half_b, window_px)
    for last, middle, fsc in zip([width, *centres[:-1]], centres, bands, strict=True):
        below = reached & (fsc < threshold)
        fraction = (before - threshold) / np.maximum(before - fsc, np.finfo(np.float32).eps)
        np.copyto(crossing, last + np.clip(fraction, 0, 1) * (middle - last), where=below)
        reached &= ~below
        before = fsc
    crossing[reached] = box // 2
    resolution = shell_to_angstrom(np.maximum(crossing, width), box, pixel_size_a).astype(np.float32)
    return resolution if mask is None else np.where(mask > 0, resolution, np.float32(window_a))


def _band_centres(width: float, last: int) -> np.ndarray:
    """Middles of the bands in shells, from one width on."""
    return np.arange(width, last + 1e-6, width / STEPS_PER_BAND)


def _band_correlations(half_a: np.ndarray, half_b: np.ndarray, window_px: float) -> Iterator[np.ndarray]:
    """FSC in the ball round every voxel, (D, D, D), band after band."""
    box = len(half_a)
    spectra = [scipy.fft.rfftn(np.asarray(half, dtype=np.float32)) for half in (half_a, half_b)]
    full = np.fft.fftfreq(box, 1 / box).astype(np.float32) ** 2
    shells = np.sqrt(full[:, None, None] + full[:, None] + full[: box // 2 + 1])
    edge_px = max(2.0, window_px / 4)
    ball = cosine_edge(radii(box) - (window_px / 2 - edge_px / 2), edge_px)
    kernel = scipy.fft.rfftn(np.fft.ifftshift(ball / ball.sum()))

    def within_ball(field: np.ndarray) -> np.ndarray:
        return scipy.fft.irfftn(scipy.fft.rfftn(field) * kernel, field.shape, overwrite_x=True)

    width = box / window_px
    for middle in _band_centres(width, box // 2):
        # Bands with smooth flanks have no side lobes in real space that reach beyond the ball.
        band = cosine_edge(np.abs(shells - middle), width)
        a, b = (scipy.fft.irfftn(spectrum * band, (box, box, box), overwrite_x=True) for spectrum in spectra)
        power = within_ball(a * a) * within_ball(b * b)
        yield within_ball(a * b) / np.sqrt(np.maximum(power, np.finfo(np.float32).tiny))
