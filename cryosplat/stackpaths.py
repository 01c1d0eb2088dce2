"""Where the stacks are that a particle file names: names rewritten, folders to look in, and what to set otherwise."""

import itertools
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from cryosplat.errors import InputError

MOST_FOLDERS = 2000
"""Folders under each place that are looked through for stacks that are missing."""

DEEPEST = 3
"""Levels under it that are."""


def parse_prefix(text: str | None) -> list[tuple[str, str]]:
    """Pairs of ``data.prefix``: "old=new", several separated by commas.

    Raises:
        InputError: not of this form.

    >>> parse_prefix("/old/project/=/data/,S1/=")
    [('/old/project/', '/data/'), ('S1/', '')]
    """
    pairs = []
    for word in text.split(",") if text else []:
        old, equals, new = word.strip().partition("=")
        if not equals or not old:
            raise InputError(
                f"data.prefix={text}: expected old=new (how names of stacks begin, and how they are to begin; several "
                "separated by commas), for example data.prefix=/old/project/=/new/project/ or data.prefix=S1/="
            )
        pairs.append((old, new))
    return pairs


def rewrite(path: Path, names: Sequence[str], prefix: str | None) -> tuple[str, ...]:
    """The names as they begin by ``data.prefix``; of several that fit, the first counts.

    Args:
        path: the particle file, for the message.

    Raises:
        InputError: the setting is not of its form, or none of the names begins so.
    """
    pairs = parse_prefix(prefix)
    found = [next((new + name[len(old) :] for old, new in pairs if name.startswith(old)), name) for name in names]
    if pairs and names and found == list(names) and not any(name.startswith(old) for name in names for old, _ in pairs):
        wanted = " or ".join(repr(old) for old, _ in pairs)
        raise InputError(
            f"{path}: data.prefix={prefix}: none of its {len(names)} stacks begins with {wanted}; the first is "
            f"{names[0]!r}"
        )
    return tuple(found)


def resolve_stacks(
    path: Path, names: Sequence[str], stack: np.ndarray, folders: Sequence[Path], prefix: str | None = None
) -> tuple[Path, ...]:
    """Find the stacks ``names`` that the file ``path`` lists.

    A stack is looked for under its full relative path in every folder, then under its bare name there, for stacks that
    were copied together.

    Args:
        stack: (n,) index into ``names`` of every row, for the message.
        prefix: ``data.prefix``.

    Raises:
        InputError: stacks are missing (with the setting that finds them, if they are near), or two different ones are
            found in the same file by their bare names.
    """
    names = rewrite(path, names, prefix)
    found = [_find(name, folders) for name in names]
    missing = [index for index, place in enumerate(found) if place is None]
    if missing:
        concerned = np.flatnonzero(np.isin(stack, missing))
        raise InputError(
            f"{path}: {len(missing)} of {len(names)} stacks do not exist, for {len(concerned)} of {len(stack)} rows; "
            f"the first is {names[stack[concerned[0]]]!r}, looked for under {', '.join(map(str, folders))}. "
            + how_to_mend([names[index] for index in missing], [path.parent, *folders] if prefix is None else [])
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


def missing_stacks(path: Path, names: Sequence[str], folders: Sequence[Path], prefix: str | None = None) -> list[str]:
    """Those of the stacks ``names`` that are not found, by their rewritten names.

    Raises:
        InputError: as ``rewrite``.
    """
    return [name for name in rewrite(path, names, prefix) if _find(name, folders) is None]


def how_to_mend(missing: Sequence[str], places: Sequence[Path]) -> str:
    """The setting with which missing stacks are found, if they are near ``places``; else what settings there are."""
    found = find_setting(missing, places)
    if found is None:
        return (
            "Set data.datadir to the folder that the names are relative to, or data.prefix=old=new to have them begin "
            "in another way"
        )
    key, value, there = found
    every = "all of them" if there == len(missing) else f"{there} of them"
    return f"Set {shlex.quote(f'{key}={value}')}, which finds {every}"


def find_setting(missing: Sequence[str], places: Sequence[Path]) -> tuple[str, str, int] | None:
    """The setting with which missing stacks are found, its value, and how many it finds; None if the first is not.

    Looked at are these places, all folders above them, and, down to ``DEEPEST`` levels, those below them. What it says
    is meant for names that no ``data.prefix`` has changed.
    """
    parts = PurePosixPath(missing[0]).parts
    # The whole name first, then without what it begins with; a bare name last.
    tails = [PurePosixPath(*parts[skip:]) for skip in range(missing[0].startswith("/"), len(parts))]
    near = list(dict.fromkeys(_near(places)))
    for tail, folder in itertools.product(tails, near):
        if not (folder / tail).is_file():
            continue
        dropped = missing[0][: len(missing[0]) - len(str(tail))]
        with_it = [name.removeprefix(dropped) for name in missing if name.startswith(dropped)]
        there = sum((folder / name).is_file() for name in with_it)
        if dropped:
            return "data.prefix", f"{dropped}={folder}{os.sep}", there
        return "data.datadir", str(folder), there
    return None


def _near(places: Sequence[Path]) -> Iterator[Path]:
    """Folders near the places: themselves, those above, nearest first, and then those below, a level at a time."""
    places = [place.absolute() for place in places]
    yield from places
    for place in places:
        yield from place.parents
    for place in places:
        level, looked_at = [place], 0
        for _ in range(DEEPEST):
            level = [below for folder in level for below in _below(folder)][: MOST_FOLDERS - looked_at]
            looked_at += len(level)
            yield from level


def _below(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
