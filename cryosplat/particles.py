"""Particles: images, poses, CTF and half sets as one table that has been checked.

Everything a user can get wrong in these files is found here, before training,
and named with its file and row (counted from 0).
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosplat.config import DataConfig
from cryosplat.conventions import rescaled_pixel_size
from cryosplat.errors import InputError
from cryosplat.halves import assign_halves, hold_out
from cryosplat.images import ImageReader, StackHeader, read_header
from cryosplat.listing import Listing, read_listing, resolve_stacks
from cryosplat.unpickle import read_integers, read_pickle

_LOG = logging.getLogger("cryosplat")

ROTATION_TOLERANCE = 1e-3
"""Largest error of an element of R R^T. Less is rounding, and mended where it is more than ``ROTATION_ROUNDING``."""

ROTATION_ROUNDING = 1e-6
"""Error of R R^T that single precision leaves. Insertion into Fourier grids bears no more in a large box: a
coefficient next to Nyquist would fall outside the grid."""

PIXEL_SIZE_TOLERANCE = 1e-3
"""Largest relative difference of A/px taken for equal: one shell in a thousand."""

CALIBRATION_TOLERANCE = 1e-2
"""Relative difference of A/px between files from which it is more than a calibration of the microscope."""


CTF_COLUMNS = "box,A/px,defocus U,defocus V,astigmatism angle,voltage,Cs,amplitude contrast,phase shift".split(",")
"""Columns of cryoDRGN's ctf.pkl."""


@dataclass(frozen=True, eq=False)
class ParticleTable:
    """N particles, checked; pixels stay on disk until ``read``.

    Attributes:
        images: where the pixels are.
        box: px, size D of the stored images.
        pixel_size_a: A/px of the stored images.
        rotations: (N, 3, 3) float64, x_image = R x_volume.
        shifts: (N, 2) float64, fractions of the box, cryoDRGN's sign (see conventions).
        ctf: (N, 7) float64, or None for images without a CTF: defocus U and V (A), astigmatism angle (rad),
            voltage (kV), Cs (mm), amplitude contrast, phase shift (rad).
        half: (N,) int8, 0 for half a and 1 for half b.
        half_origin: a sentence that says where the halves come from.
        rows: (N,) int64, row in the file that ``data.particles`` names.
        group: (N,) int64, micrograph, or -1 where unknown.
        held_out: (N,) bool, images that nothing may be trained on and no statistic be taken from.
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

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Raw pixels of the particles ``ids`` (n,), float32 (n, D, D); fastest for ids in order."""
        return self.images.read(ids)

    def location(self, particle: int) -> str:
        """File and image of a particle, for messages."""
        return self.images.location(particle)

    def require_finite(self, images: np.ndarray, ids: np.ndarray) -> None:
        """Raise InputError naming the first image of ``images`` (n, D, D), read for ``ids``, with a bad pixel."""
        self.images.require_finite(images, ids)


def read_particles(config: DataConfig, data_root: str | Path, seed: int, half_maps: bool = True) -> ParticleTable:
    """Read and check everything about the particles but their pixels.

    Args:
        config: which files; relative paths are relative to ``data_root``.
        seed: of the split into halves, if the input has none.
        half_maps: whether both halves are needed.

    Raises:
        InputError: anything wrong with the files, with the fix.
    """
    root = Path(data_root).expanduser()
    path = _path(root, config.particles)
    if path is None or not config.poses:
        raise InputError(f"data.{'particles' if path is None else 'poses'} is not set")
    datadir = _path(root, config.datadir)
    if datadir is not None and not datadir.is_dir():
        raise InputError(f"data.datadir: {datadir} is not a folder")
    # RELION's paths are relative to its project, so data_root is the second guess.
    folders = [datadir] if datadir is not None else list(dict.fromkeys([path.parent, root]))
    listing = read_listing(path, folders)
    rows = _select(listing, _path(root, config.indices), config.first)
    images, headers = _open_images(listing, rows, folders)

    poses_path, ctf_path = _path(root, config.poses), _path(root, config.ctf)
    rotations, shifts = load_poses(poses_path)
    ctf = None if ctf_path is None else _load_ctf(ctf_path)
    _check_count(poses_path, "poses", rotations, listing, rows)
    if ctf is not None:
        _check_count(ctf_path, "rows of CTF parameters", ctf, listing, rows)
    rotations, shifts = check_poses(poses_path, rotations[rows], shifts[rows], rows)
    pixel_size_a = None
    if ctf is not None:
        ctf, pixel_size_a = check_ctf(ctf_path, ctf[rows], rows, images.box)
    half, half_origin = assign_halves(listing, rows, _path(root, config.halves), seed, half_maps)
    return ParticleTable(
        images=images,
        box=images.box,
        pixel_size_a=_pixel_size(config.pixel_size, pixel_size_a, listing, rows, headers),
        rotations=rotations,
        shifts=shifts,
        ctf=ctf,
        half=half,
        half_origin=half_origin,
        rows=rows,
        group=listing.group[rows],
        held_out=hold_out(listing, rows, half, config.holdout, seed),
    )


def _path(root: Path, name: str | None) -> Path | None:
    return root / Path(name).expanduser() if name else None


def _select(listing: Listing, indices: Path | None, first: int | None) -> np.ndarray:
    """Rows in use, int64 (n,): ``data.indices`` in their order, then the first ``data.first`` of them."""
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


def _open_images(listing: Listing, rows: np.ndarray, folders: list[Path]) -> tuple[ImageReader, list[StackHeader]]:
    """Find and check the stacks of the rows in use; stacks of other rows need not exist."""
    used, stack = np.unique(listing.stack[rows], return_inverse=True)
    names = [listing.names[index] for index in used]
    if names == [str(listing.path)]:
        paths = (listing.path,)
    else:
        paths = resolve_stacks(listing.path, names, stack, folders)
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


def load_poses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """cryoDRGN's poses.pkl: (rotations, shifts), or rotations alone, as arrays of the right shapes."""
    poses = read_pickle(path)
    if isinstance(poses, tuple | list) and len(poses) not in (1, 2):
        raise InputError(f"{path}: expected (rotations, shifts), found {len(poses)} items; is it a poses.pkl?")
    parts = list(poses) if isinstance(poses, tuple | list) else [poses]
    rotations = _numeric(path, "rotations", parts[0], (3, 3))
    if len(parts) == 1:
        return rotations, np.zeros((len(rotations), 2))
    shifts = _numeric(path, "shifts", parts[1], (2,))
    if len(shifts) != len(rotations):
        raise InputError(f"{path}: {len(rotations)} rotations and {len(shifts)} shifts")
    return rotations, shifts


def _load_ctf(path: Path) -> np.ndarray:
    return _numeric(path, "CTF parameters", read_pickle(path), (9,))


def _numeric(path: Path, what: str, values: object, shape: tuple[int, ...]) -> np.ndarray:
    """Float64 (N, *shape), or InputError."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        found = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise InputError(f"{path}: {what}: expected an array of numbers, found {found}")
    if values.shape[1:] != shape or values.ndim != len(shape) + 1:
        expected = ", ".join(map(str, ("N", *shape)))
        raise InputError(f"{path}: {what}: expected the shape ({expected}), found {values.shape}")
    return values.astype(np.float64)


def _first_bad(path: Path, rows: np.ndarray, bad: np.ndarray, message: str, values: np.ndarray | None = None) -> None:
    """Raise InputError for the first row in ``bad`` (n,); ``message`` may show its value as {value}."""
    places = np.flatnonzero(bad)
    if len(places):
        text = message if values is None else message.format(value=f"{values[places[0]]:.6g}")
        raise InputError(f"{path}: row {rows[places[0]]}: {text} ({len(places)} of {len(rows)} rows)")


def check_poses(
    path: Path, rotations: np.ndarray, shifts: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Check rotations (n, 3, 3) and shifts (n, 2) of the rows (n,) of a poses file, and return them.

    Rotations that were rounded to a few digits are replaced by the nearest ones.

    Raises:
        InputError: not finite, not a rotation, a reflection, or a shift of more than half a box.
    """
    _first_bad(path, rows, ~np.isfinite(rotations).all(axis=(1, 2)), "the rotation is not finite")
    _first_bad(path, rows, ~np.isfinite(shifts).all(axis=1), "the shift is not finite")
    # Bounded first: the square of a huge element would overflow.
    error = np.abs(np.clip(rotations, -10, 10) @ np.clip(rotations, -10, 10).transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    _first_bad(
        path, rows, error > ROTATION_TOLERANCE, "not a rotation matrix: R R^T is off the identity by {value}", error
    )
    reflection = np.linalg.det(rotations) < 0
    _first_bad(path, rows, reflection, "a reflection (determinant -1), not a rotation: an axis is flipped")
    rounded = error > ROTATION_ROUNDING
    if rounded.any():
        left, _, right = np.linalg.svd(rotations[rounded])
        rotations = rotations.copy()
        rotations[rounded] = left @ right
    largest = np.abs(shifts).max(axis=1)
    _first_bad(
        path,
        rows,
        largest > 0.5,
        "a shift of {value} boxes; shifts are fractions of the box, at most 0.5. Divide pixels by the box",
        largest,
    )
    if len(rows) > 1 and np.ptp(rotations, axis=0).max() < ROTATION_TOLERANCE:
        _LOG.warning("%s: all %d rotations are the same; one view cannot give a 3D map", path, len(rows))
    return rotations, shifts


def check_ctf(path: Path, columns: np.ndarray, rows: np.ndarray, box: int) -> tuple[np.ndarray, float]:
    """Check cryoDRGN's CTF columns and convert them.

    Args:
        columns: (n, 9): box (px), A/px, defocus U and V (A), angle (deg), voltage (kV), Cs (mm), amplitude contrast,
            phase shift (deg). Box and A/px are those of the stack the file was made for.
        rows: (n,), for messages.
        box: px, of the stored images.

    Returns:
        The CTF parameters of ``ParticleTable.ctf`` and the A/px of the stored images.

    Raises:
        InputError: not finite, impossible, or A/px that differ between particles.
    """
    for column, name in enumerate(CTF_COLUMNS):
        _first_bad(path, rows, ~np.isfinite(columns[:, column]), f"{name} (column {column}) is not finite")
    file_box, file_pixel_size_a, kv, cs_mm, contrast = columns[:, [0, 1, 5, 6, 7]].T
    for values, possible, message in (
        (file_box, file_box >= 1, "box of {value} px (column 0)"),
        (file_pixel_size_a, file_pixel_size_a > 0, "{value} A/px (column 1); it must be positive"),
        (kv, (kv >= 50) & (kv <= 1500), "voltage of {value} kV (column 5); expected 50 to 1500. Is it in V?"),
        (cs_mm, cs_mm >= 0, "Cs of {value} mm (column 6); it cannot be negative"),
        (contrast, (contrast >= 0) & (contrast <= 1), "amplitude contrast of {value} (column 7); expected 0 to 1"),
    ):
        _first_bad(path, rows, ~possible, message, values)
    # The field of view is what stays when a stack is resampled.
    sizes = rescaled_pixel_size(file_pixel_size_a, file_box, box)
    _first_bad(
        path,
        rows,
        np.abs(sizes / sizes[0] - 1) > PIXEL_SIZE_TOLERANCE,
        f"{{value}} A/px, but {sizes[0]:.6g} in row {rows[0]}; particles of one run must have the same A/px",
        sizes,
    )
    ctf = columns[:, 2:].copy()
    ctf[:, [2, 6]] = np.radians(ctf[:, [2, 6]])
    return ctf, float(sizes[0])


def _pixel_size(
    asked: float | None, from_ctf: float | None, listing: Listing, rows: np.ndarray, headers: list[StackHeader]
) -> float:
    """A/px of the stored images: from the CTF, else ``data.pixel_size``, else the listing, else the stacks."""
    if asked is not None and not 0 < asked < np.inf:
        raise InputError(f"data.pixel_size is {asked}; it must be positive (A/px of the stored images)")
    if from_ctf is not None:
        if asked is not None and abs(asked / from_ctf - 1) > PIXEL_SIZE_TOLERANCE:
            raise InputError(
                f"data.pixel_size is {asked} A/px, but data.ctf gives {from_ctf:.6g} for these images; remove "
                "data.pixel_size, or mend the file"
            )
        _warn_of_other_pixel_size(from_ctf, listing, rows)
        return from_ctf
    if asked is not None:
        return asked
    header_sizes = np.array([header.pixel_size_a for header in headers])
    # 1 A/px is what programs write into the header of a stack when they do not know.
    known = (header_sizes > 0) & (np.abs(header_sizes - 1) > 1e-6)
    for source, sizes in (
        (listing.path, None if listing.pixel_size_a is None else listing.pixel_size_a[rows]),
        ("the header of the stacks", header_sizes if known.all() else None),
    ):
        if sizes is not None and (sizes > 0).all() and np.isfinite(sizes).all():
            if np.ptp(sizes) > PIXEL_SIZE_TOLERANCE * sizes[0]:
                raise InputError(f"{source}: A/px from {sizes.min():.6g} to {sizes.max():.6g}; it must be one value")
            return round(float(sizes[0]), 6)
    raise InputError(f"{listing.path}: neither it nor its stacks give the A/px; set data.pixel_size")


def _warn_of_other_pixel_size(pixel_size_a: float, listing: Listing, rows: np.ndarray) -> None:
    if listing.pixel_size_a is None:
        return
    other = float(listing.pixel_size_a[rows[0]])
    if other > 0 and abs(other / pixel_size_a - 1) > CALIBRATION_TOLERANCE:
        message = "%s says %.6g A/px, data.ctf %.6g for the same images; the latter is used"
        _LOG.warning(message, listing.path, other, pixel_size_a)
