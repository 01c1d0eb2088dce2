"""Which image is which particle: rows of .mrcs, .star, .cs and .txt files, before any pixel is read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosplat.columns import Columns, StarTable, join_optics, read_star
from cryosplat.csfiles import passthrough_hint, read_fields
from cryosplat.errors import InputError
from cryosplat.images import read_header
from cryosplat.stackpaths import resolve_stacks

_CS_COLUMNS = (
    "blob/idx",
    "blob/shape",
    "blob/psize_A",
    "blob/sign",
    "alignments3D/split",
    "alignments3D/pose",
    "alignments3D/shift",
    "alignments3D/psize_A",
    "ctf/df1_A",
    "ctf/df2_A",
    "ctf/df_angle_rad",
    "ctf/accel_kv",
    "ctf/cs_mm",
    "ctf/amp_contrast",
    "ctf/phase_shift_rad",
    "ctf/tilt_A",
    "ctf/shift_A",
    "ctf/trefoil_A",
    "ctf/tetra_A",
    "ctf/anisomag",
)


@dataclass(frozen=True, eq=False)
class Listing:
    """All N particles of the file the user named, in its order.

    Attributes:
        path: that file.
        names: stacks as the file names them, sorted, so that what is derived
            from them does not depend on the order of the rows.
        stack: (N,) int32, index into ``names``.
        slices: (N,) int64, image in that stack, from 0.
        group: (N,) int64, micrograph, or -1 where the file does not say.
        half: (N,) int64 as the file gives it (1, 2 or 0, 1), or None.
        half_name: the column ``half`` comes from.
        pixel_size_a: (N,) float64 A/px of the images of ``box`` pixels, or None.
        box: (N,) float64 px, what the file says of it, or None.
        columns: what a .star or .cs file says of poses and CTF; None for other files.
    """

    path: Path
    names: tuple[str, ...]
    stack: np.ndarray
    slices: np.ndarray
    group: np.ndarray
    half: np.ndarray | None = None
    half_name: str = ""
    pixel_size_a: np.ndarray | None = None
    box: np.ndarray | None = None
    columns: Columns | None = None

    def __len__(self) -> int:
        return len(self.stack)


def read_listing(
    path: Path, folders: Sequence[Path], passthroughs: Sequence[Path] = (), prefix: str | None = None
) -> Listing:
    """Read the list of particles of a .mrcs, .mrc, .star, .cs or .txt file.

    Args:
        path: the file.
        folders: where to look for stacks named by relative paths; only a .txt needs them here, to count images.
        passthroughs: further .cs files with columns of the same particles; only with a .cs.
        prefix: ``data.prefix``; only a .txt needs it here.

    Raises:
        InputError: missing, another extension, or not what its extension says.
    """
    readers = {
        ".mrcs": _read_stack_file,
        ".mrc": _read_stack_file,
        ".star": _read_star_file,
        ".cs": lambda path: _read_cs_file(path, passthroughs),
        ".txt": lambda path: _read_text_file(path, folders, prefix),
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise InputError(f"{path}: data.particles must be a .mrcs, .mrc, .star, .cs or .txt file, not {suffix!r}")
    if not path.is_file():
        raise InputError(f"{path}: no such file (data.particles; relative paths are relative to data_root)")
    if passthroughs and suffix != ".cs":
        raise InputError(f"data.passthrough={passthroughs[0]}: only a .cs file has one, and data.particles is {path}")
    try:
        listing = readers[suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not len(listing):
        raise InputError(f"{path}: lists no particles")
    return listing


def _number(values: Iterable[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Sorted distinct values and the index of each value among them."""
    values = list(values)
    names = sorted(set(values))
    place = {name: index for index, name in enumerate(names)}
    return tuple(names), np.fromiter((place[value] for value in values), dtype=np.int32, count=len(values))


def _read_stack_file(path: Path) -> Listing:
    count = read_header(path).images
    return Listing(path, (str(path),), np.zeros(count, np.int32), np.arange(count), np.full(count, -1))


def _read_text_file(path: Path, folders: Sequence[Path], prefix: str | None) -> Listing:
    """A .txt with the name of a stack on every line; all images of all of them, in that order."""
    names, line_stack = _number(line.strip() for line in path.read_text().splitlines() if line.strip())
    places = resolve_stacks(path, names, line_stack, folders, prefix)
    counts = np.array([read_header(place).images for place in places], int)
    slices = [np.arange(counts[index]) for index in line_stack]
    stack = np.repeat(line_stack, counts[line_stack]) if len(line_stack) else line_stack
    return Listing(path, names, stack, np.concatenate(slices) if slices else np.zeros(0, int), np.full(len(stack), -1))


def _read_cs_file(path: Path, passthroughs: Sequence[Path]) -> Listing:
    fields, sources = read_fields(path, passthroughs)
    if not {"blob/path", "blob/idx"} <= set(fields):
        raise InputError(f"{path}: not a particle .cs file: it has no blob/path and blob/idx{passthrough_hint(path)}")
    raw, which = np.unique(fields["blob/path"], return_inverse=True)
    # cryoSPARC marks paths into its own project with ">".
    text = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in raw.tolist()]
    names, place = _number(name.removeprefix(">") for name in text)
    count = len(which)
    group = np.full(count, -1)
    for field in ("location/micrograph_uid", "location/micrograph_path"):
        if field in fields:
            group = np.unique(fields[field], return_inverse=True)[1].astype(np.int64)
            break
    columns = Columns(path, {name: fields[name].copy() for name in _CS_COLUMNS if name in fields})
    half = _cs_integers(columns, "alignments3D/split") if "alignments3D/split" in columns else None
    size = columns.take("blob/psize_A").round(6) if "blob/psize_A" in columns else None
    box = columns.take("blob/shape", shape=(2,))[:, 0] if "blob/shape" in columns else None
    slices = _cs_integers(columns, "blob/idx")
    name, source = "alignments3D/split", sources.get("alignments3D/split", path)
    name = name if source == path else f"{name} (of {source})"
    return Listing(path, names, place[which], slices, group, half, name, size, box, columns)


def _cs_integers(columns: Columns, name: str) -> np.ndarray:
    if columns.values[name].dtype.kind not in "iu":
        raise InputError(f"{columns.path}: {name} is of type {columns.values[name].dtype}, not one whole number a row")
    return columns.take(name).astype(np.int64)


def _read_star_file(path: Path) -> Listing:
    tables = read_star(path)
    _require_single_particles(path, tables)
    particles = next((table for table in tables.values() if "_rlnImageName" in table.text), None)
    if particles is None:
        raise InputError(f"{path}: no table with a column _rlnImageName; it is not a star file of particles")
    split = [name.partition("@") for name in particles.text["_rlnImageName"]]
    slices = _image_numbers(path, [number for number, _, _ in split]) - 1
    nameless = next((row for row, part in enumerate(split) if not part[2]), None)
    if nameless is not None:
        raise InputError(f"{path}: row {nameless}: _rlnImageName {split[nameless][0]!r} is not number@stack.mrcs")
    names, stack = _number(name for _, _, name in split)
    group = np.full(len(stack), -1)
    if "_rlnMicrographName" in particles.text:
        group = _number(particles.text["_rlnMicrographName"])[1].astype(np.int64)
    columns = join_optics(path, particles, tables.get("data_optics"))
    half = None
    if "_rlnRandomSubset" in columns:
        values = columns.take("_rlnRandomSubset", expected="1 or 2")
        half = np.clip(values, -1, 3).astype(np.int64)
        bad = np.flatnonzero(half != values)
        if len(bad):
            raise InputError(f"{path}: row {bad[0]}: _rlnRandomSubset is {values[bad[0]]:g}, expected 1 or 2")
    box = columns.take("_rlnImageSize") if "_rlnImageSize" in columns else None
    size = _star_pixel_size(columns)
    return Listing(path, names, stack, slices, group, half, "rlnRandomSubset", size, box, columns)


def _require_single_particles(path: Path, tables: Mapping[str, StarTable]) -> None:
    tomographic = [name for table in tables.values() for name in table.names if name.startswith("_rlnTomo")]
    if tomographic:
        raise InputError(
            f"{path}: a star file of tomography (column {tomographic[0]}): its particles are subtomograms or tilt "
            "series, and cryosplat takes single-particle images only, one pose and one CTF an image"
        )


def _star_pixel_size(columns: Columns) -> np.ndarray | None:
    """A/px of every particle: of its optics group (RELION 3.1 on), its own, or by detector and magnification."""
    if "_rlnImagePixelSize" in columns:
        return columns.take("_rlnImagePixelSize", expected="A/px")
    if "_rlnDetectorPixelSize" in columns and "_rlnMagnification" in columns:
        detector_um, magnification = columns.take("_rlnDetectorPixelSize"), columns.take("_rlnMagnification")
        return 1e4 * detector_um / np.where(magnification > 0, magnification, np.nan)
    return None


def _image_numbers(path: Path, values: list[str]) -> np.ndarray:
    """The numbers before the @ of _rlnImageName, int64 (N,)."""
    row = 0

    def convert():
        nonlocal row
        for value in values:
            if "_" in value or not value.isascii():  # which Python would read
                raise ValueError
            yield int(value)
            row += 1

    try:
        return np.fromiter(convert(), dtype=np.int64, count=len(values))
    except (ValueError, OverflowError):
        message = f"{path}: row {row}: _rlnImageName is {values[row][:40]!r}, expected number@stack.mrcs"
        raise InputError(message) from None
