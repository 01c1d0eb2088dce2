"""Poses and CTF parameters: from cryoDRGN's pickles, or from the columns of a .star or .cs file; checked."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from cryosplat.columns import Columns
from cryosplat.conventions import euler_to_rotation, rescaled_pixel_size
from cryosplat.csfiles import passthrough_hint
from cryosplat.errors import InputError
from cryosplat.listing import Listing, read_listing
from cryosplat.settings import WITH_POSES
from cryosplat.unpickle import read_pickle

_LOG = logging.getLogger("cryosplat")

ROTATION_TOLERANCE = 1e-3
"""Largest error of an element of R R^T. Less is rounding, and mended where it is more than ``ROTATION_ROUNDING``."""

ROTATION_ROUNDING = 1e-6
"""Error of R R^T that single precision leaves. Insertion into Fourier grids bears no more in a large box: a
coefficient next to Nyquist would fall outside the grid."""

PIXEL_SIZE_TOLERANCE = 1e-3
"""Largest relative difference of A/px taken for equal: one shell in a thousand."""

CTF_COLUMNS = "box,A/px,defocus U,defocus V,astigmatism angle,voltage,Cs,amplitude contrast,phase shift".split(",")
"""Columns of cryoDRGN's ctf.pkl."""

STAR_ANGLES = ("_rlnAngleRot", "_rlnAngleTilt", "_rlnAnglePsi")
STAR_ORIGINS_PX = ("_rlnOriginX", "_rlnOriginY")
STAR_ORIGINS_A = ("_rlnOriginXAngst", "_rlnOriginYAngst")
STAR_DEFOCUS = ("_rlnDefocusU", "_rlnDefocusV", "_rlnDefocusAngle")
STAR_MICROSCOPE = ("_rlnVoltage", "_rlnSphericalAberration", "_rlnAmplitudeContrast")
CS_DEFOCUS = ("ctf/df1_A", "ctf/df2_A", "ctf/df_angle_rad")
CS_MICROSCOPE = ("ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast")
CS_PHASE_SHIFT = "ctf/phase_shift_rad"

ORIGIN_AGREEMENT_PX = 0.01
"""Largest difference between origins in pixels and in A of one file that is rounding, and not a contradiction."""


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


def load_ctf(path: Path) -> np.ndarray:
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
    path: Path, rotations: np.ndarray, shifts: np.ndarray, rows: np.ndarray, fix: str = "Divide pixels by the box"
) -> tuple[np.ndarray, np.ndarray]:
    """Check rotations (n, 3, 3) and shifts (n, 2) of the rows (n,) of a poses file, and return them.

    Rotations that were rounded to a few digits are replaced by the nearest ones. ``fix`` is what to do about shifts
    that are too large.

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
        f"a shift of {{value}} boxes; shifts are fractions of the box, at most 0.5. {fix}",
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
    file_box, file_pixel_size_a = columns[:, :2].T
    _first_bad(path, rows, ~(file_box >= 1), "box of {value} px (column 0)", file_box)
    positive = file_pixel_size_a > 0
    _first_bad(path, rows, ~positive, "{value} A/px (column 1); it must be positive", file_pixel_size_a)
    _check_microscope(path, columns[:, 5:8], rows, ("column 5", "column 6", "column 7"))
    # The field of view is what stays when a stack is resampled.
    sizes = rescaled_pixel_size(file_pixel_size_a, file_box, box)
    _first_bad(
        path,
        rows,
        np.abs(sizes / sizes[0] - 1) > PIXEL_SIZE_TOLERANCE,
        f"{{value}} A/px, but {sizes[0]:.6g} in row {rows[0]}; particles of one run must have the same A/px",
        sizes,
    )
    return _in_radians(columns[:, 2:]), float(sizes[0])


def _in_radians(parameters: np.ndarray) -> np.ndarray:
    """CTF parameters (n, 7), astigmatism angle and phase shift from degrees to radians."""
    parameters = parameters.copy()
    parameters[:, [2, 6]] = np.radians(parameters[:, [2, 6]])
    return parameters


def _check_microscope(path: Path, columns: np.ndarray, rows: np.ndarray, names: Sequence[str]) -> None:
    """Refuse impossible voltages, Cs and amplitude contrasts, (n, 3); ``names`` say where they stand in the file."""
    kv, cs_mm, contrast = columns.T
    for values, possible, message in (
        (kv, (kv >= 50) & (kv <= 1500), f"voltage of {{value}} kV ({names[0]}); expected 50 to 1500. Is it in V?"),
        (cs_mm, cs_mm >= 0, f"Cs of {{value}} mm ({names[1]}); it cannot be negative"),
        (contrast, (contrast >= 0) & (contrast <= 1), f"amplitude contrast of {{value}} ({names[2]}); expected 0 to 1"),
    ):
        _first_bad(path, rows, ~possible, message, values)


def has_poses(listing: Listing) -> bool:
    """Whether the file of the listing has a column of poses."""
    columns = listing.columns
    return columns is not None and any(name in columns for name in (*STAR_ANGLES, "alignments3D/pose"))


def has_ctf(listing: Listing) -> bool:
    """Whether the file of the listing has a column of defocus."""
    columns = listing.columns
    return columns is not None and any(name in columns for name in (*STAR_DEFOCUS, *CS_DEFOCUS))


def read_rotations(path: Path) -> np.ndarray:
    """Rotations (N, 3, 3) of a poses.pkl, or of all particles of a .star or .cs file.

    Raises:
        InputError: none, or bad ones.
    """
    if path.suffix.lower() not in WITH_POSES:
        rotations, shifts = load_poses(path)
    else:
        listing = read_listing(path, [])
        rotations, shifts = table_poses(listing, np.arange(len(listing)), box=1, pixel_size_a=1.0)
        shifts = np.zeros_like(shifts)  # of a box that is not known here
    return check_poses(path, rotations, shifts, np.arange(len(rotations)))[0]


def table_poses(listing: Listing, rows: np.ndarray, box: int, pixel_size_a: float) -> tuple[np.ndarray, np.ndarray]:
    """Poses of the particles ``rows`` (n,) from the columns of their .star or .cs file, in cryoDRGN's convention.

    RELION's angles and origins (in px before 3.1, in A since) and cryoSPARC's rotation vectors and shifts (px of
    ``alignments3D/psize_A``) become rotations (n, 3, 3) and shifts (n, 2) in fractions of the box.

    Args:
        box: px of the stored images.
        pixel_size_a: A/px of the stored images; counts where the file has no A/px of its own.

    Raises:
        InputError: no poses, columns that are missing or contradict each other, or what is no number.
    """
    if listing.columns is None:
        raise InputError(
            f"data.poses is not set, and {listing.path} has no poses; name a poses.pkl, or a .star or .cs file with "
            "poses as data.particles"
        )
    file_box = np.full(len(rows), float(box)) if listing.box is None else listing.box[rows]
    field_a = np.full(len(rows), box * pixel_size_a)
    if listing.pixel_size_a is not None and (listing.pixel_size_a[rows] > 0).all():
        field_a = file_box * listing.pixel_size_a[rows]
    read = _star_poses if listing.path.suffix.lower() == ".star" else _cs_poses
    return read(listing.columns, rows, file_box, field_a)


def _require(columns: Columns, needed: Sequence[str], what: str, fix: str) -> None:
    lacking = [name for name in needed if name not in columns]
    if lacking:
        there = [name for name in needed if name in columns]
        found = f" (it has {', '.join(there)})" if there else ""
        raise InputError(f"{columns.path}: no column {', '.join(lacking)}{found}, so no {what}; {fix}")


def _star_poses(
    columns: Columns, rows: np.ndarray, box: np.ndarray, field_a: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    fix = "take the star file of a 3D refinement (run_data.star), or name cryoDRGN's poses.pkl in data.poses"
    if "_rlnAnglePsi" in columns and not any(name in columns for name in STAR_ANGLES[:2]):
        fix = f"poses of a 2D classification are not enough: {fix}"
    _require(columns, STAR_ANGLES, "poses", fix)
    angles = [columns.take(name, rows) for name in STAR_ANGLES]
    if len(rows) > 1 and not (angles[0].any() or angles[1].any()):
        raise InputError(
            f"{columns.path}: _rlnAngleRot and _rlnAngleTilt are 0 in all {len(rows)} rows, as a 2D classification "
            f"leaves them; {fix}"
        )
    rotations = euler_to_rotation(*angles)
    found = []
    for names, size in ((STAR_ORIGINS_PX, box), (STAR_ORIGINS_A, field_a)):
        if any(name in columns for name in names):
            _require(columns, names, "shifts", "write the file again with RELION, or name data.poses")
            found.append(np.stack([columns.take(name, rows) / size for name in names], axis=1))
    if not found:
        _LOG.warning("%s: no origins (_rlnOriginXAngst, _rlnOriginX): all shifts are taken for 0", columns.path)
        return rotations, np.zeros((len(rows), 2))
    off_px = np.abs(found[0] - found[-1]).max(axis=1) * box
    message = (
        "_rlnOriginX, _rlnOriginY (px) and _rlnOriginXAngst, _rlnOriginYAngst (A) differ by {value} px; remove those "
        "that are out of date"
    )
    _first_bad(columns.path, rows, off_px > ORIGIN_AGREEMENT_PX, message, off_px)
    return rotations, found[-1]


def _cs_poses(
    columns: Columns, rows: np.ndarray, box: np.ndarray, field_a: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    needed = ("alignments3D/pose", "alignments3D/shift")
    fix = "take the particles of a 3D refinement, or name cryoDRGN's poses.pkl in data.poses"
    _require(columns, needed, "poses", fix + passthrough_hint(columns.path))
    # cryoSPARC's rotation takes the image's frame to the volume's.
    vectors = columns.take("alignments3D/pose", rows, (3,))
    rotations = Rotation.from_rotvec(vectors).as_matrix().transpose(0, 2, 1)
    shifts_px, size = columns.take("alignments3D/shift", rows, (2,)), "alignments3D/psize_A"
    if size not in columns:
        return rotations, shifts_px / box[:, None]
    size_a = columns.take(size, rows)
    _first_bad(columns.path, rows, ~(size_a > 0), f"{size} is {{value}}; it must be positive", size_a)
    return rotations, shifts_px * (size_a / field_a)[:, None]


def table_ctf(listing: Listing, rows: np.ndarray) -> np.ndarray | None:
    """CTF parameters (n, 7), as ``ParticleTable.ctf`` has them, of the particles ``rows`` (n,) from their own file.

    Returns:
        None if the file has no column of defocus.

    Raises:
        InputError: some columns are missing, not numbers, or impossible.
    """
    if not has_ctf(listing):
        return None
    columns = listing.columns
    if listing.path.suffix.lower() == ".star":
        defocus, microscope, shift = STAR_DEFOCUS, STAR_MICROSCOPE, "_rlnPhaseShift"
    else:
        defocus, microscope, shift = CS_DEFOCUS, CS_MICROSCOPE, CS_PHASE_SHIFT
    _require(
        columns,
        (*defocus, *microscope),
        "CTF",
        "complete the file, name cryoDRGN's ctf.pkl in data.ctf, or set data.ctf=none for images without a CTF",
    )
    values = [columns.take(name, rows) for name in (*defocus, *microscope)]
    values.append(columns.take(shift, rows) if shift in columns else np.zeros(len(rows)))
    parameters = np.stack(values, axis=1)
    _check_microscope(columns.path, parameters[:, 3:6], rows, microscope)
    return parameters if shift == CS_PHASE_SHIFT else _in_radians(parameters)


def table_invert(listing: Listing, rows: np.ndarray) -> bool | None:
    """What ``data.invert`` is by the file's own account (cryoSPARC's blob/sign), or None if it says nothing.

    Raises:
        InputError: particles of both signs.
    """
    columns = listing.columns
    if columns is None or "blob/sign" not in columns:
        return None
    sign = columns.take("blob/sign", rows)
    _first_bad(columns.path, rows, ~np.isin(sign, (-1, 1)), "blob/sign is {value}, expected 1 or -1", sign)
    message = f"blob/sign is {{value}}, but {sign[0]:g} in row {rows[0]}; use particles of one sign (data.indices)"
    _first_bad(columns.path, rows, sign != sign[0], message, sign)
    return bool(sign[0] > 0)
