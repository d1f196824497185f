"""Values of Parquet columns as lerobot's reader returns them: torch's dtypes, without torch."""

import pathlib
from typing import Any, NoReturn

import numpy as np

from vla_jax.data.raw import Feature

MAX_TEXT = 2**30  # bytes of the texts of one episode as a NumPy array


def to_numpy(values: Any, feature: Feature, key: str, path: pathlib.Path) -> np.ndarray:
    """Converts an Arrow array of numbers, texts or (nested) lists.

    Args:
      values: `T` values of a column.
      feature: expected type; sizes of -1 are free.
      key: the column, for messages.
      path: its file, for messages.

    Returns:
      `[T, *feature.shape]` float32, int64, bool or text, as lerobot makes from any float,
      integer, boolean or text.

    Raises:
      ValueError: nulls, lists of different lengths, another type or shape.
    """
    import pyarrow as pa

    length, sizes = len(values), []
    while True:
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        if values.null_count:
            _refuse(key, path, "a value in every row", f"{values.null_count} nulls")
        if not _is_list(values.type):
            break
        sizes.append(_list_size(values, key, path))
        values = values.flatten()
    expected = feature.shape
    if not expected and sizes == [1]:
        sizes = []
    is_same = len(sizes) == len(expected) and all(
        size == wanted or wanted < 0 for size, wanted in zip(sizes, expected, strict=True)
    )
    if length and not is_same:
        wanted = f"values of shape {expected} as meta/info.json states"
        _refuse(key, path, wanted, f"{tuple(sizes)}")
    numbers = _numbers(values, feature.dtype, key, path)
    return numbers.reshape(length, *(sizes if length else [max(size, 0) for size in expected]))


def feature_of(kind: Any, declared: Feature | None) -> Feature | None:
    """Returns the type of an Arrow column, or None if lerobot cannot return it.

    Args:
      kind: Arrow type.
      declared: type in info.json, if it has the column; gives sizes of lists, and names.
    """
    import pyarrow as pa

    sizes = []
    while _is_list(kind) or isinstance(kind, pa.ExtensionType):
        if isinstance(kind, pa.ExtensionType):
            kind = kind.storage_type
            continue
        sizes.append(kind.list_size if pa.types.is_fixed_size_list(kind) else -1)
        kind = kind.value_type
    dtype = _dtype(kind)
    if dtype is None:
        return None
    if declared and sizes == [-1] * len(declared.shape):
        sizes = declared.shape
    if declared and not declared.shape and sizes == [-1]:
        sizes = (1,)
    size = int(np.prod(sizes)) if sizes else 1
    names = declared.names if declared and len(declared.names) == size else ()
    return Feature(dtype, tuple(sizes), names)


def _dtype(kind: Any) -> str | None:
    """Returns the dtype that lerobot makes of an Arrow type."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int64"
    if pa.types.is_floating(kind):
        return "float32"
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return "str" if is_text or pa.types.is_string_view(kind) else None


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _list_size(values: Any, key: str, path: pathlib.Path) -> int:
    """Returns the common length of all lists."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(values.type):
        return values.type.list_size
    lengths = np.unique(values.value_lengths().to_numpy(zero_copy_only=False))
    if len(lengths) > 1:
        wanted = "lists of one length as meta/info.json states"
        _refuse(key, path, wanted, f"lengths {lengths[:5].tolist()}")
    return int(lengths[0]) if len(lengths) else 0


def _numbers(values: Any, dtype: str, key: str, path: pathlib.Path) -> np.ndarray:
    """Returns flat values with a dtype of lerobot's."""
    import pyarrow as pa

    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    stored = _dtype(values.type)
    if stored is None or (stored == "str") != (dtype == "str"):
        _refuse(key, path, f"{dtype} as meta/info.json states", f"the type {values.type}")
    if dtype == "str":
        try:
            texts = values.to_pylist()
        except UnicodeDecodeError as error:
            _refuse(key, path, "texts in UTF-8", str(error))
        if 4 * max(map(len, texts), default=0) * len(texts) > MAX_TEXT:
            _refuse(key, path, f"texts of less than {MAX_TEXT} bytes", "longer ones")
        return np.array(texts, np.str_)
    numbers = values.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore", invalid="ignore"):  # too large for float32: infinity, as torch
        result = numbers.astype(dtype)
    is_exact = dtype.startswith("float") or stored == dtype or np.array_equal(result, numbers)
    if not is_exact:
        _refuse(key, path, f"{dtype} as meta/info.json states", f"other {stored} values")
    return result


def _refuse(key: str, path: pathlib.Path, expected: str, got: str) -> NoReturn:
    raise ValueError(
        f"column {key!r} of {path} must hold {expected}, got {got}; record or convert it again."
    )
