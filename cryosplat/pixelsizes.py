"""A/px of the stored images: which of those that files and settings give counts, and whether it can be true."""

import logging

import numpy as np

from cryosplat.alignments import PIXEL_SIZE_TOLERANCE
from cryosplat.conventions import rescaled_pixel_size
from cryosplat.errors import InputError
from cryosplat.images import StackHeader
from cryosplat.listing import Listing

_LOG = logging.getLogger("cryosplat")

CALIBRATION_TOLERANCE = 1e-2
"""Relative difference of A/px between files from which it is more than a calibration of the microscope."""

PLAUSIBLE_A = (0.01, 1000.0)
"""Least and greatest A/px that is no mistake."""


LARGEST_SPREAD = 0.1
"""Relative difference of A/px from their mean up to which images of several A/px make one map: a projection is scaled,
images are not resampled. Their grey levels are taken for equal, though physics makes them differ by twice as much."""


def find_pixel_size(
    asked: float | None, from_ctf: float | None, listing: Listing, rows: np.ndarray, headers: list[StackHeader]
) -> tuple[float, np.ndarray | None]:
    """A/px of the stored images: from ``data.ctf``, else ``data.pixel_size``, else the listing, else the stacks.

    Returns:
        It, and where the listing has several, which are near each other, the A/px (n,) of each image. It is then that
        of the most images, the smaller one of two.

    Raises:
        InputError: not known, impossible, or several that are too far from each other.
    """
    pixel_size_a, sizes = _find(asked, from_ctf, listing, rows, headers)
    if PLAUSIBLE_A[0] <= pixel_size_a <= PLAUSIBLE_A[1]:
        return pixel_size_a, sizes
    raise InputError(
        f"{listing.path}: its images have {pixel_size_a:.6g} A/px, by its columns, the headers of its stacks, data.ctf "
        f"or data.pixel_size; expected {PLAUSIBLE_A[0]:g} to {PLAUSIBLE_A[1]:g}. Is it in other units?"
    )


def _find(
    asked: float | None, from_ctf: float | None, listing: Listing, rows: np.ndarray, headers: list[StackHeader]
) -> tuple[float, np.ndarray | None]:
    if asked is not None and not 0 < asked < np.inf:
        raise InputError(f"data.pixel_size is {asked}; it must be positive (A/px of the stored images)")
    listed = _listed_pixel_sizes(listing, rows, headers[0].box)
    if from_ctf is not None:
        if asked is not None and abs(asked / from_ctf - 1) > PIXEL_SIZE_TOLERANCE:
            raise InputError(
                f"data.pixel_size is {asked} A/px, but data.ctf gives {from_ctf:.6g} for these images; remove "
                "data.pixel_size, or mend the file"
            )
        _warn_of_other_pixel_size(from_ctf, "data.ctf", listing, listed)
        return from_ctf, None
    if listed is not None and np.ptp(listed) > PIXEL_SIZE_TOLERANCE * listed[0]:
        _require_near_pixel_sizes(asked, listing, rows, listed)
        sizes, count = np.unique(listed.round(6), return_counts=True)
        return float(sizes[np.argmax(count)]), listed
    if asked is not None:
        _warn_of_other_pixel_size(asked, "data.pixel_size", listing, listed)
        return asked, None
    if listed is not None:
        return round(float(listed[0]), 6), None
    return _pixel_size_of_headers(listing, headers), None


def _pixel_size_of_headers(listing: Listing, headers: list[StackHeader]) -> float:
    sizes = np.array([header.pixel_size_a for header in headers])
    # 1 A/px is what programs write into the header of a stack when they do not know.
    if ((sizes > 0) & (np.abs(sizes - 1) > 1e-6) & np.isfinite(sizes)).all():
        if np.ptp(sizes) > PIXEL_SIZE_TOLERANCE * sizes[0]:
            raise InputError(
                f"the header of the stacks: A/px from {sizes.min():.6g} to {sizes.max():.6g}; it must be one value"
            )
        return round(float(sizes[0]), 6)
    raise InputError(f"{listing.path}: neither it nor its stacks give the A/px; set data.pixel_size")


def _listed_pixel_sizes(listing: Listing, rows: np.ndarray, box: int) -> np.ndarray | None:
    """A/px (n,) of the stored images as the listing has it, or None where that is not known of every row."""
    if listing.pixel_size_a is None:
        return None
    sizes = listing.pixel_size_a[rows]
    if not ((sizes > 0) & np.isfinite(sizes)).all():
        return None
    if listing.box is None or not (listing.box[rows] >= 1).all() or (listing.box[rows] == box).all():
        return sizes
    other = float(listing.box[rows][listing.box[rows] != box][0])
    message = "%s says %g px, its stacks have %d: they are taken for resampled, of the same field of view"
    _LOG.warning(message, listing.path, other, box)
    return rescaled_pixel_size(sizes, listing.box[rows], box)


def _require_near_pixel_sizes(asked: float | None, listing: Listing, rows: np.ndarray, sizes: np.ndarray) -> None:
    near = np.abs(sizes / sizes.mean() - 1).max() <= LARGEST_SPREAD
    if near and asked is None:
        return
    message = f"{listing.path}: A/px from {sizes.min():.6g} to {sizes.max():.6g}"
    if near:
        raise InputError(f"{message}, so that data.pixel_size={asked:g} cannot stand for all; leave it out")
    message += f"; particles of one run must have the same A/px to {LARGEST_SPREAD:.0%} of the mean"
    columns = listing.columns
    if columns is not None and columns.group is not None:
        groups, first = np.unique(columns.group[rows], return_index=True)
        words = [
            f"{group:g} {columns.group_names.get(group, '')}".rstrip() + f" ({sizes[place]:.6g} A/px)"
            for group, place in zip(groups.tolist(), first.tolist(), strict=True)
        ]
        message += f"; optics groups: {', '.join(words)}"
    raise InputError(f"{message}. Choose those of near A/px with data.indices, or resample all stacks to one A/px")


def _warn_of_other_pixel_size(pixel_size_a: float, source: str, listing: Listing, listed: np.ndarray | None) -> None:
    if listed is not None and abs(float(listed[0]) / pixel_size_a - 1) > CALIBRATION_TOLERANCE:
        message = "%s says %.6g A/px, %s %.6g for the same images; the latter is used"
        _LOG.warning(message, listing.path, float(listed[0]), source, pixel_size_a)
