"""Writing files so that nothing is ever lost or half written."""

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from cryosplat.errors import InputError

_UNFINISHED = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.\w+")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it to ``path`` on success.

    The temporary name keeps the suffix (writers choose formats by it) and is
    removed if the block raises, so a reader sees the old file or the new one,
    never part of one.

    Args:
        path: the final name; its folder must exist.
        overwrite: if false, an existing ``path`` is refused before any work.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is false, its folder does
            not exist, or the disk is full or not writable.
    """
    path = Path(path)
    if not overwrite and path.exists():
        raise InputError(f"{path} exists already; choose another name or remove it first")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            # Rename is only atomic towards a crash if the data reached the disk first.
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as handle:
            while piece := handle.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Take away what killed writers have left under temporary names; nobody else may be writing to the folder."""
    for path in Path(folder).iterdir():
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
