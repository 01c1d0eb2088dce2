"""Columns of particle tables by their own names: what a .star file is read into, and what every particle has of it.

Star files are read here and not by starfile or cryodrgn: both hold every column of every row, cryodrgn's as fixed-width
text (1.9 GB and 8 s for 100,000 particles, in every process), and starfile shifts or fills up rows of another length
without a word. Only the few columns that are needed are kept, and a bad row or entry is named.
"""

import shlex
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cryosplat.errors import InputError

_STAR_LISTS = ("_rlnOddZernike", "_rlnEvenZernike")
_STAR_TEXT = ("_rlnImageName", "_rlnMicrographName", "_rlnOpticsGroupName", *_STAR_LISTS)
_OPTICS = (
    "_rlnImagePixelSize",
    "_rlnImageSize",
    "_rlnVoltage",
    "_rlnSphericalAberration",
    "_rlnAmplitudeContrast",
    "_rlnBeamTiltX",
    "_rlnBeamTiltY",
    "_rlnMagMat00",
    "_rlnMagMat01",
    "_rlnMagMat10",
    "_rlnMagMat11",
    "_rlnCtfDataArePhaseFlipped",
    "_rlnCtfDataAreCtfPremultiplied",
)
"""What RELION keeps once an optics group from 3.1 on, and once a particle before."""

LONGEST_LIST = 100
"""Coefficients of Zernike polynomials; RELION fits 9 even ones and 6 odd."""

_STAR_NUMBERS = (
    *_OPTICS,
    "_rlnOpticsGroup",
    "_rlnRandomSubset",
    "_rlnDetectorPixelSize",
    "_rlnMagnification",
    "_rlnAngleRot",
    "_rlnAngleTilt",
    "_rlnAnglePsi",
    "_rlnOriginX",
    "_rlnOriginY",
    "_rlnOriginXAngst",
    "_rlnOriginYAngst",
    "_rlnDefocusU",
    "_rlnDefocusV",
    "_rlnDefocusAngle",
    "_rlnPhaseShift",
)


@dataclass(frozen=True, eq=False)
class Columns:
    """Numbers that a file gives every particle.

    Attributes:
        path: that file.
        values: (N, ...) by the file's own name for them; NaN where the file has no number.
        unreadable: what stands there instead, by name and row.
        group: (N,) optics group of every particle, or None where the file has none.
        group_names: of the optics groups, where they have names.
    """

    path: Path
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    unreadable: Mapping[tuple[str, int], str] = field(default_factory=dict)
    group: np.ndarray | None = None
    group_names: Mapping[int, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(
        self, name: str, rows: np.ndarray | None = None, shape: tuple[int, ...] = (), expected: str = "a number"
    ) -> np.ndarray:
        """A column of the rows (n,), or of all, as float64 (n, *shape).

        Raises:
            InputError: not of numbers, of another shape, or not finite somewhere.
        """
        column = self.values[name]
        if column.dtype.kind not in "iuf" or column.shape[1:] != shape:
            found = f"{column.dtype} of the shape (N, {', '.join(map(str, column.shape[1:]))})"
            wanted = f"{shape[0]} numbers" if shape else "one number"
            raise InputError(f"{self.path}: {name} is {found}, expected {wanted} a row; export the file again")
        rows = np.arange(len(column)) if rows is None else rows
        with np.errstate(invalid="ignore"):  # of NaN that signal; they are found below
            values = column[rows].astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(bad):
            row = int(rows[bad[0]])
            text = self.unreadable.get((name, row))
            found = f"{values[bad[0]]}" if text is None else repr(text[:40])
            raise InputError(
                f"{self.path}: row {row}: {name} is {found}, expected {expected} ({len(bad)} of {len(rows)} rows)"
            )
        return values


class StarTable:
    """One table of a star file: what is needed of it, as it is read."""

    def __init__(self, path: Path, names: list[str]):
        self.path = path
        self.text: dict[str, list[str]] = {name: [] for name in names if name in _STAR_TEXT}
        self.unreadable: dict[tuple[str, int], str] = {}
        self._place = {name: place for place, name in enumerate(names)}
        self._width = len(names)
        self._names = [name for name in self._place if name in _STAR_NUMBERS]
        self._places = [self._place[name] for name in self._names]
        twice = [name for name in (*self.text, *self._names) if names.count(name) > 1]
        if twice:
            raise InputError(f"{path}: the column {twice[0]} is there twice in one table; remove the one that is wrong")
        self._numbers = array("d")

    @property
    def names(self) -> list[str]:
        """Its columns, read or not."""
        return list(self._place)

    def __len__(self) -> int:
        if self.text:
            return len(next(iter(self.text.values())))
        return len(self._numbers) // max(len(self._names), 1)

    @property
    def needed(self) -> bool:
        """Whether it has a column that anybody asks for."""
        return bool(self.text or self._names)

    def add(self, words: list[str], line: int) -> None:
        """A row, which stands in that line."""
        if not self.needed:
            return
        if len(words) != self._width:
            raise InputError(f"{self.path}: line {line} has {len(words)} values for {self._width} columns")
        numbers = [words[place] for place in self._places]
        try:
            # Python takes 1_0 for 10 and reads the digits of all alphabets; other programs do not.
            if "_" in (joined := "".join(numbers)) or not joined.isascii():
                raise ValueError
            numbers = [float(word) for word in numbers]
        except ValueError:
            numbers = [self._number(name, words[place]) for name, place in zip(self._names, self._places, strict=True)]
        self._numbers.extend(numbers)
        for name, kept in self.text.items():
            kept.append(words[self._place[name]])

    def _number(self, name: str, word: str) -> float:
        try:
            if "_" in word or not word.isascii():
                raise ValueError
            return float(word)
        except ValueError:
            self.unreadable[name, len(self)] = word
            return np.nan

    def numbers(self) -> dict[str, np.ndarray]:
        """Its columns of numbers, each (N,)."""
        values = np.frombuffer(self._numbers, dtype=np.float64).reshape(-1, max(len(self._names), 1))
        found = {name: values[:, place].copy() for place, name in enumerate(self._names)}
        return found | {name: self._lists(name) for name in _STAR_LISTS if name in self.text}

    def _lists(self, name: str) -> np.ndarray:
        """Lists such as ``[0,0,1.5]``, (N, k) with zeros after the end of shorter ones; NaN where there is no list."""
        known: dict[str, list[float]] = {}
        for row, text in enumerate(self.text[name]):
            if text not in known:
                known[text] = _list_of_numbers(text)
            if len(known[text]) == 1 and np.isnan(known[text][0]):
                self.unreadable[name, row] = text
        found = np.zeros((len(self), max((len(numbers) for numbers in known.values()), default=0)))
        for row, text in enumerate(self.text[name]):
            numbers = known[text]
            found[row, : len(numbers)] = numbers
        return found


def _list_of_numbers(text: str) -> list[float]:
    """The numbers of ``[0,0,1.5]``; a single NaN for what is no such list."""
    try:
        if not (text.startswith("[") and text.endswith("]")):
            return [np.nan]
        numbers = [float(word) for word in text[1:-1].split(",") if word]
    except ValueError:
        return [np.nan]
    return numbers if len(numbers) <= LONGEST_LIST else [np.nan]


def scan_star(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, str, str, list[str]]]:
    """What the lines of a star file are: number (from 1), the line, its kind, its words.

    The kind is "block" (data_...), "loop", "label" (of a column; in a block without a loop its value follows), "row",
    or "" where there is nothing, or a comment. Once a loop has had a row, a line that begins with _ is a row as well.

    Raises:
        InputError: an open quotation in a row.
    """
    in_rows = False
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            yield number, line, "", words
        elif words[0].startswith("data_") and len(words) == 1:
            in_rows = False
            yield number, line, "block", words
        elif words[0] == "loop_":
            in_rows = False
            yield number, line, "loop", words
        elif words[0].startswith("_") and not in_rows:
            yield number, line, "label", words
        else:
            in_rows = True
            if '"' in line or "'" in line:
                words = _split_quoted(path, number, line)
            yield number, line, "row", words


def read_star(path: Path) -> dict[str, StarTable]:
    """Every looped table of a star file, by the name of its block.

    Raises:
        InputError: a row of another length than the table's header, an open quotation, rows without a loop_, a column
            or a table that is there twice, so that it is not known which is meant.
    """
    tables: dict[str, StarTable] = {}
    block, names, table, looped = "", [], None, False
    with open(path, encoding="utf-8-sig") as handle:
        for number, _line, kind, words in scan_star(path, handle):
            if kind == "block":
                block, names, table, looped = words[0], [], None, False
            elif kind == "loop":
                names, table, looped = [], None, True
            elif kind == "label":
                names.append(words[0])
            elif kind == "row":
                if table is None:
                    table = StarTable(path, names)
                    if table.needed and not looped:
                        raise InputError(f"{path}: line {number}: rows of values, but no loop_ before their columns")
                    _require_first(path, tables, block, table, number)
                    tables[block] = table
                table.add(words, number)
    return tables


def _require_first(path: Path, tables: Mapping[str, StarTable], block: str, table: StarTable, line: int) -> None:
    """Refuse a second table of particles, or of one block: which of them is meant?"""
    for name, other in tables.items():
        twice = "_rlnImageName" in table.text and "_rlnImageName" in other.text
        if twice or (name == block and table.needed and other.needed):
            raise InputError(
                f"{path}: line {line}: a second table {'of particles ' if twice else ''}begins here ({block}); the "
                f"first is in {name}. Were two files put together? Keep one table in each, or join them with RELION"
            )


def _split_quoted(path: Path, number: int, line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise InputError(f"{path}: line {number}: {str(error).lower()}") from error


def join_optics(path: Path, particles: StarTable, optics: StarTable | None) -> Columns:
    """What every particle has, its optics group's values among them; those come before its own, as in RELION.

    Raises:
        InputError: an optics group that the table of them lacks, or has twice.
    """
    values = particles.numbers()
    if optics is None or not len(optics):
        return Columns(path, values, particles.unreadable, values.get("_rlnOpticsGroup"))
    theirs = optics.numbers()
    of_optics = Columns(path.with_name(f"{path.name}, data_optics"), theirs, optics.unreadable)
    place = _optics_place(Columns(path, values, particles.unreadable), of_optics, len(particles), len(optics))
    unreadable = dict(particles.unreadable)
    for name in (*_OPTICS, *_STAR_LISTS):
        if name in theirs:
            values[name] = theirs[name][place]
            wrong = {row: text for (column, row), text in optics.unreadable.items() if column == name}
            for row in np.flatnonzero(np.isin(place, list(wrong))).tolist() if wrong else ():
                unreadable[name, row] = wrong[int(place[row])]
    groups = theirs.get("_rlnOpticsGroup", np.ones(len(optics)))
    names = optics.text.get("_rlnOpticsGroupName", [])
    named = dict(zip(groups.tolist(), names, strict=True)) if names else {}
    return Columns(path, values, unreadable, groups[place], named)


def _optics_place(particles: Columns, optics: Columns, count: int, groups: int) -> np.ndarray:
    """Row (N,) of data_optics of every particle."""
    name = "_rlnOpticsGroup"
    tables = {"data_optics": optics, "the particles": particles}
    lacking = [table for table, columns in tables.items() if name not in columns]
    if lacking and groups == 1:
        return np.zeros(count, dtype=np.int64)
    if lacking:
        raise InputError(
            f"{particles.path}: {groups} optics groups, but no column {name} in {' and '.join(lacking)}, so that it is "
            "not known which particle is of which; write the file again with RELION"
        )
    known, wanted = optics.take(name, expected="its number"), particles.take(name, expected="its number")
    order = np.argsort(known, kind="stable")
    known = known[order]
    if (np.diff(known) == 0).any():
        twice = known[1:][np.diff(known) == 0][0]
        raise InputError(f"{optics.path} has the optics group {twice:g} twice; give each its own number")
    place = np.minimum(np.searchsorted(known, wanted), groups - 1)
    unknown = np.flatnonzero(known[place] != wanted)
    if len(unknown):
        raise InputError(
            f"{particles.path}: row {unknown[0]}: optics group {wanted[unknown[0]]:g} is not in data_optics, which has "
            f"{', '.join(f'{group:g}' for group in known)}; add it there, or leave these {len(unknown)} rows out"
        )
    return order[place]
