"""The data sets that a training reads: one, or those of a mixture, which is a JSON file.

Relative paths begin at the folder of the file:

    {"datasets": [
      {"name": "bridge", "weight": 2, "path": "bridge/1.0.0", "cameras": ["primary=image_0"]},
      {"name": "so100", "weight": 1, "path": "so100", "expected_fps": 30}
    ]}

Each entry has the fields of `DatasetConfig`, a name and a weight; entries without `cache_bytes`
share those of `--dataset.cache-bytes` equally.
"""

import pathlib
import re
from dataclasses import replace
from typing import Any, NamedTuple

from vla_jax import config as configs
from vla_jax.data.readers import reader
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.files import read_json

NAME = re.compile(r"\w[\w.-]*")  # of a part: it names a file of the run


class MixturePart(NamedTuple):
    """One data set of a mixture."""

    name: str
    weight: float  # share of the batches, on any scale
    dataset: DatasetConfig


def read_mixture(file: str, dataset: DatasetConfig) -> list[MixturePart]:
    """Returns the data sets to read, without reading their data.

    Args:
      file: of the mixture; "" = only one data set, which is then the one part, named "".
      dataset: that data set; its `cache_bytes` are shared by the parts of a mixture.

    Raises:
      FileNotFoundError: the file or one of the data sets is missing.
      ValueError: the file is no mixture, or no reader recognises a data set.
    """
    parts = _read_file(pathlib.Path(file), dataset) if file else [MixturePart("", 1.0, dataset)]
    for part in parts:
        reader.find_reader(part.dataset)
    return parts


def _read_file(path: pathlib.Path, dataset: DatasetConfig) -> list[MixturePart]:
    entries = read_json(path, "a mixture of data sets").get("datasets")
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ValueError(
            f"datasets in {path} must be a list of objects with path, name and weight, got "
            f"{type(entries).__name__}."
        )
    share = {"cache_bytes": dataset.cache_bytes // max(len(entries), 1)}
    parts = [_read_entry(path, number, share | entry) for number, entry in enumerate(entries)]
    names = [part.name for part in parts]
    if not parts or len(set(names)) < len(names) or not all(map(NAME.fullmatch, names)):
        raise ValueError(
            f"datasets in {path} must be at least one, with different names of letters, digits, "
            f"'-', '_' and '.', got {names}."
        )
    return parts


def _read_entry(path: pathlib.Path, number: int, entry: dict[str, Any]) -> MixturePart:
    fields = dict(entry)
    name, weight = fields.pop("name", str(number)), fields.pop("weight", 1)
    if not isinstance(name, str):
        raise ValueError(f"name of data set {number} in {path} must be a text, got {name!r}.")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < float("inf"):
        raise ValueError(f"weight of {name!r} in {path} must be a positive number, got {weight!r}.")
    try:
        dataset = configs.from_dict(DatasetConfig, fields)
    except ValueError as error:
        raise ValueError(f"{name!r} in {path}: {error}") from error
    if "path" not in fields:
        raise ValueError(f"{name!r} in {path} must have the path of a data set, got {entry}.")
    folder = dataset.decoded_dir
    dataset = replace(
        dataset,
        path=str(path.parent / dataset.path),
        decoded_dir=None if folder is None else str(path.parent / folder),
    )
    return MixturePart(name, float(weight), dataset)
