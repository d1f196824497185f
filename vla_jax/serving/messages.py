"""MessagePack codec of the wire: openpi's maps for NumPy arrays, checked before they are built.

An array is the map `{__ndarray__: True, data: bytes in C order, dtype: "<f4", shape: [2]}`, a NumPy
scalar `{__npgeneric__: True, data: number, dtype}`; the keys are bin or str. Nothing that a peer
sends can hold code or pointers: dtypes are those of a list, and a shape must fit its bytes. Arrays
of `msgpack-numpy` (keys `nd`, `kind`), whose object kind is a pickle, are refused.

Needs NumPy and msgpack only, as a client on a robot.

Source: `openpi_client/msgpack_numpy.py` of openpi.
"""

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

DTYPES = frozenset(
    ("|b1", "|u1", "|i1", *(f"<{kind}{size}" for kind in "iu" for size in (2, 4, 8)))
) | {"<f2", "<f4", "<f8"}
_ARRAY, _SCALAR = "__ndarray__", "__npgeneric__"
_MAX_AXES = 8
_MAX_KEYS = 1024  # entries of one map
_MAX_ITEMS = 4096  # items of one list
_MAX_PARTS = 65_536  # entries and items of a message, arrays not counted: bounds what is allocated


class MessageError(ValueError):
    """A message that cannot be decoded; one sentence."""


def pack(message: Any, *, text_keys: bool = False) -> bytes:
    """Returns a message of maps, lists, plain values, NumPy arrays and NumPy scalars as bytes.

    Args:
      message: to encode.
      text_keys: writes the keys of arrays as str, not as bin as openpi does.

    Raises:
      ValueError: the message holds something else, such as an array of objects.
      ImportError: msgpack is missing.
    """
    msgpack = _msgpack()

    def encode(value: Any) -> Any:
        fields = _fields(value)
        return fields if text_keys else {name.encode(): part for name, part in fields.items()}

    try:
        return msgpack.packb(message, default=encode)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"message must hold plain values and arrays: {error}.") from error


def unpack(data: bytes) -> Any:
    """Returns the message in some bytes; arrays are read-only views of them.

    Keys of maps become str. The memory that it takes is bounded by the size of the data.

    Raises:
      MessageError: the data is not such a message, or an array in it is not allowed.
      ImportError: msgpack is missing.
    """
    msgpack, num_parts = _msgpack(), 0

    def count(parts: Any) -> Any:
        nonlocal num_parts
        num_parts += len(parts)
        if num_parts > _MAX_PARTS:
            raise MessageError(
                f"message must have at most {_MAX_PARTS} entries, got more; send numbers as arrays."
            )
        return parts

    def refuse(code: int, content: bytes) -> None:
        raise MessageError(
            f"message must be without extension types, got type {code} of {len(content)} bytes; "
            "send plain values and arrays."
        )

    try:
        return msgpack.unpackb(
            data,
            object_hook=lambda fields: _decode(count(fields)),
            list_hook=count,
            ext_hook=refuse,
            max_map_len=_MAX_KEYS,
            max_array_len=_MAX_ITEMS,
        )
    except MessageError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MessageError(
            f"message must be MessagePack, got {len(data)} bytes that cannot be decoded "
            f"({reason}); use the client's own encoding."
        ) from error


def _fields(value: Any) -> dict[str, Any]:
    """Returns an array or scalar as the fields of a map."""
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"got {type(value).__name__}, expected a number, str, map, list or array")
    dtype = value.dtype.newbyteorder("<")
    is_text = isinstance(value, np.str_)
    if dtype.str not in DTYPES and not is_text:
        raise TypeError(f"got an array of dtype {value.dtype}, expected numbers or booleans")
    if isinstance(value, np.generic):
        return {_SCALAR: True, "data": value.item(), "dtype": dtype.str}
    data = value.astype(dtype, copy=False).tobytes()
    return {_ARRAY: True, "data": data, "dtype": dtype.str, "shape": list(value.shape)}


def _decode(fields: Mapping[Any, Any]) -> Any:
    """Returns a map with str keys, or the array or scalar that it stands for."""
    names = {key.decode() if isinstance(key, bytes) else key: part for key, part in fields.items()}
    if len(names) != len(fields):
        raise MessageError("map must have every key once, got one as bin and as str; send one.")
    if _ARRAY in names:
        return _decode_array(names)
    if _SCALAR in names:
        return _decode_scalar(names)
    if "nd" in names and "data" in names:
        raise MessageError(
            "array must be encoded as openpi does (__ndarray__, data, dtype, shape), got an array "
            "of msgpack-numpy (nd, kind); use openpi_client.msgpack_numpy or vla_jax's client."
        )
    return names


def _decode_array(fields: Mapping[str, Any]) -> np.ndarray:
    dtype, shape, data = (fields.get(name) for name in ("dtype", "shape", "data"))
    _check_dtype(dtype, DTYPES)
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise MessageError(f"shape of an array must be sizes in [0, 2^31), got {_shown(shape)}.")
    if len(shape) > _MAX_AXES:
        raise MessageError(f"array must have at most {_MAX_AXES} axes, got {len(shape)}.")
    if not isinstance(data, bytes):
        raise MessageError(f"data of an array must be bin, got {type(data).__name__}.")
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if expected != len(data):
        raise MessageError(
            f"array of shape {_shown(shape)} and dtype {dtype} must have {_shown(expected)} bytes, "
            f"got {len(data)}."
        )
    if dtype == "|b1":  # other bytes than 0 and 1 would be neither True nor False
        return np.ndarray(shape, np.uint8, data).astype(bool)
    return np.ndarray(shape, dtype, data)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _decode_scalar(fields: Mapping[str, Any]) -> Any:
    dtype, value = fields.get("dtype"), fields.get("data")
    if isinstance(value, str) and isinstance(dtype, str) and dtype.startswith("<U"):
        return value
    _check_dtype(dtype, DTYPES)
    if not isinstance(value, bool | int | float):
        raise MessageError(f"data of a scalar must be a number, got {type(value).__name__}.")
    try:
        with np.errstate(all="raise"):
            return np.dtype(dtype).type(value)
    except (ValueError, ArithmeticError):
        raise MessageError(f"scalar of dtype {dtype} cannot hold {_shown(value)}.") from None


def _check_dtype(dtype: Any, allowed: frozenset[str]) -> None:
    if not isinstance(dtype, str) or dtype not in allowed:
        raise MessageError(
            f"dtype of an array must be one of {', '.join(sorted(allowed))}, got {_shown(dtype)}."
        )


def _shown(value: Any) -> str:
    """Returns a short text of a value that a stranger sent."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _msgpack() -> ModuleType:
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("messages need msgpack; run pip install 'vla-jax[serve]'.") from error
    return msgpack
