"""Checkpoints: written whole or not at all, read without running anything in them.

A checkpoint is a dictionary of tensors, numbers, strings, lists and
dictionaries, in PyTorch's zip format. The sum over every record is checked
when it is read, because PyTorch itself does not: a damaged file would
otherwise go on with damaged numbers.
"""

import io
import logging
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from cryosplat.errors import InputError
from cryosplat.files import atomic_path

_LOG = logging.getLogger("cryosplat")

FORMAT = 1
"""Raised when older checkpoints can no longer be read."""

_NAME = re.compile(r"step_(\d{9})\.pt")
_PLAIN = (torch.Tensor, bool, int, float, str, bytes, type(None))


def save(folder: str | os.PathLike, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``state`` as the checkpoint of ``step`` and remove old ones.

    Args:
        folder: made if it is not there.
        step: number of optimiser steps done; names the file.
        state: nothing but tensors, numbers, strings, None, lists, tuples and dictionaries.
        keep: how many to keep, the new one included, at least 1.

    Returns:
        The file's path.

    Raises:
        InputError: the disk is full or not writable; older checkpoints are still there.
    """
    folder = Path(folder)
    path = folder / f"step_{step:09d}.pt"
    write(path, state)
    # What lies beyond this step is unreadable or belongs to a course that was given up: it must not be the latest.
    for other in _found(folder):
        if _step(other) > step:
            other.unlink()
    prune(folder, keep)
    return path


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a state that ``load`` reads back; the folder is made if it is not there.

    Raises:
        InputError: the disk is full or not writable; what was there before is still there.
    """
    _require_plain(state, "state")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    # Through memory (some tens of MB): torch.save reports a full disk as a RuntimeError that does not say so.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "state": state}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def prune(folder: str | os.PathLike, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what a killed process left half written."""
    for path in [*_found(folder)[: -max(keep, 1)], *Path(folder).glob(".*.pt")]:
        path.unlink(missing_ok=True)


def latest(folder: str | os.PathLike) -> Path | None:
    """The newest checkpoint in ``folder`` by step; None if there is none, or no folder."""
    found = _found(folder)
    return found[-1] if found else None


def load(path: str | os.PathLike) -> dict[str, Any]:
    """The state in a checkpoint, or in the newest readable checkpoint of a folder; tensors on the CPU.

    Raises:
        InputError: no checkpoint, or none that can be read; of a single file, what is wrong with it.
    """
    path = Path(path)
    if not path.is_dir():
        return _read(path)
    problems = []
    for candidate in reversed(_found(path)):
        try:
            state = _read(candidate)
        except InputError as error:
            problems.append(str(error))
            _LOG.warning(f"{error}; trying the checkpoint before it")
            continue
        if problems:
            _LOG.warning(f"going on from {candidate.name}, the newest checkpoint that can be read")
        return state
    if problems:
        raise InputError("no checkpoint can be read; start anew in another run_dir.\n  " + "\n  ".join(problems))
    raise InputError(f"{path}: no checkpoint in this folder")


def _found(folder: str | os.PathLike) -> list[Path]:
    """Checkpoints in the order of their steps."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: the checkpoint is damaged (record {damaged} fails its check sum)")
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such checkpoint") from error
    except OSError as error:
        raise InputError(f"{path}: the checkpoint cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: the checkpoint is damaged or is none: {reason}") from error
    if not isinstance(loaded, dict) or "state" not in loaded:
        raise InputError(f"{path}: not a checkpoint of cryosplat")
    if loaded.get("format") != FORMAT:
        raise InputError(
            f"{path}: a checkpoint of format {loaded.get('format')}; this version reads format {FORMAT}. "
            "Resume with the version that wrote it, or start anew in another run directory"
        )
    return loaded["state"]


def _require_plain(value: Any, where: str) -> None:
    """Only what ``weights_only=True`` reads back may be saved: found now, not when a run is to be resumed."""
    if isinstance(value, dict):
        for key, item in value.items():
            _require_plain(key, f"a key of {where}")
            _require_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            _require_plain(item, f"{where}[{place}]")
    elif not isinstance(value, _PLAIN):
        raise TypeError(f"a checkpoint cannot hold {where}, a {type(value).__name__}: make it a tensor or a number")
