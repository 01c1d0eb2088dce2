"""Copies of particle files with columns added and rows left out; all else stays as it is, to the last digit.

Star files are spliced as text: a library would read numbers and write them anew, in other digits (starfile, in six
decimals).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cryosplat.columns import scan_star
from cryosplat.errors import InputError
from cryosplat.files import atomic_path
from cryosplat.unpickle import read_npy

_WORD = re.compile(r"""(?:"[^"]*"|'[^']*'|\S)+""")


def copy_star(
    source: Path, target: Path, rows: np.ndarray, columns: Mapping[str, np.ndarray], overwrite: bool = False
) -> None:
    """Copy a star file with only some of its particles, and further columns of these.

    Every other character of the file stays: other tables, comments, the order of rows, line ends. A column of the same
    name that is there already gets the new values in its place.

    Args:
        source: a star file that ``columns.read_star`` reads.
        target: the copy; may be ``source``, with ``overwrite``.
        rows: (n,) particles to keep, from 0, ascending.
        columns: values (n,) by label, such as "_rlnCryosplatGain"; numbers, written in 6 digits.

    Raises:
        InputError: ``target`` exists, or ``source`` cannot be read.
    """
    words = {int(row): [f"{values[place]:.6g}" for values in columns.values()] for place, row in enumerate(rows)}
    try:
        # Line ends as they are; a mark of the byte order, which other programs stumble over, is left out.
        with (
            open(source, encoding="utf-8-sig", newline="") as lines,
            atomic_path(target, overwrite=overwrite) as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as copy,
        ):
            copy.writelines(_spliced(source, lines, words, list(columns)))
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: cannot be read ({error})") from error


def _spliced(
    source: Path, lines: Iterator[str], words: Mapping[int, list[str]], labels: Sequence[str]
) -> Iterator[str]:
    """Lines of the copy, from the source's; ``words`` are the new columns' by row."""
    names: list[str] = []
    between: list[str] = []  # what follows the last label, and is held back until it is known whether that was the last
    in_rows, row = False, 0
    for _number, line, kind, parts in scan_star(source, lines):
        if kind in ("block", "loop"):
            names, in_rows = [], False
        elif kind == "label":
            names.append(parts[0])
        elif kind == "row" and "_rlnImageName" in names:
            if not in_rows:
                in_rows = True
                new = [label for label in labels if label not in names]
                end = _end(between[0])
                yield between.pop(0)
                yield from (f"{label} #{len(names) + place}{end}" for place, label in enumerate(new, start=1))
                places = {names.index(label): of for of, label in enumerate(labels) if label in names}
            yield from between
            between = []
            if row in words:
                yield _with_words(line, words[row], places)
            row += 1
            continue
        if kind == "label":
            yield from between
            between = [line]
        elif between and kind == "":
            between.append(line)
        else:
            yield from between
            between = []
            yield line
    yield from between


def _end(line: str) -> str:
    """Its line end."""
    return line[len(line.rstrip("\r\n")) :]


def _with_words(line: str, new: list[str], places: Mapping[int, int]) -> str:
    """A row with the words ``new``: in the place of old ones by ``places`` (column: which of them), else at its end."""
    body, end = line.rstrip("\r\n"), _end(line)
    for place, match in reversed(list(enumerate(_WORD.finditer(body)))) if places else ():
        if place in places:
            body = body[: match.start()] + new[places[place]] + body[match.end() :]
    added = [word for of, word in enumerate(new) if of not in places.values()]
    return " ".join([body, *added]) + end


def copy_cs(source: Path, target: Path, rows: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
    """Copy a .cs file with only some of its particles, and further columns of these.

    Args:
        source: a .cs file.
        target: the copy.
        rows: (n,) particles to keep, from 0.
        columns: values (n,) by name, such as "cryosplat/gain"; in the place of columns of the same names.

    Raises:
        InputError: ``target`` exists, or ``source`` cannot be read.
    """
    table = read_npy(source)
    old = [(name, table.dtype[name]) for name in table.dtype.names if name not in columns]
    copy = np.empty(len(rows), np.dtype(old + [(name, "<f4") for name in columns]))
    for name, _ in old:
        copy[name] = table[name][rows]
    for name, values in columns.items():
        copy[name] = values
    with atomic_path(target, overwrite=False) as temporary, open(temporary, "wb") as handle:
        np.save(handle, copy)  # into a handle: np.save would add a suffix to a name
