"""Tensors of one or many `*.safetensors` files, read one at a time without keeping them in memory.

The header is checked by the `safetensors` library. Tensors are then mapped one by one instead of
through its open file, whose pages would all count as resident memory until it is closed.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from vla_jax.files import Path, read_json

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class StoredTensor(NamedTuple):
    """Place of a tensor in a file."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def open(self) -> np.ndarray:
        """Returns the tensor as a read-only memory map, which is closed with the array."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        shape = self.shape or (1,)
        mapped = np.memmap(self.file, self.dtype, "r", self.offset, shape)
        return mapped.reshape(self.shape)


def find(folder: Path) -> dict[str, StoredTensor]:
    """Returns name -> place of every tensor in a model's folder.

    The files are those of `model.safetensors.index.json`, else `model.safetensors`.

    Raises:
      FileNotFoundError: the folder, its weights, or a file that the index names is missing.
      ValueError: a file is truncated or damaged, or lacks a tensor that the index places there.
    """
    folder = pathlib.Path(folder)
    if (folder / _INDEX).is_file():
        return _find_by_index(folder)
    if not (folder / _SINGLE).is_file():
        raise FileNotFoundError(
            f"{folder} must contain {_SINGLE} or {_INDEX}, found neither; download the complete "
            "model, in safetensors format."
        )
    return tensors_of_file(folder / _SINGLE)


def tensors_of_file(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns name -> place of every tensor of one file.

    Raises:
      ValueError: the file is truncated or damaged, or has a dtype that is not supported.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or incomplete ({error}); download it again."
        ) from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: _place(path, 8 + size, name, entry) for name, entry in header.items()}


def total_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    """Returns the number of bytes of all tensors."""
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())


def _find_by_index(folder: pathlib.Path) -> dict[str, StoredTensor]:
    index = read_json(folder / _INDEX, "the index of a model's weights").get("weight_map")
    if not isinstance(index, Mapping) or not all(isinstance(f, str) for f in index.values()):
        raise ValueError(
            f"{folder / _INDEX} must have a dict 'weight_map' from names to files; download it "
            "again."
        )
    files = {}
    for name in sorted(set(index.values())):
        if pathlib.PurePath(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing, which {_INDEX} names; download the complete model."
            )
        files[name] = tensors_of_file(folder / name)
    for name, file in index.items():
        if name not in files[file]:
            raise ValueError(
                f"{folder / file} lacks the tensor {name}, which {_INDEX} places there; download "
                "the model again."
            )
    return {name: files[file][name] for name, file in index.items()}


def _place(path: pathlib.Path, start: int, name: str, entry: Mapping) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(
            f"{path}: tensor {name} has the dtype {entry['dtype']}, which is not supported; "
            "convert the model to bfloat16 or float32."
        )
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    return StoredTensor(path, dtype, shape, start + entry["data_offsets"][0])
