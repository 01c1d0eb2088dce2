"""Arrays from files of other programs, pickles above all, read without running anything in them.

A pickle is a program: loading one with ``pickle.load`` can execute any command.
cryoDRGN's files hold nothing but numpy arrays in a tuple, so that is all this
reader knows. It walks the operations first and refuses every one that arrays do
not need, then builds the arrays itself from shape, type and bytes. No function
of numpy or of anything else named in the file is ever called: numpy's own
``__setstate__`` trusts what it is given, and crafted bytes could crash it.
"""

import io
import math
import os
import pickle
import pickletools
import re
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cryosplat.errors import InputError

Plain = np.ndarray | int | float | bool | list | tuple
"""What a file may hold: an array, a number, or a flat tuple or list of these."""

_OPERATIONS = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GLOBAL STACK_GLOBAL REDUCE BUILD "
    "PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET".split()
)
_MEMO_WRITES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_NUMBER_TYPES = re.compile(r"b1|[iu][1248]|f[248]")
_MOST_AXES = 64  # as in numpy

_LONGEST_HEADER = 1 << 20
"""Bytes of a header in numpy's format. numpy's own limit, 10,000, is less than .cs files of many classes have."""


_NUMPY_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    MemoryError,
    OverflowError,
    # Of damaged headers, which numpy reads as Python literals.
    SyntaxError,
    tokenize.TokenError,
    RecursionError,
    AttributeError,
    LookupError,
)


class _Refused(pickle.UnpicklingError):
    """The file asks for something that arrays do not need."""


class _NumberType:
    """Stands for ``numpy.dtype``; plain numbers only."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_flags: bool):
        if not isinstance(code, str):
            raise pickle.UnpicklingError("a dtype without a name")
        if code.startswith("O"):
            raise _Refused("it holds an array of Python objects (dtype object)")
        if not _NUMBER_TYPES.fullmatch(code):
            raise _Refused(f"it holds an array of dtype {code[:20]!r}, not of plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        # (version, byte order, subarray, field names, fields, size, alignment, flags[, metadata])
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("a damaged dtype")
        if any(part is not None for part in state[2:5]):
            raise _Refused("it holds a structured array, not one of plain numbers")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a numpy array until its shape, type and bytes have been checked."""

    __slots__ = ("value",)

    def __init__(self):
        self.value = None

    def __setstate__(self, state: tuple) -> None:
        # (version, shape, dtype, Fortran order, bytes)
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("a damaged array")
        self.fill(state[4], state[2], state[1], "F" if state[3] else "C")

    def fill(self, data: bytes, number_type: _NumberType, shape: tuple, order: str) -> None:
        """Take the bytes of an array of a plain number type, shape and order ("C" or "F"), if they fit each other.

        Raises:
            pickle.UnpicklingError: they do not, or are not what they should be.
        """
        if not isinstance(number_type, _NumberType) or not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError("a damaged array")
        # Bounded: the product of a megabyte of integers would take minutes.
        sized = isinstance(shape, tuple) and len(shape) <= _MOST_AXES
        if not sized or not all(isinstance(size, int) and 0 <= size < 2**63 for size in shape):
            raise pickle.UnpicklingError("an array without a shape")
        # Python's integers: a product of crafted sizes must not wrap round.
        if math.prod(shape) * number_type.dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"an array of shape {str(shape)[:60]} with {len(data)} bytes")
        # A view: a small file can have one array a million times over, and a million copies would fill the memory.
        self.value = np.frombuffer(data, dtype=number_type.dtype).reshape(shape, order=order)

    def copy(self) -> np.ndarray:
        """Its values in native byte order, C order and writable."""
        return self.value.astype(self.value.dtype.newbyteorder("="), order="C")


class _Name:
    """What a name in the file stands for. It cannot be changed by the file, unlike a function or a class."""

    __slots__ = ("make",)

    def __init__(self, make: Callable):
        self.make = make

    def __call__(self, *arguments):
        return self.make(*arguments)

    def __setstate__(self, state: object) -> None:
        raise _Refused("it changes a function")


def _refuse_call(*_arguments):
    raise _Refused("it calls numpy.ndarray")


_NDARRAY = _Name(_refuse_call)


def _reconstruct(kind: _Name, _shape: tuple, _code: bytes) -> _Array:
    if kind is not _NDARRAY:
        raise _Refused("it holds an array of a class other than numpy.ndarray")
    return _Array()


def _from_buffer(data, number_type, shape, order, axis_order=None) -> _Array:
    """Pickle protocol 5; ``axis_order`` (numpy 2) restores arrays that are contiguous in another order of axes."""
    array = _Array()
    if axis_order is None:
        if order not in ("C", "F"):
            raise pickle.UnpicklingError("an array without an order")
        array.fill(data, number_type, shape, order)
    else:
        array.fill(data, number_type, shape, "C")
        array.value = array.value.transpose(axis_order)
    return array


def _scalar(number_type, data) -> int | float | bool:
    array = _Array()
    array.fill(data, number_type, (), "C")
    return array.value.item()


_NAMES = {("numpy", "ndarray"): _NDARRAY, ("numpy", "dtype"): _Name(_NumberType)}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
    _NAMES[_core + ".multiarray", "_reconstruct"] = _Name(_reconstruct)
    _NAMES[_core + ".multiarray", "scalar"] = _Name(_scalar)
    _NAMES[_core + ".numeric", "_frombuffer"] = _Name(_from_buffer)


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self._left = len(data)  # no honest file has text turned into more bytes than it has itself

    def find_class(self, module: str, name: str) -> _Name:
        if (module, name) == ("_codecs", "encode"):
            return _Name(self._encode)
        try:
            return _NAMES[module, name]
        except KeyError:
            raise _Refused(f"it names {f'{module}.{name}'[:80]!r}") from None

    def _encode(self, text, encoding) -> bytes:
        """How protocols before 3 write bytes."""
        if encoding != "latin1" or not isinstance(text, str):
            raise _Refused("it uses a text encoding other than latin1")
        self._left -= len(text)
        if self._left < 0:
            raise _Refused("it repeats its own bytes")
        return text.encode("latin1")

    def persistent_load(self, _identifier):
        raise _Refused("it refers to an object outside the file")


def _check_operations(data: bytes) -> None:
    """Refuse, before anything is loaded, operations and sizes that no pickled array has."""
    for count, (operation, argument, _position) in enumerate(pickletools.genops(data)):
        if operation.name not in _OPERATIONS:
            hint = " (strings of Python 2: write the file again with Python 3)" if "STRING" in operation.name else ""
            raise _Refused(f"it uses the pickle operation {operation.name}{hint}")
        # The C unpickler allocates its memo up to the index it is told: up to 64 GiB for one damaged byte.
        if operation.name in _MEMO_WRITES and argument > count:
            raise pickle.UnpicklingError("a damaged memo index")


def _plain(value: object, size: int, depth: int = 0) -> Plain:
    """What the file holds, which has that size."""
    if isinstance(value, _Array) and value.value is not None:
        return value.copy()
    if isinstance(value, int | float):
        return value
    # One level only: cryoDRGN nests no deeper, and a list that holds itself would never end.
    if isinstance(value, tuple | list) and depth == 0:
        if sum(item.value.nbytes for item in value if isinstance(item, _Array) and item.value is not None) > size:
            raise _Refused("it repeats its own bytes")
        return type(value)(_plain(item, size, depth + 1) for item in value)
    raise _Refused(f"it holds {type(value).__name__.lstrip('_')} where arrays and numbers are expected")


def read_pickle(path: str | os.PathLike) -> Plain:
    """Read a pickle of numpy arrays and numbers, alone or in one flat tuple or list.

    Written by numpy 1 or 2 in any pickle protocol. Arrays come back in native
    byte order, C order and writable; numpy scalars as Python numbers.

    Raises:
        InputError: the file is missing, empty, damaged, or names or does
            anything but hold arrays of plain numbers. Nothing in it is run.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not data:
        raise InputError(f"{path}: the file is empty; a pickle of numpy arrays was expected")
    try:
        _check_operations(data)
        return _plain(_Reader(data).load(), len(data))
    except _Refused as error:
        raise InputError(
            f"{path}: refused, because {error}; only numpy arrays of numbers, in a tuple or list, are read from "
            "a pickle. Nothing in the file was run"
        ) from error
    except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, LookupError, EOFError) as error:
        detail = str(error)[:200]
        raise InputError(f"{path}: not a readable pickle of numpy arrays, perhaps damaged ({detail})") from error
    except (OverflowError, MemoryError) as error:
        raise InputError(f"{path}: a damaged pickle: it asks for an impossible size") from error


def read_npy(path: Path) -> np.ndarray:
    """Read one array from a file in numpy's format, never one of Python objects.

    Raises:
        InputError: missing, damaged, or another format.
    """
    try:
        with open(path, "rb") as handle:
            if handle.read(4) == b"PK\3\4":
                raise InputError(f"{path}: expected one array, found an archive of several (.npz)")
            handle.seek(0)
            promised = _array_bytes(handle)
            there = os.fstat(handle.fileno()).st_size - handle.tell()
            if there < promised:
                raise ValueError(f"truncated: {promised} bytes promised, {there} there")
            handle.seek(0)
            return np.lib.format.read_array(handle, allow_pickle=False, max_header_size=_LONGEST_HEADER)
    except InputError:
        raise
    except _NUMPY_ERRORS as error:
        raise InputError(f"{path}: not a readable file of numpy's format ({str(error)[:200]})") from error


def _array_bytes(handle: BinaryIO) -> int:
    """Bytes that the header of a file in numpy's format promises; numpy would make room for them unseen."""
    major, _minor = np.lib.format.read_magic(handle)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _fortran, number_type = read(handle, max_header_size=_LONGEST_HEADER)
    if number_type.itemsize == 0 or any(size < 0 for size in shape):
        raise ValueError("an array without bytes")
    return math.prod(shape) * number_type.itemsize


def read_integers(path: str | os.PathLike) -> np.ndarray:
    """Read a flat list of integers, int64 (n,), from a ``.pkl``, ``.npy`` or ``.txt`` (one a line) file.

    Raises:
        InputError: unreadable, another kind of file, not one-dimensional, or not integers.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        values = read_pickle(path)
    elif path.suffix == ".npy":
        values = read_npy(path)
    elif path.suffix == ".txt":
        values = _read_text(path)
    else:
        raise InputError(f"{path}: expected a .pkl, .npy or .txt file of integers")
    if isinstance(values, list | tuple) and any(isinstance(value, np.ndarray) for value in values):
        raise InputError(f"{path}: expected one flat list of integers, found a {type(values).__name__} of arrays")
    values = np.asarray(values)
    if values.ndim != 1:
        raise InputError(f"{path}: expected a flat list of integers, found an array of shape {values.shape}")
    if len(values) and (values.dtype.kind not in "iu" or values.max() > np.iinfo(np.int64).max):
        raise InputError(f"{path}: expected integers, found {values.dtype} values such as {values[0]}")
    return values.astype(np.int64)


def _read_text(path: Path) -> list[int]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    values = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                if "_" in line or not line.isascii():  # which Python would read
                    raise ValueError
                values.append(int(line))
            except ValueError as error:
                raise InputError(f"{path}: line {number} is {line.strip()[:40]!r}, not an integer") from error
    return values
