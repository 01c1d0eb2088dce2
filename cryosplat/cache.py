"""Prepared images on a node's own disk: a folder for each set of images, in which all processes of the node share.

    <cache.dir>/<key>/set.json        what the images are, for people
                     /00000.chunk     a stretch of them, in the order in which they lie in their stacks
                     /use.lock        held (flock, shared) by whoever reads the set; its time is when that began last
                     /chunks.lock     byte c held (lockf) by whoever makes or checks chunk c

Locks are the kernel's and end with the process that holds them, however it ends. A chunk appears by being renamed, so
one that is there was finished; its checksum tells whether it still is what was written.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryosplat.errors import InputError
from cryosplat.fingerprints import NUMBERS
from cryosplat.imageprep import Prepared

logger = logging.getLogger(__name__)

RAW_CHUNK_BYTES = 2**24
"""Pixels of a chunk's images as float32: large enough to be read at a disk's full rate, small enough that a few are in
memory at a time."""

LEFT_FREE = 0.05
"""Fraction of the disk that is left to others."""

_TRAILER = struct.Struct("<II")
"""Number of images, and CRC-32 of all that comes before."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a set's chunks: half-spectra, then deviations, fingerprints, noise power, and a trailer.

    Attributes:
        images: of the set.
        per_chunk: of every chunk but the last.
        shape: (D, D//2+1, 2) of an image.
        dtype: of its numbers.
        shells: S of its noise power.
    """

    images: int
    per_chunk: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    shells: int

    @property
    def chunks(self) -> int:
        return -(-self.images // self.per_chunk)

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def places(self, chunk: int) -> range:
        """The images of a chunk, by their place in the set."""
        return range(chunk * self.per_chunk, min((chunk + 1) * self.per_chunk, self.images))

    def chunk_bytes(self, chunk: int) -> int:
        return len(self.places(chunk)) * (self.image_bytes + 8 + 8 * NUMBERS + 4 * self.shells) + _TRAILER.size

    @property
    def total_bytes(self) -> int:
        whole = self.chunks - 1
        return whole * self.chunk_bytes(0) + self.chunk_bytes(whole) if self.images else 0


def images_per_chunk(stored_box: int) -> int:
    """How many images of this box (px) go into a chunk."""
    return int(np.clip(RAW_CHUNK_BYTES // (4 * stored_box**2), 16, 1024))


def cache_folder(setting: str | None, environ: Mapping[str, str]) -> Path:
    """``cache.dir``, or where there is none a folder of this user's under what the cluster or the user offers."""
    if setting:
        return Path(setting).expanduser()
    for name in ("SLURM_TMPDIR", "TMPDIR", "XDG_CACHE_HOME"):
        if environ.get(name):
            return Path(environ[name]) / f"cryosplat-{os.getuid()}"
    return Path(tempfile.gettempdir()) / f"cryosplat-{os.getuid()}"


class ChunkSet:
    """The chunks of one set, in use by this process until ``close``.

    Args:
        root: ``cache.dir``.
        description: all that the images depend on; what differs in anything is another set.
        layout: of the chunks.
        max_gb: GiB that all sets may take; None: what the disk has but for a twentieth.

    Attributes:
        kept: chunks that may be there, from the first on; what does not fit is not kept.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(self, root: Path, description: dict[str, Any], layout: Layout, max_gb: float | None = None):
        self.layout = layout
        said = json.dumps(description, sort_keys=True)
        self.folder = root / hashlib.sha256(said.encode()).hexdigest()[:32]
        try:
            self._use = _in_use(self.folder)
            self._claims = os.open(self.folder / "chunks.lock", os.O_RDWR | os.O_CREAT, 0o600)
            about = {**description, "images": layout.images, "bytes": layout.total_bytes}
            (self.folder / "set.json").write_text(json.dumps(about, indent=1) + "\n")
            allowed = _make_room(root, self.folder, layout.total_bytes, max_gb)
        except OSError as error:
            raise InputError(
                f"cache.dir: cannot write to {self.folder} ({error.strerror or error}); name a folder on a disk of "
                "this node with cache.dir, or hold images in memory with data.cache=host"
            ) from error
        self.kept = layout.chunks if allowed >= layout.total_bytes else allowed // layout.chunk_bytes(0)

    def close(self) -> None:
        """Say that the set is not in use any more."""
        os.close(self._claims)
        os.close(self._use)

    def path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.chunk"

    def claim(self, chunk: int, wait: bool) -> bool:
        """Keep other processes from making or checking a chunk; whether that could be had without waiting."""
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, chunk)
        except BlockingIOError:
            return False
        return True

    def release(self, chunk: int) -> None:
        """Give it back."""
        fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, chunk)

    def is_good(self, chunk: int) -> bool:
        """Whether a chunk is there and is what was written; one that is not is removed, with a warning."""
        path = self.path(chunk)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            content, wrong = b"", error.strerror
        else:
            wrong = self._what_is_wrong(chunk, content)
        if wrong:
            logger.warning("%s: %s; it is made again", path, wrong)
            path.unlink(missing_ok=True)
        return not wrong

    def _what_is_wrong(self, chunk: int, content: bytes) -> str | None:
        expected = self.layout.chunk_bytes(chunk)
        if len(content) != expected:
            return f"{len(content)} bytes in place of {expected}"
        trailer = _TRAILER.pack(len(self.layout.places(chunk)), zlib.crc32(memoryview(content)[: -_TRAILER.size]))
        return None if content[-_TRAILER.size :] == trailer else "damaged: its checksum is another"

    def write(self, chunk: int, made: Prepared) -> None:
        """Put a claimed chunk there.

        It need not reach the disk before it gets its name: after a loss of power its checksum tells.

        Raises:
            OSError: the disk is full or cannot be written to; nothing of the chunk is left.
        """
        numbers = made.spectra.cpu().contiguous().numpy(), made.deviation, made.fingerprint, made.power
        pieces = [memoryview(np.ascontiguousarray(array)).cast("B") for array in numbers]
        checksum = 0
        for piece in pieces:
            checksum = zlib.crc32(piece, checksum)
        unfinished = self.path(chunk).with_suffix(".part")  # of whoever holds the claim
        try:
            with open(unfinished, "wb", buffering=0) as handle:
                for piece in (*pieces, memoryview(_TRAILER.pack(len(made.deviation), checksum))):
                    while len(piece):
                        piece = piece[handle.write(piece) :]
            os.replace(unfinished, self.path(chunk))
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def statistics(self, chunk: int, rows: np.ndarray) -> Prepared | None:
        """Of the images ``rows`` (n,) of a chunk all but the spectra, which are empty; None if it is not there."""
        count, layout = len(self.layout.places(chunk)), self.layout
        try:
            with open(self.path(chunk), "rb") as handle:
                handle.seek(count * layout.image_bytes)
                content = handle.read()
        except OSError:
            return None
        at = np.cumsum([0, 8 * count, 8 * count * NUMBERS, 4 * count * layout.shells])
        deviation = np.frombuffer(content[at[0] : at[1]])
        numbers = np.frombuffer(content[at[1] : at[2]]).reshape(count, NUMBERS)
        power = np.frombuffer(content[at[2] : at[3]], dtype=np.float32).reshape(count, layout.shells)
        nothing = torch.empty(0, *layout.shape, dtype=layout.dtype)
        return Prepared(nothing, deviation[rows], numbers[rows], power[rows])

    def gather(self, chunk: int, rows: np.ndarray, out: Tensor, places: np.ndarray) -> bool:
        """Copy images of a chunk, ``rows`` (n,) ascending, to ``out[places]``; False if the chunk is not there.

        Read and not mapped: pages of a mapping count as this process's memory, and there may be a million of them.
        """
        size, array = self.layout.image_bytes, out.numpy()
        try:
            handle = os.open(self.path(chunk), os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
                for few in np.split(run, range(_VECTORS, len(run), _VECTORS)):
                    pieces = [memoryview(array[place]).cast("B") for place in places[few]]
                    if os.preadv(handle, pieces, int(rows[few[0]]) * size) != len(few) * size:
                        raise InputError(f"{self.path(chunk)}: it was cut short while it was in use; start again")
        finally:
            os.close(handle)
        return True


_VECTORS = 512
"""Pieces of memory that one call of the kernel fills; it takes 1024 at most."""


def _in_use(folder: Path) -> int:
    """Make a set's folder if it is not there, and hold its lock of use; the lock's descriptor."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder / "use.lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(handle, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == os.stat(folder / "use.lock").st_ino:
                    os.utime(handle)
                    return handle
            os.close(handle)  # removed by another, between its making and this lock


@dataclass(frozen=True)
class KeptSet:
    """A set in a cache folder: its folder, the bytes it takes, and when it was used last (seconds since 1970)."""

    folder: Path
    bytes: int
    used: float


def kept_sets(root: Path) -> list[KeptSet]:
    """The sets in a cache folder, those used longest ago first."""
    found = []
    for lock in root.glob("*/use.lock"):
        with contextlib.suppress(OSError):
            size = sum(path.stat().st_size for path in lock.parent.iterdir())
            found.append(KeptSet(lock.parent, size, lock.stat().st_mtime))
    return sorted(found, key=lambda one: one.used)


def remove_set(folder: Path) -> bool:
    """Remove a set, unless a process has it in use; whether it is gone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder / "use.lock", os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            return True
        finally:
            os.close(handle)
    return False


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Inside, no other process counts or removes sets."""
    handle = os.open(root / "room.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make_room(root: Path, mine: Path, wanted: int, max_gb: float | None) -> int:
    """Remove what was used longest ago until ``wanted`` bytes fit; how many bytes the set ``mine`` may have."""

    def allowed() -> int:
        sets = kept_sets(root)
        own = sum(one.bytes for one in sets if one.folder == mine)
        others = sum(max(one.bytes, _planned(one.folder)) for one in sets if one.folder != mine)
        disk = shutil.disk_usage(root)
        on_disk = own + disk.free - int(LEFT_FREE * disk.total)
        return max(0, on_disk if max_gb is None else min(on_disk, int(max_gb * 2**30) - others))

    with _alone(root):
        for one in kept_sets(root):
            if allowed() >= wanted:
                break
            if one.folder != mine and remove_set(one.folder):
                logger.info("%s: removed %s, %.2g GiB, to make room", root, one.folder.name, one.bytes / 2**30)
        return allowed()


def _planned(folder: Path) -> int:
    """Bytes that a set which is being made is going to take; 0 if nobody has it in use."""
    with contextlib.suppress(OSError, ValueError):
        handle = os.open(folder / "use.lock", os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(json.loads((folder / "set.json").read_text())["bytes"])
        finally:
            os.close(handle)
    return 0
