"""Particle images on disk: MRC headers checked beforehand, pixels read lazily.

Images and rows are counted from 0 everywhere, messages included, as in
``data.indices`` and in cryoDRGN; RELION's ``000001@stack.mrcs`` is image 0.
"""

import contextlib
import functools
import logging.config
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosplat.errors import InputError

# Modes of MRC2014 (Cheng et al., J. Struct. Biol. 2015) with real pixels, and 17, which is cryoDRGN's own for int8.
_PIXEL_TYPES = {0: np.int8, 1: np.int16, 2: np.float32, 6: np.uint16, 12: np.float16, 17: np.int8}
_OTHER_MODES = {3: "complex 16-bit", 4: "complex 32-bit", 16: "RGB", 101: "4-bit"}
_HEADER_BYTES = 1024


@contextlib.contextmanager
def logging_untouched() -> Iterator[None]:
    """Import cryodrgn inside this block.

    Its ``__init__`` calls ``logging.config.dictConfig``, which closes the
    program's log files, silences its loggers and prints to standard output.
    """
    dict_config = logging.config.dictConfig
    logging.config.dictConfig = lambda _config: None
    try:
        yield
    finally:
        logging.config.dictConfig = dict_config


@dataclass(frozen=True)
class StackHeader:
    """What the header of an image stack says, checked against the file's size."""

    images: int
    box: int  # px, even; images are square
    pixel_type: np.dtype
    pixel_size_a: float  # A/px; 0 where the header has none
    start: int = _HEADER_BYTES  # byte of the first pixel


def read_header(path: str | os.PathLike) -> StackHeader:
    """Read and check the header of an MRC image stack.

    Raises:
        InputError: missing, not an MRC file, big-endian, a mode without real
            pixels, images not square or of odd size, or fewer bytes than the
            header promises (the message says how many whole images are there).
    """
    try:
        with open(path, "rb") as handle:
            head = handle.read(_HEADER_BYTES)
            size = os.fstat(handle.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: the image stack cannot be read ({error.strerror or error})") from error
    if len(head) < _HEADER_BYTES:
        raise InputError(f"{path}: {len(head)} bytes, too short for an MRC stack (its header has {_HEADER_BYTES})")
    if head[212:213] == b"\x11":
        raise InputError(f"{path}: big-endian MRC files are not supported; write it again with mrcfile or RELION")
    nx, ny, nz, mode = struct.unpack_from("<4i", head, 0)
    (mx,) = struct.unpack_from("<i", head, 28)
    (length_x_a,) = struct.unpack_from("<f", head, 40)
    (extended,) = struct.unpack_from("<i", head, 92)
    if mode in _OTHER_MODES:
        raise InputError(
            f"{path}: MRC mode {mode} ({_OTHER_MODES[mode]}) holds no images this program reads; "
            f"convert it to mode 2 (float32) or 12 (float16)"
        )
    if mode not in _PIXEL_TYPES or min(nx, ny) < 1 or nz < 0 or extended < 0:
        raise InputError(f"{path}: not an MRC stack (mode {mode}, {nx} x {ny} x {nz} pixels)")
    pixel_size_a = length_x_a / mx if mx > 0 and length_x_a > 0 else 0.0
    header = StackHeader(nz, ny, np.dtype(_PIXEL_TYPES[mode]), pixel_size_a, _HEADER_BYTES + extended)
    _check_shape(path, nx, header, size - header.start)
    return header


def _check_shape(path: str | os.PathLike, width: int, header: StackHeader, pixel_bytes: int) -> None:
    if width != header.box:
        raise InputError(f"{path}: images of {width} x {header.box} pixels; they must be square")
    if header.box % 2:
        raise InputError(f"{path}: images of {header.box} pixels; the box must be even (crop or pad the images by one)")
    if header.images == 0:
        raise InputError(f"{path}: the stack has no images")
    image_bytes = header.box**2 * header.pixel_type.itemsize
    if pixel_bytes < header.images * image_bytes:
        raise InputError(
            f"{path}: truncated: the header promises {header.images} images, the file has "
            f"{max(pixel_bytes, 0) // image_bytes} whole ones; copy or download it again"
        )


@dataclass(frozen=True, eq=False)
class ImageReader:
    """The images of a selection of particles, wherever they lie; nothing is held in memory or open.

    Attributes:
        paths: stack files.
        box: px, the same for all.
        stack: (n,) int32, index into ``paths`` of every particle's stack.
        slices: (n,) int64, image in that stack, from 0.
        rows: (n,) int64, row in ``table``, from 0.
        table: the file the user named; equal to the only path if that is the stack itself.
    """

    paths: tuple[Path, ...]
    box: int
    stack: np.ndarray
    slices: np.ndarray
    rows: np.ndarray
    table: Path

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Raw pixels, float32 (n, D, D), of the particles ``ids`` (n,) in their order.

        Each stack is read once, in the order of its images; neighbours on disk
        in one piece.

        Args:
            out: (n, D, D) float32 to read into and return; None: a new array.

        Raises:
            InputError: a stack has vanished or shrunk since it was checked.
        """
        ids = np.asarray(ids, dtype=np.int64)
        images = np.empty((len(ids), self.box, self.box), dtype=np.float32) if out is None else out
        if not len(ids):
            return images
        stack, slices = self.stack[ids], self.slices[ids]
        order = np.lexsort((slices, stack))
        for part in np.split(order, np.flatnonzero(np.diff(stack[order])) + 1):
            path = self.paths[stack[part[0]]]
            header = _require_images(path, slices[part], self.box)
            first, last = int(part[0]), int(part[-1])
            neighbours = (np.diff(part) == 1).all() and (np.diff(slices[part]) == 1).all()
            if neighbours and header.pixel_type == np.float32:
                _read_stretch(path, header, int(slices[first]), images[first : last + 1])
            else:
                images[part] = _read_stack(path, header, slices[part])
        return images

    def in_file_order(self, ids: np.ndarray) -> np.ndarray:
        """The particles ``ids`` (n,) in the order in which their images lie on disk."""
        return ids[np.lexsort((self.slices[ids], self.stack[ids]))]

    def location(self, particle: int) -> str:
        """File and image of a particle, for messages."""
        place = f"{self.paths[self.stack[particle]]}, image {self.slices[particle]}"
        if self.paths != (self.table,):
            place += f" (row {self.rows[particle]} of {self.table.name})"
        return place

    def require_finite(self, images: np.ndarray, ids: np.ndarray) -> None:
        """Raise InputError if a pixel of ``images`` (n, D, D), read for ``ids`` (n,), is NaN or infinite."""
        finite = np.isfinite(images.reshape(len(images), -1))
        bad = np.flatnonzero(~finite.all(axis=1))
        if len(bad):
            count = int((~finite[bad[0]]).sum())
            raise InputError(
                f"{self.location(int(np.asarray(ids)[bad[0]]))}: {count} of {finite.shape[1]} pixels are not finite "
                f"numbers; leave the image out with data.indices or extract it again"
            )


@functools.cache
def _mrc_source() -> type:
    try:
        with logging_untouched():
            from cryodrgn.source import MRCFileSource
    except ImportError as error:
        raise InputError(f"reading stacks needs cryodrgn, which does not import here ({error})") from error
    return MRCFileSource


def _require_images(path: Path, slices: np.ndarray, box: int) -> StackHeader:
    """The header of a stack that still has these images."""
    header = read_header(path)
    # cryodrgn reads a short file as it is, and numpy would repeat one image in place of several.
    if header.images <= slices.max() or header.box != box:
        raise InputError(f"{path}: the stack has changed since it was checked; it has {header.images} images now")
    return header


def _read_stretch(path: Path, header: StackHeader, first: int, images: np.ndarray) -> None:
    """Neighbours on disk from ``first`` on, float32, into ``images`` (n, D, D) itself: cryodrgn would copy them twice,
    which takes longer than their transforms."""
    wanted = memoryview(images).cast("B")
    try:
        with open(path, "rb", buffering=0) as handle:
            handle.seek(header.start + first * images[0].nbytes)
            while len(wanted) and (read := handle.readinto(wanted)):
                wanted = wanted[read:]
    except OSError as error:
        raise InputError(f"{path}: the images cannot be read any more ({error})") from error
    if len(wanted):
        raise InputError(f"{path}: the images cannot be read any more (the file has become shorter)")


def _read_stack(path: Path, header: StackHeader, slices: np.ndarray) -> np.ndarray:
    """Images (n, D, D) of one stack through cryodrgn, which reads ``slices`` at one go if they are contiguous."""
    try:
        images = _mrc_source()(str(path), lazy=True, indices=slices).images(as_numpy=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the images cannot be read any more ({error})") from error
    # cryodrgn takes mode 0 for unsigned bytes; MRC2014 and mrcfile say signed.
    return images.view(header.pixel_type) if header.pixel_type == np.int8 else images
