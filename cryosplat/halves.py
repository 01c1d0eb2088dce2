"""Which half every particle belongs to.

The halves of the refinement that gave the poses are the only ones that keep
the half maps independent, so the input's own are taken wherever it has any.
"""

import logging
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cryosplat.errors import InputError
from cryosplat.files import atomic_path
from cryosplat.listing import Listing
from cryosplat.unpickle import read_integers

_LOG = logging.getLogger("cryosplat")

_IF = "they are independent if the poses were refined in these halves"
_CONSENSUS = "the poses are from that file too, of one refinement: gold standard, if it refined the halves apart"
_NOT_GOLD = (
    "the poses may come from a refinement of both together: not gold standard with respect to poses, so that the FSC "
    "may say too much"
)

DRAWN = ("micrograph", "particle")
"""Kinds of halves that were drawn, by what."""

SMALLEST_SHARE = 0.25
"""Smallest share of the particles in a half that is drawn by micrograph; below it the FSC would compare unlike maps."""


def split_halves(image: np.ndarray, group: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """Draw two halves of nearly equal size from a seed.

    All particles of one micrograph go to one half, since they share its
    errors (defocus, ice, neighbours that overlap). If that leaves a half with
    less than ``SMALLEST_SHARE`` of the particles, or micrographs are unknown,
    particles are drawn one by one. Rows that are the same image never part.

    Args:
        image: (N,) integers, equal for rows that are the same image.
        group: (N,) micrograph of every row, -1 where unknown.
        seed: the same seed, images and groups give the same halves, in any order of the rows.

    Returns:
        Half of every row, int8 (N,), 0 for a and 1 for b, and "micrograph" or "particle": what was drawn.

    >>> half, unit = split_halves(np.array([0, 1, 2, 3]), np.array([5, 5, 8, 8]), seed=0)
    >>> bool(half[0] == half[1] != half[2] == half[3]), unit
    (True, 'micrograph')
    """
    _, image = np.unique(image, return_inverse=True)
    if (group >= 0).any():
        half = _draw(_joined(image, group), seed)
        if min(half.mean(), 1 - half.mean()) >= SMALLEST_SHARE:
            return half, "micrograph"
    return _draw(image, seed), "particle"


def _joined(image: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Unit of every row (N,): rows are in one unit if a chain of same images and same micrographs links them."""
    images = image.max() + 1
    known = np.flatnonzero(group >= 0)
    groups, node = np.unique(group[known], return_inverse=True)
    nodes = images + len(groups)
    links = coo_array((np.ones(len(known), bool), (image[known], images + node)), shape=(nodes, nodes))
    _, unit = np.unique(connected_components(links, directed=False)[1][image], return_inverse=True)
    return unit


def _draw(unit: np.ndarray, seed: int) -> np.ndarray:
    """Deal units to the smaller half, larger ones first, equal ones in random order."""
    sizes = np.bincount(unit)
    # The second number keeps this draw apart from others made from the same seed.
    random = np.random.default_rng([seed, 0x5B117])
    order = random.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    half = np.empty(len(sizes), dtype=np.int8)
    excess = 0
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        half[index] = excess > 0
        excess += -size if excess > 0 else size
    return (half ^ random.integers(2, dtype=np.int8))[unit]


def assign_halves(
    listing: Listing, rows: np.ndarray, file: Path | None, seed: int, both: bool = True, poses: Path | None = None
) -> tuple[np.ndarray, str, str]:
    """Half of the particles ``rows`` (n,), where it comes from, and a sentence that says so and what it means.

    In this order: ``file`` (0 and 1, or RELION's 1 and 2, for every particle
    of ``listing``), the listing's own column, ``split_halves``. It is settled
    for the whole listing first, so a subset keeps its halves.

    Args:
        both: whether each half must have particles.
        poses: the file of poses, if they are not the listing's own.

    Returns:
        Halves; "file", "column", or what was drawn, "micrograph" or "particle"; the sentence.

    Raises:
        InputError: values that are not halves, another number of them, or a half without particles.
    """
    if file is not None:
        values, name, kind = read_integers(file), f"{file}", "file"
        origin = f"Halves are those of data.halves, {file}; {_IF}."
        if len(values) != len(listing):
            raise InputError(f"{file}: {len(values)} halves for the {len(listing)} particles of {listing.path}")
    elif listing.half is not None:
        values, name, kind = listing.half, f"{listing.half_name} of {listing.path}", "column"
        meaning = _CONSENSUS if poses is None else _IF
        origin = f"Halves are those of {listing.half_name} in {listing.path}; {meaning}."
    else:
        half, unit = split_halves(_image_number(listing), listing.group, seed)
        name = f"the draw by {unit} from seed {seed}"
        return _checked(half[rows], name, both), unit, f"Halves were drawn by {unit} from seed {seed}; {_NOT_GOLD}."
    half = _checked(_as_halves(values, rows, name), name, both)
    _warn_of_shared_images(_image_number(listing)[rows], half, name)
    return half, kind, origin


def first_copies(same: np.ndarray, stack: np.ndarray, slices: np.ndarray) -> np.ndarray:
    """For every particle (N,) the copy of its image whose half counts for all: the first by stack and slice.

    So it does not depend on the order of the rows.

    Args:
        same: (N,) equal for copies, as ``fingerprints.same_images`` gives it.
        stack, slices: (N,) where its image is.

    >>> first_copies(np.array([0, 1, 0]), np.array([1, 0, 0]), np.array([0, 0, 7]))
    array([2, 1, 2])
    """
    order = np.lexsort((slices, stack))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    first = np.full(len(order), len(order), dtype=np.int64)
    np.minimum.at(first, same, place)
    return order[first[same]]


def save_halves(path: Path, half: np.ndarray, rows: np.ndarray, listed: int) -> None:
    """Write what ``data.halves`` takes: 0 or 1 for the particles ``rows`` (n,) of ``listed``, -1 for the others."""
    every = np.full(listed, -1, dtype=np.int8)
    every[rows] = half
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.save(handle, every)


def hold_out(listing: Listing, rows: np.ndarray, half: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw the images that nothing is to be trained on, from a seed.

    They are that fraction of either half, but at least one particle of it. As for halves, whole micrographs are taken
    where they are known, because their particles share errors and may overlap, unless that leaves a half with less
    than half its share; and rows that are the same image never part, not even those in different halves.

    Args:
        listing: all particles.
        rows: (n,) those in use.
        half: (n,) their halves.
        fraction: 0 to 0.5; 0 holds out none.

    Returns:
        (n,) bool.

    Raises:
        InputError: too few images to hold out some of each half and train on others.
    """
    held_out = np.zeros(len(rows), dtype=bool)
    if fraction == 0:
        return held_out
    _, image = np.unique(_image_number(listing)[rows], return_inverse=True)
    group = listing.group[rows]
    there = np.bincount(half, minlength=2)
    wanted = np.where(there > 0, np.maximum(1, np.rint(fraction * there)), 0).astype(np.int64)
    taken = np.zeros(2, dtype=np.int64)
    for unit in (_joined(image, group) if (group >= 0).any() else image, image):
        held_out = _take(unit, half, wanted, seed)
        taken = np.bincount(half[held_out], minlength=2)
        if (2 * taken >= wanted).all():
            break
    lacking = (there > 0) & ((taken == 0) | (taken == there))
    if lacking.any():
        h = int(np.flatnonzero(lacking)[0])
        raise InputError(
            f"data.holdout={fraction:g}: half {'ab'[h]} has {there[h]} particles, too few different images to hold "
            f"some out and train on others; use more particles, or data.holdout=0"
        )
    return held_out


def _take(unit: np.ndarray, half: np.ndarray, wanted: np.ndarray, seed: int) -> np.ndarray:
    """Rows (n,) bool of units in random order, leaving out a unit that would give a half more than is ``wanted``."""
    members = np.zeros((unit.max() + 1, 2), dtype=np.int64)
    np.add.at(members, (unit, half), 1)
    # The second number keeps this draw apart from others made from the same seed.
    order = np.random.default_rng([seed, 0x401D]).permutation(len(members))
    chosen, left = np.zeros(len(members), dtype=bool), wanted.copy()
    for index in order.tolist():
        if not left.any():
            break
        if (members[index] <= left).all():
            chosen[index] = True
            left -= members[index]
    return chosen[unit]


def _image_number(listing: Listing) -> np.ndarray:
    """(N,) equal for rows that are the same image of the same stack."""
    return listing.stack.astype(np.int64) * (listing.slices.max() + 1) + listing.slices


def _as_halves(values: np.ndarray, rows: np.ndarray, name: str) -> np.ndarray:
    # RELION counts its subsets from 1. The whole column tells, so that a subset is read alike.
    first = 1 if (values == 2).any() or name.startswith("rlnRandomSubset") else 0
    half = values[rows] - first
    bad = np.flatnonzero((half != 0) & (half != 1))
    if len(bad):
        raise InputError(
            f"{name}: row {rows[bad[0]]} is {values[rows[bad[0]]]}, expected {first} or {first + 1}; "
            "give the halves in data.halves"
        )
    return half.astype(np.int8)


def _checked(half: np.ndarray, name: str, both: bool) -> np.ndarray:
    count = np.bincount(half, minlength=2)
    if both and not count.all():
        raise InputError(
            f"half {'a' if count[0] == 0 else 'b'} has no particles: {name} puts all {len(half)} into the other; "
            "give the halves in data.halves, use more particles, or train without half maps (maps.halves=false)"
        )
    return half


def _warn_of_shared_images(image: np.ndarray, half: np.ndarray, name: str) -> None:
    shared = np.intersect1d(image[half == 0], image[half == 1])
    if len(shared):
        _LOG.warning(
            "%d images are in both halves (%s): the half maps are not independent and their FSC is too high",
            len(shared),
            name,
        )
