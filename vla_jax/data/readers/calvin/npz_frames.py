"""Arrays in `.npy` and `.npz` files, read without pickles and within the size of the file."""

import math
import pathlib
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

HEADER = re.compile(
    r"\{'descr': '(?P<dtype>[<>|=]?[bifuUSO]\d{0,6})', 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,12},? ?)*)\), ?\}\s*"
)
MAX_COMPRESSION = 1100  # a little above deflate's limit of 1032
ERRORS = (
    OSError, ValueError, LookupError, TypeError, RuntimeError, NotImplementedError, EOFError,
    ArithmeticError, MemoryError, AttributeError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


class ArrayType(NamedTuple):
    """Type of one array on disk."""

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool  # first axis fastest

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def frame_types(path: pathlib.Path) -> dict[str, ArrayType]:
    """Returns the types of all arrays in an `.npz` file, from their headers.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged.
    """
    return _with_zip(path, _all_types)


def read_array(path: pathlib.Path, key: str, expected: ArrayType) -> np.ndarray:
    """Returns one array of an `.npz` file.

    Args:
      path: file.
      key: name of the array.
      expected: its type.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged; the array is missing or has another type.
    """
    return _with_zip(path, lambda file: _array(file, path, key, expected))


def read_npy(path: pathlib.Path, max_bytes: int) -> tuple[ArrayType, bytes]:
    """Returns type and bytes of an `.npy` file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged or larger than `max_bytes`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; restore it.")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path} must have at most {max_bytes} bytes, got {path.stat().st_size}.")
    try:
        with open(path, "rb") as file:
            return _header(file), file.read()
    except ERRORS as error:
        raise _damaged(path, error) from error


def to_array(data: bytes, kind: ArrayType) -> np.ndarray:
    """Returns the array whose elements are the given bytes; ValueError if their number differs."""
    if kind.dtype == object or len(data) != kind.num_bytes:
        raise ValueError(f"{kind.num_bytes} bytes of {kind.dtype} expected, got {len(data)}")
    order = "F" if kind.is_fortran else "C"
    return np.frombuffer(data, kind.dtype).reshape(kind.shape, order=order).copy()


def _with_zip(path: pathlib.Path, read: Callable[[zipfile.ZipFile], Any]) -> Any:
    try:
        with zipfile.ZipFile(path) as file:
            return read(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; restore it.") from None
    except _ExplainedError:
        raise
    except ERRORS as error:
        raise _damaged(path, error) from error


class _ExplainedError(ValueError):
    """Error whose message is complete."""


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return ValueError(f"{path} is damaged ({reason}); restore the file from its source.")


def _header(file: Any) -> ArrayType:
    """Reads the header of an array."""
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("no NumPy array")
    size = file.read(2 if start[6] == 1 else 4)
    length = int.from_bytes(size, "little")
    if length > 65536:
        raise ValueError("the header of an array is too long")
    found = HEADER.fullmatch(file.read(length).decode("latin1"))
    if not found:
        raise ValueError("the header of an array is unknown")
    shape = tuple(int(n) for n in re.findall(r"\d+", found["shape"]))
    return ArrayType(np.dtype(found["dtype"]), shape, found["fortran"] == "True")


def _all_types(file: zipfile.ZipFile) -> dict[str, ArrayType]:
    types = {}
    for info in file.infolist():
        if info.filename.endswith(".npy"):
            with file.open(info) as part:
                kind = _header(part)
            _check_size(info, kind)
            types[info.filename.removesuffix(".npy")] = kind
    return types


def _check_size(info: zipfile.ZipInfo, kind: ArrayType) -> None:
    """Checks that an array is no larger than its bytes in the file can be."""
    limit = min(info.file_size, MAX_COMPRESSION * (info.compress_size + 1024))
    if kind.num_bytes > limit:
        raise ValueError(f"{info.filename} has shape {kind.shape}, more than the file holds")


def _array(file: zipfile.ZipFile, path: pathlib.Path, key: str, expected: ArrayType) -> np.ndarray:
    try:
        info = file.getinfo(f"{key}.npy")
    except KeyError:
        raise _ExplainedError(
            f"{path} must hold the array {key!r} as the first frame does; leave the episode out."
        ) from None
    with file.open(info) as part:
        kind = _header(part)
        if kind[:2] != expected[:2]:
            raise _ExplainedError(
                f"{path}: {key} must be {expected.dtype} {expected.shape} as in the first frame, "
                f"got {kind.dtype} {kind.shape}; leave the episode out."
            )
        _check_size(info, kind)
        data = part.read(kind.num_bytes + 1)  # up to the end, so that the CRC is checked
    return to_array(data, kind)
