"""Which image is which particle: rows of .mrcs, .star, .cs and .txt files, before any pixel is read.

The tables are read here and not by cryodrgn, whose star parser keeps every
column of every row as fixed-width text: 1.9 GB and 8 s for 100,000 particles,
in every process. Only the few columns that are needed are kept.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosplat.errors import InputError
from cryosplat.images import read_header
from cryosplat.unpickle import read_npy

_STAR_COLUMNS = (
    "_rlnImageName",
    "_rlnMicrographName",
    "_rlnRandomSubset",
    "_rlnOpticsGroup",
    "_rlnImagePixelSize",
    "_rlnDetectorPixelSize",
    "_rlnMagnification",
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
        pixel_size_a: (N,) float64 A/px of the stored images, or None.
    """

    path: Path
    names: tuple[str, ...]
    stack: np.ndarray
    slices: np.ndarray
    group: np.ndarray
    half: np.ndarray | None = None
    half_name: str = ""
    pixel_size_a: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.stack)


def read_listing(path: Path, folders: Sequence[Path]) -> Listing:
    """Read the list of particles of a .mrcs, .mrc, .star, .cs or .txt file.

    Args:
        path: the file.
        folders: where to look for stacks named by relative paths; only a .txt needs them here, to count images.

    Raises:
        InputError: missing, another extension, or not what its extension says.
    """
    readers = {".mrcs": _read_stack_file, ".mrc": _read_stack_file, ".star": _read_star_file, ".cs": _read_cs_file}
    suffix = path.suffix.lower()
    if suffix not in readers and suffix != ".txt":
        raise InputError(f"{path}: data.particles must be a .mrcs, .mrc, .star, .cs or .txt file, not {suffix!r}")
    if not path.is_file():
        raise InputError(f"{path}: no such file (data.particles; relative paths are relative to data_root)")
    try:
        listing = _read_text_file(path, folders) if suffix == ".txt" else readers[suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not len(listing):
        raise InputError(f"{path}: lists no particles")
    return listing


def resolve_stacks(path: Path, names: Sequence[str], stack: np.ndarray, folders: Sequence[Path]) -> tuple[Path, ...]:
    """Find the stacks ``names`` that the file ``path`` lists.

    A stack is looked for under its full relative path in every folder, then
    under its bare name there, for stacks that were copied together.

    Args:
        stack: (n,) index into ``names`` of every row, for the message.

    Raises:
        InputError: stacks are missing, or two different ones are found in the same file by their bare names.
    """
    found = [_find(name, folders) for name in names]
    missing = [index for index, place in enumerate(found) if place is None]
    if missing:
        concerned = np.flatnonzero(np.isin(stack, missing))
        raise InputError(
            f"{path}: {len(missing)} of {len(names)} stacks do not exist, for {len(concerned)} of {len(stack)} rows; "
            f"the first is {names[stack[concerned[0]]]!r}, looked for under {', '.join(map(str, folders))}. "
            "Set data.datadir to the folder that the names are relative to"
        )
    by_bare_name: dict[Path, str] = {}
    for name, (place, bare) in zip(names, found, strict=True):
        if bare and by_bare_name.setdefault(place, name) != name:
            raise InputError(
                f"{path}: {by_bare_name[place]!r} and {name!r} would both be read from {place}; keep them in their "
                "folders and set data.datadir to the folder that the names are relative to"
            )
    return tuple(place for place, _ in found)


def _find(name: str, folders: Sequence[Path]) -> tuple[Path, bool] | None:
    """The stack's path, and whether only its bare name led there."""
    for folder in folders:
        if (folder / name).is_file():  # an absolute name stands for itself
            return folder / name, False
    for folder in folders:
        if (folder / Path(name).name).is_file():
            return folder / Path(name).name, True
    return None


def _number(values: Iterable[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Sorted distinct values and the index of each value among them."""
    values = list(values)
    names = sorted(set(values))
    place = {name: index for index, name in enumerate(names)}
    return tuple(names), np.fromiter((place[value] for value in values), dtype=np.int32, count=len(values))


def _read_stack_file(path: Path) -> Listing:
    count = read_header(path).images
    return Listing(path, (str(path),), np.zeros(count, np.int32), np.arange(count), np.full(count, -1))


def _read_text_file(path: Path, folders: Sequence[Path]) -> Listing:
    """A .txt with the name of a stack on every line; all images of all of them, in that order."""
    names, line_stack = _number(line.strip() for line in path.read_text().splitlines() if line.strip())
    counts = np.array([read_header(place).images for place in resolve_stacks(path, names, line_stack, folders)], int)
    slices = [np.arange(counts[index]) for index in line_stack]
    stack = np.repeat(line_stack, counts[line_stack]) if len(line_stack) else line_stack
    return Listing(path, names, stack, np.concatenate(slices) if slices else np.zeros(0, int), np.full(len(stack), -1))


def _read_cs_file(path: Path) -> Listing:
    table = read_npy(path)
    fields = (table.dtype.names or ()) if table.ndim == 1 else ()
    if not {"blob/path", "blob/idx"} <= set(fields):
        raise InputError(f"{path}: not a particle .cs file: it has no blob/path and blob/idx")
    raw, which = np.unique(table["blob/path"], return_inverse=True)
    # cryoSPARC marks paths into its own project with ">".
    text = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in raw.tolist()]
    names, place = _number(name.removeprefix(">") for name in text)
    group = np.full(len(table), -1)
    for field in ("location/micrograph_uid", "location/micrograph_path"):
        if field in fields:
            group = np.unique(table[field], return_inverse=True)[1].astype(np.int64)
            break
    slices = _cs_numbers(path, table, "blob/idx", np.int64)
    half = _cs_numbers(path, table, "alignments3D/split", np.int64) if "alignments3D/split" in fields else None
    size = _cs_numbers(path, table, "blob/psize_A", np.float64).round(6) if "blob/psize_A" in fields else None
    return Listing(path, names, place[which], slices, group, half, "alignments3D/split", size)


def _cs_numbers(path: Path, table: np.ndarray, field: str, dtype: type) -> np.ndarray:
    column = table[field]
    if column.ndim != 1 or column.dtype.kind not in ("iu" if dtype is np.int64 else "iuf"):
        raise InputError(f"{path}: {field} is of type {table.dtype[field]}, not one number a row")
    return column.astype(dtype)


def _read_star_file(path: Path) -> Listing:
    tables = _read_star_tables(path)
    particles = next((table for table in tables.values() if "_rlnImageName" in table), None)
    if particles is None:
        raise InputError(f"{path}: no table with a column _rlnImageName; it is not a star file of particles")
    split = [name.partition("@") for name in particles["_rlnImageName"]]
    slices = _numbers(path, "_rlnImageName", (number for number, _, _ in split), int, "number@stack.mrcs") - 1
    nameless = next((row for row, part in enumerate(split) if not part[2]), None)
    if nameless is not None:
        raise InputError(f"{path}: row {nameless}: _rlnImageName {split[nameless][0]!r} is not number@stack.mrcs")
    names, stack = _number(name for _, _, name in split)
    group = np.full(len(stack), -1)
    if "_rlnMicrographName" in particles:
        group = _number(particles["_rlnMicrographName"])[1].astype(np.int64)
    half = None
    if "_rlnRandomSubset" in particles:
        half = _numbers(path, "_rlnRandomSubset", particles["_rlnRandomSubset"], int, "1 or 2")
    size = _star_pixel_size(path, particles, tables.get("data_optics", {}))
    return Listing(path, names, stack, slices, group, half, "rlnRandomSubset", size)


def _star_pixel_size(path: Path, particles: dict[str, list[str]], optics: dict[str, list[str]]) -> np.ndarray | None:
    """A/px of every particle: from the optics groups (RELION 3.1 on), the particles, or detector and magnification."""
    size_name, group_name = "_rlnImagePixelSize", "_rlnOpticsGroup"
    if size_name in optics and group_name in optics and group_name in particles:
        sizes = _numbers(path, size_name, optics[size_name], float, "A/px")
        by_group = dict(zip(optics[group_name], sizes, strict=True))
        unknown = next((row for row, name in enumerate(particles[group_name]) if name not in by_group), None)
        if unknown is not None:
            group = particles[group_name][unknown]
            raise InputError(f"{path}: row {unknown}: optics group {group} is not in data_optics")
        return np.array([by_group[name] for name in particles[group_name]])
    if size_name in particles:
        return _numbers(path, size_name, particles[size_name], float, "A/px")
    if "_rlnDetectorPixelSize" in particles and "_rlnMagnification" in particles:
        detector_um = _numbers(path, "_rlnDetectorPixelSize", particles["_rlnDetectorPixelSize"], float, "a number")
        magnification = _numbers(path, "_rlnMagnification", particles["_rlnMagnification"], float, "a number")
        return 1e4 * detector_um / np.where(magnification > 0, magnification, np.nan)
    return None


def _numbers(path: Path, column: str, values: Iterable[str], kind: type, expected: str) -> np.ndarray:
    """A star column as int64 or float64 (N,)."""
    row = 0

    def convert():
        nonlocal row
        for value in values:
            yield kind(value)
            row += 1

    values = list(values)
    try:
        return np.fromiter(convert(), dtype=np.int64 if kind is int else np.float64, count=len(values))
    except (ValueError, OverflowError):
        raise InputError(f"{path}: row {row}: {column} is {values[row][:40]!r}, expected {expected}") from None


def _read_star_tables(path: Path) -> dict[str, dict[str, list[str]]]:
    """The needed columns of every looped table of a STAR file, by block name, values as text."""
    tables: dict[str, dict[str, list[str]]] = {}
    block, columns, kept = "", [], None
    with open(path, encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if words[0].startswith("data_") and len(words) == 1:
                block, columns, kept = words[0], [], None
            elif words[0] == "loop_":
                columns, kept = [], None
            elif words[0].startswith("_"):
                columns.append(words[0])
            else:
                if kept is None:
                    kept = {name: index for index, name in enumerate(columns) if name in _STAR_COLUMNS}
                    if kept:
                        tables[block] = {name: [] for name in kept}
                if '"' in line or "'" in line:
                    words = _split_quoted(path, number, line)
                if kept and len(words) != len(columns):
                    raise InputError(f"{path}: line {number} has {len(words)} values for {len(columns)} columns")
                for name, index in kept.items():
                    tables[block][name].append(words[index])
    return tables


def _split_quoted(path: Path, number: int, line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise InputError(f"{path}: line {number}: {str(error).lower()}") from error
