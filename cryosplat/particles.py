"""Particles: images, poses, CTF and half sets as one table that has been checked.

Everything a user can get wrong in these files is found here, before training,
and named with its file and row (counted from 0).
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cryosplat.alignments import (
    PIXEL_SIZE_TOLERANCE,
    check_ctf,
    check_poses,
    has_ctf,
    has_poses,
    load_ctf,
    load_poses,
    table_ctf,
    table_invert,
    table_poses,
)
from cryosplat.config import path_names
from cryosplat.conventions import rescaled_pixel_size
from cryosplat.errors import InputError
from cryosplat.halves import assign_halves, first_copies, hold_out
from cryosplat.images import ImageReader, StackHeader, read_header
from cryosplat.listing import Listing, read_listing
from cryosplat.optics import Optics, read_optics
from cryosplat.opticsnotes import corrections, warnings
from cryosplat.settings import NO_CTF, DataConfig
from cryosplat.stackpaths import resolve_stacks
from cryosplat.unpickle import read_integers

_LOG = logging.getLogger("cryosplat")

CALIBRATION_TOLERANCE = 1e-2
"""Relative difference of A/px between files from which it is more than a calibration of the microscope."""

PLAUSIBLE_A = (0.01, 1000.0)
"""Least and greatest A/px that is no mistake."""


LARGEST_SPREAD = 0.1
"""Relative difference of A/px from their mean up to which images of several A/px make one map: a projection is scaled,
images are not resampled. Their grey levels are taken for equal, though physics makes them differ by twice as much."""


@dataclass(frozen=True, eq=False)
class ParticleTable:
    """N particles, checked; pixels stay on disk until ``read``.

    Attributes:
        images: where the pixels are.
        box: px, size D of the stored images.
        pixel_size_a: A/px of the map in the stored box, and of the images but for those of other optics groups.
        rotations: (N, 3, 3) float64, x_image = R x_volume, without magnification.
        shifts: (N, 2) float64, fractions of the box, cryoDRGN's sign (see conventions).
        ctf: (N, 7) float64, or None for images without a CTF: defocus U and V (A), astigmatism angle (rad),
            voltage (kV), Cs (mm), amplitude contrast, phase shift (rad); with the aberrations that these can hold.
        half: (N,) int8, 0 for half a and 1 for half b.
        half_origin: a sentence that says where the halves come from.
        half_from: "column" of the input, "file" (data.halves), or drawn by "micrograph" or "particle".
        rows: (N,) int64, row in the file that ``data.particles`` names.
        listed: particles in that file.
        group: (N,) int64, micrograph, or -1 where unknown.
        held_out: (N,) bool, images that nothing may be trained on and no statistic be taken from.
        invert: true for particles white on dark, as far as the input says; the images have the last word (``sign``).
        sign_origin: what says so: "data.invert", or a column of the file; empty if nothing does.
        optics: what else is known of the optics, or None if there is nothing else.
    """

    images: ImageReader
    box: int
    pixel_size_a: float
    rotations: np.ndarray
    shifts: np.ndarray
    ctf: np.ndarray | None
    half: np.ndarray
    half_origin: str
    rows: np.ndarray
    group: np.ndarray
    held_out: np.ndarray
    invert: bool = True
    sign_origin: str = ""
    half_from: str = ""
    listed: int = 0
    optics: Optics | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Raw pixels of the particles ``ids`` (n,), float32 (n, D, D); fastest for ids in order."""
        return self.images.read(ids)

    def with_copies_together(self, same: np.ndarray) -> "ParticleTable":
        """The same particles, copies of an image all in one half and all held out or none.

        Args:
            same: (N,) equal for copies.

        Raises:
            InputError: a half has no particles left.
        """
        first = first_copies(same, self.images.stack, self.images.slices)
        half = self.half[first]
        if len(np.unique(half)) < 2:
            raise InputError(f"{self.images.table}: all {len(half)} images are copies; two halves need different ones")
        return replace(self, half=half, held_out=self.held_out[first])

    def location(self, particle: int) -> str:
        """File and image of a particle, for messages."""
        return self.images.location(particle)

    def require_finite(self, images: np.ndarray, ids: np.ndarray) -> None:
        """Raise InputError naming the first image of ``images`` (n, D, D), read for ``ids``, with a bad pixel."""
        self.images.require_finite(images, ids)


def read_particles(
    config: DataConfig, data_root: str | Path, seed: int, half_maps: bool = True, listing: Listing | None = None
) -> ParticleTable:
    """Read and check everything about the particles but their pixels.

    Args:
        config: which files; relative paths are relative to ``data_root``.
        seed: of the split into halves, if the input has none.
        half_maps: whether both halves are needed.
        listing: ``list_particles`` of the same, if it is there already.

    Raises:
        InputError: anything wrong with the files, with the fix.
    """
    root = Path(data_root).expanduser()
    listing = list_particles(config, root) if listing is None else listing
    folders = stack_folders(config, root)
    rows = select_rows(config, root, listing)
    images, headers = open_images(listing, rows, folders, config.prefix)
    ctf, pixel_size_a = _read_ctf(config, root, listing, rows, images.box)
    pixel_size_a, sizes = _pixel_size(config.pixel_size, pixel_size_a, listing, rows, headers)
    pixel_size_a = _plausible(pixel_size_a, listing)
    rotations, shifts = _read_poses(config, root, listing, rows, images.box, pixel_size_a)
    optics = read_optics(listing, rows, images.box, pixel_size_a, sizes, ctf)
    for note in corrections(optics):
        _LOG.info("%s: %s", listing.path, note)
    for note in warnings(listing, rows, images.box, pixel_size_a, ctf):
        _LOG.warning("%s: %s", listing.path, note)
    halves, poses = _path(root, config.halves), _path(root, config.poses)
    half, half_from, half_origin = assign_halves(listing, rows, halves, seed, half_maps, poses)
    invert, sign_origin = _invert(config.invert, listing, rows)
    return ParticleTable(
        images=images,
        box=images.box,
        pixel_size_a=pixel_size_a,
        rotations=rotations,
        shifts=shifts,
        ctf=ctf if ctf is None or optics is None else optics.ctf(ctf),
        half=half,
        half_origin=half_origin,
        half_from=half_from,
        listed=len(listing),
        rows=rows,
        group=listing.group[rows],
        held_out=hold_out(listing, rows, half, config.holdout, seed),
        invert=invert,
        sign_origin=sign_origin,
        optics=optics,
    )


def list_particles(config: DataConfig, data_root: str | Path) -> Listing:
    """The file that ``data.particles`` names, with those of ``data.passthrough``, before anything else is looked at.

    Raises:
        InputError: it is not set, or cannot be read.
    """
    root = Path(data_root).expanduser()
    path = _path(root, config.particles)
    if path is None:
        raise InputError("data.particles is not set")
    passthroughs = [root / Path(name).expanduser() for name in path_names(config, "passthrough")]
    return read_listing(path, stack_folders(config, root), passthroughs, config.prefix)


def stack_folders(config: DataConfig, data_root: str | Path) -> list[Path]:
    """Where stacks are looked for.

    Raises:
        InputError: ``data.datadir`` is not a folder.
    """
    root = Path(data_root).expanduser()
    datadir = _path(root, config.datadir)
    if datadir is None:
        # RELION's paths are relative to its project, so data_root is the second guess.
        return list(dict.fromkeys([_path(root, config.particles).parent, root]))
    if not datadir.is_dir():
        raise InputError(f"data.datadir: {datadir} is not a folder")
    return [datadir]


def _read_poses(
    config: DataConfig, root: Path, listing: Listing, rows: np.ndarray, box: int, pixel_size_a: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rotations and shifts of the rows in use: of ``data.poses`` if that is set, else of the listing's own columns."""
    path = _path(root, config.poses)
    if path is None:
        rotations, shifts = table_poses(listing, rows, box, pixel_size_a)
        return check_poses(listing.path, rotations, shifts, rows, "Are its A/px and box those of the stack?")
    if has_poses(listing):
        _LOG.info("poses are those of data.poses, %s; those in %s are not used", path, listing.path)
    rotations, shifts = load_poses(path)
    _check_count(path, "poses", rotations, listing, rows)
    return check_poses(path, rotations[rows], shifts[rows], rows)


def _read_ctf(
    config: DataConfig, root: Path, listing: Listing, rows: np.ndarray, box: int
) -> tuple[np.ndarray | None, float | None]:
    """CTF of the rows in use, and the A/px that ``data.ctf`` gives: of that file, else of the listing's own columns."""
    if config.ctf == NO_CTF:
        return None, None
    path = _path(root, config.ctf)
    if path is None:
        ctf = table_ctf(listing, rows)
        if ctf is None and listing.columns is not None:
            _LOG.warning("%s: no CTF in it, and data.ctf is not set: the images are taken as without CTF", listing.path)
        return ctf, None
    if has_ctf(listing):
        _LOG.info("the CTF is that of data.ctf, %s; the one in %s is not used", path, listing.path)
    columns = load_ctf(path)
    _check_count(path, "rows of CTF parameters", columns, listing, rows)
    return check_ctf(path, columns[rows], rows, box)


def _invert(asked: bool | None, listing: Listing, rows: np.ndarray) -> tuple[bool, str]:
    """``data.invert`` if that is set, else what the listing says, else true, as cryoDRGN has it; and what said so."""
    if asked is not None:
        return asked, "data.invert"
    said = table_invert(listing, rows)
    return (True, "") if said is None else (said, f"blob/sign of {listing.path}")


def _path(root: Path, name: str | None) -> Path | None:
    return root / Path(name).expanduser() if name else None


def select_rows(config: DataConfig, data_root: str | Path, listing: Listing) -> np.ndarray:
    """Rows in use, int64 (n,): ``data.indices`` in their order, then the first ``data.first`` of them.

    Raises:
        InputError: rows that there are not, or none.
    """
    indices, first = _path(Path(data_root).expanduser(), config.indices), config.first
    rows = np.arange(len(listing), dtype=np.int64)
    if indices is not None:
        rows = read_integers(indices)
        outside = np.flatnonzero((rows < 0) | (rows >= len(listing)))
        if len(outside):
            raise InputError(
                f"{indices}: entry {outside[0]} is {rows[outside[0]]}, but {listing.path} has the rows 0 to "
                f"{len(listing) - 1}"
            )
        distinct, position = np.unique(rows, return_index=True)
        if len(distinct) < len(rows):
            again = np.setdiff1d(np.arange(len(rows)), position)[0]
            raise InputError(f"{indices}: entry {again} repeats row {rows[again]}; a row can be used once")
    if first is not None:
        if first < 1:
            raise InputError(f"data.first is {first}; it must be at least 1")
        rows = rows[:first]
    if not len(rows):
        raise InputError(f"{indices}: selects no particles")
    return rows


def open_images(
    listing: Listing, rows: np.ndarray, folders: list[Path], prefix: str | None
) -> tuple[ImageReader, list[StackHeader]]:
    """Find and check the stacks of the rows in use; stacks of other rows need not exist."""
    used, stack = np.unique(listing.stack[rows], return_inverse=True)
    names = [listing.names[index] for index in used]
    if names == [str(listing.path)]:
        paths = (listing.path,)
    else:
        paths = resolve_stacks(listing.path, names, stack, folders, prefix)
    headers = [read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        if header.box != headers[0].box:
            raise InputError(
                f"{listing.path}: stacks of different box sizes, {paths[0]} of {headers[0].box} px and {path} of "
                f"{header.box} px; use one box size"
            )
    slices = listing.slices[rows]
    counts = np.array([header.images for header in headers])[stack]
    bad = np.flatnonzero((slices < 0) | (slices >= counts))
    if len(bad):
        row, path = bad[0], paths[stack[bad[0]]]
        raise InputError(
            f"{listing.path}: row {rows[row]} is image {slices[row]} (counted from 0) of {path}, which has "
            f"{counts[row]} images"
        )
    return ImageReader(paths, headers[0].box, stack.astype(np.int32), slices, rows, listing.path), headers


def _check_count(path: Path, what: str, values: np.ndarray, listing: Listing, rows: np.ndarray) -> None:
    if len(values) == len(listing):
        return
    message = f"{path}: {len(values)} {what} for the {len(listing)} images of {listing.path}"
    if len(values) == len(rows):
        message += (
            "; they are as many as data.indices and data.first leave, but these select from images, poses and CTF "
            "alike: give the file of the whole stack"
        )
    raise InputError(message)


def _pixel_size(
    asked: float | None, from_ctf: float | None, listing: Listing, rows: np.ndarray, headers: list[StackHeader]
) -> tuple[float, np.ndarray | None]:
    """A/px of the stored images: from ``data.ctf``, else ``data.pixel_size``, else the listing, else the stacks.

    Returns:
        It, and where the listing has several, which are near each other, the A/px (n,) of each image. It is then that
        of the most images, the smaller one of two.
    """
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


def _plausible(pixel_size_a: float, listing: Listing) -> float:
    if PLAUSIBLE_A[0] <= pixel_size_a <= PLAUSIBLE_A[1]:
        return pixel_size_a
    raise InputError(
        f"{listing.path}: its images have {pixel_size_a:.6g} A/px, by its columns, the headers of its stacks, data.ctf "
        f"or data.pixel_size; expected {PLAUSIBLE_A[0]:g} to {PLAUSIBLE_A[1]:g}. Is it in other units?"
    )


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
