"""Particles: images, poses, CTF and half sets as one table that has been checked.

Everything a user can get wrong in these files is found here, before training,
and named with its file and row (counted from 0).
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cryosplat.alignments import (
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
from cryosplat.errors import InputError
from cryosplat.halves import assign_halves, first_copies, hold_out
from cryosplat.images import ImageReader, StackHeader, read_header
from cryosplat.listing import Listing, read_listing
from cryosplat.optics import Optics, read_optics
from cryosplat.opticsnotes import corrections, warnings
from cryosplat.pixelsizes import find_pixel_size
from cryosplat.settings import NO_CTF, DataConfig
from cryosplat.stackpaths import resolve_stacks
from cryosplat.unpickle import read_integers

_LOG = logging.getLogger("cryosplat")


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
    pixel_size_a, sizes = find_pixel_size(config.pixel_size, pixel_size_a, listing, rows, headers)
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
