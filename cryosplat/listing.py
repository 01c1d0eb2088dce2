"""Which image is which particle: rows of .mrcs, .star, .cs and .txt files, before any pixel is read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosplat.columns import Columns, join_optics, read_star
from cryosplat.errors import InputError
from cryosplat.images import read_header
from cryosplat.unpickle import read_npy

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


def read_listing(path: Path, folders: Sequence[Path], passthrough: Path | None = None) -> Listing:
    """Read the list of particles of a .mrcs, .mrc, .star, .cs or .txt file.

    Args:
        path: the file.
        folders: where to look for stacks named by relative paths; only a .txt needs them here, to count images.
        passthrough: a second .cs file with further columns of the same particles; only with a .cs.

    Raises:
        InputError: missing, another extension, or not what its extension says.
    """
    readers = {
        ".mrcs": _read_stack_file,
        ".mrc": _read_stack_file,
        ".star": _read_star_file,
        ".cs": lambda path: _read_cs_file(path, passthrough),
        ".txt": lambda path: _read_text_file(path, folders),
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise InputError(f"{path}: data.particles must be a .mrcs, .mrc, .star, .cs or .txt file, not {suffix!r}")
    if not path.is_file():
        raise InputError(f"{path}: no such file (data.particles; relative paths are relative to data_root)")
    if passthrough is not None and suffix != ".cs":
        raise InputError(f"data.passthrough={passthrough}: only a .cs file has one, and data.particles is {path}")
    try:
        listing = readers[suffix](path)
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


def _read_cs_file(path: Path, passthrough: Path | None) -> Listing:
    own = _cs_fields(path, "particle .cs file")
    fields = own if passthrough is None else _merge(path, own, passthrough)
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
    name = "alignments3D/split" if "alignments3D/split" in own else f"alignments3D/split (of {passthrough})"
    return Listing(path, names, place[which], slices, group, half, name, size, box, columns)


def _cs_fields(path: Path, what: str) -> dict[str, np.ndarray]:
    table = read_npy(path)
    if table.ndim != 1 or not table.dtype.names:
        raise InputError(f"{path}: not a {what}: it has no blob/path and blob/idx, nor any other column")
    return {name: table[name] for name in table.dtype.names}


def _cs_integers(columns: Columns, name: str) -> np.ndarray:
    if columns.values[name].dtype.kind not in "iu":
        raise InputError(f"{columns.path}: {name} is of type {columns.values[name].dtype}, not one whole number a row")
    return columns.take(name).astype(np.int64)


def _merge(path: Path, fields: dict[str, np.ndarray], passthrough: Path) -> dict[str, np.ndarray]:
    """The columns of ``path`` and, of the same particles (by uid), those that only ``passthrough`` has."""
    others = _cs_fields(passthrough, "passthrough .cs file")
    for file, columns in ((path, fields), (passthrough, others)):
        if "uid" not in columns or columns["uid"].dtype.kind not in "iu" or columns["uid"].ndim != 1:
            raise InputError(
                f"{file}: no column uid of whole numbers, by which data.particles and data.passthrough are merged"
            )
    order = np.argsort(others["uid"], kind="stable")
    known = others["uid"][order]
    if (known[1:] == known[:-1]).any():
        row = order[1:][known[1:] == known[:-1]][0]
        raise InputError(f"{passthrough}: row {row} repeats the uid {others['uid'][row]}; export the file again")
    place = np.minimum(np.searchsorted(known, fields["uid"]), max(len(known) - 1, 0))
    lacking = np.flatnonzero(known[place] != fields["uid"]) if len(known) else np.arange(len(fields["uid"]))
    if len(lacking):
        raise InputError(
            f"{passthrough}: it lacks {len(lacking)} of the {len(fields['uid'])} particles of {path}, the first in row "
            f"{lacking[0]} (uid {fields['uid'][lacking[0]]}); give the passthrough file of the same job"
        )
    return fields | {name: values[order[place]] for name, values in others.items() if name not in fields}


def passthrough_hint(path: Path) -> str:
    """What to try where a .cs file lacks columns: the passthrough file beside it, if there is one."""
    beside = sorted(path.parent.glob("*passthrough*.cs"))
    found = f"data.passthrough={beside[0]}" if beside and beside[0] != path else "its job's passthrough file"
    return f"; what a .cs file lacks is often in {found} (data.passthrough names one more file, merged by uid)"


def _read_star_file(path: Path) -> Listing:
    tables = read_star(path)
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
