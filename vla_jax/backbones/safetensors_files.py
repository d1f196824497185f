"""Tensors of one or many `*.safetensors` files, read one at a time without keeping them in memory.

The header is checked by the `safetensors` library. Tensors are then mapped one by one instead of
through its open file, whose pages would all count as resident memory until it is closed.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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


class Entry(NamedTuple):
    """Tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor, bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def find(folder: Path) -> dict[str, StoredTensor]:
    """Returns name -> place of every tensor in a model's folder.

    The files are those of `model.safetensors.index.json`, else `model.safetensors`.

    Raises:
      FileNotFoundError: the folder, its weights, or a file that the index names is missing.
      ValueError: a file is truncated or damaged, or lacks a tensor that the index places there.
    """
    folder = pathlib.Path(folder)
    if (folder / INDEX).is_file():
        return _find_by_index(folder)
    if not (folder / SINGLE).is_file():
        raise FileNotFoundError(
            f"{folder} must contain {SINGLE} or {INDEX}, found neither; download the complete "
            "model, in safetensors format."
        )
    return tensors_of_file(folder / SINGLE)


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


def write(path: pathlib.Path, entries: Sequence[Entry], read: Callable[[str], np.ndarray]) -> None:
    """Writes a file tensor by tensor, so that the host holds one at a time.

    Args:
      path: of the file.
      entries: tensors of the file, in order.
      read: name -> array, of the dtype and shape of its entry.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dtype, shape in entries:
        stop = start + Entry(name, dtype, shape).num_bytes
        header[name] = {
            "dtype": names[dtype], "shape": list(shape), "data_offsets": [start, stop]
        }  # fmt: skip
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            array = np.ascontiguousarray(read(entry.name), entry.dtype)
            file.write(array.reshape(-1).view(np.uint8).data)  # `tofile` hides why it failed


def _find_by_index(folder: pathlib.Path) -> dict[str, StoredTensor]:
    index = read_json(folder / INDEX, "the index of a model's weights").get("weight_map")
    if not isinstance(index, Mapping) or not all(isinstance(f, str) for f in index.values()):
        raise ValueError(
            f"{folder / INDEX} must have a dict 'weight_map' from names to files; download it "
            "again."
        )
    files, names = {}, {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted(set(index.values())):
        if name not in names:
            raise FileNotFoundError(
                f"{folder / name} is missing, which {INDEX} names; download the complete model."
            )
        files[name] = tensors_of_file(folder / name)
    for name, file in index.items():
        if name not in files[file]:
            raise ValueError(
                f"{folder / file} lacks the tensor {name}, which {INDEX} places there; download "
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
