"""Weights of vision-language models in the format of Hugging Face's `transformers`."""

import pathlib
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from vla_jax import trees
from vla_jax.backbones import models, safetensors_files
from vla_jax.backbones.safetensors_files import INDEX, SINGLE, Entry
from vla_jax.backbones.tensor_names import Place
from vla_jax.backbones.weights import CONFIG
from vla_jax.files import Path, read_json, replacing, write_json
from vla_jax.nn import lora
from vla_jax.types import Params

_DTYPES = {"torch_dtype", "dtype"}  # names of the same field in versions of transformers
SHARD_BYTES = 5 * 10**9  # limit of a file, as in transformers 4


def to_tensors(config: Any, params: Params) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, by name, as Hugging Face's model reads them.

    Args:
      config: of the model.
      params: of the model; low-rank factors are merged, learned tokens left out.
    """
    return {name: read_tensor(params, place) for name, place in models.places(config).items()}


def read_tensor(params: Params, place: Place) -> np.ndarray:
    """Returns one tensor of a file on the host, with low-rank factors merged."""
    *parents, leaf_name = place.tensor.path.split("/")
    entry: Any = params
    for name in parents:
        entry = entry[name]
    if leaf_name != "kernel" or not lora.is_adapted(entry):
        entry = {leaf_name: entry[leaf_name]}
    if place.layer is not None:
        entry = jax.tree.map(lambda leaf: leaf[place.layer], entry)
    array = place.tensor.order.to_file(np.asarray(lora.merge(entry)[leaf_name]))
    return np.ascontiguousarray(array)


def export(
    folder: Path,
    config: Any,
    params: Params,
    *,
    like: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that Hugging Face's `transformers` loads; complete or not at all.

    The host holds one tensor at a time.

    Args:
      folder: to create; must not exist.
      config: of the model.
      params: of the model; low-rank factors are merged, learned tokens left out.
      like: folder of the original model, whose other files (tokenizer, preprocessing) are copied;
        what its `config.json` has besides ours is kept.
      max_shard_bytes: limit of the tensors of one file; above it there are several, and an index.

    Raises:
      FileExistsError: `folder` exists.
      FileNotFoundError: `like` has no `config.json`.
      ValueError: the limit is below 1, or `like` holds a model of another kind.
    """
    folder = pathlib.Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; choose another name.")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}.")
    original = {} if like is None else read_original(like, config)
    with replacing(folder) as part:
        part.mkdir()
        if like is not None:
            _copy_others(pathlib.Path(like), part)
        write_json(part / CONFIG, _config_json(config, original))
        _write_tensors(part, params, models.places(config), max_shard_bytes)


def read_original(folder: Path, config: Any) -> dict[str, Any]:
    """Returns the `config.json` of the model that a config is of, whatever its sizes.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is damaged, or of a model of another kind.
    """
    file = pathlib.Path(folder) / CONFIG
    data = read_json(file, "the config of a model")
    kind = models.kind_of(data)
    if kind != config.kind:
        raise ValueError(
            f"{file} must be of a '{config.kind}' model, got '{kind}'; give the folder of the "
            "model that was trained."
        )
    return data


def _config_json(config: Any, original: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `config.json` of a config, with what the original one has besides."""
    merged = _merge(original, models.get(config).to_json(config))
    if "torch_dtype" not in merged:
        merged["dtype"] = ""
    return _with_dtype(merged, config.options.param_dtype)


def _merge(original: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our fields over the original ones, section by section; class names stay."""
    merged = dict(original)
    for name, value in ours.items():
        if isinstance(value, Mapping):
            merged[name] = _merge(original.get(name) or {}, value)
        elif name not in ("model_type", "architectures") or original.get(name) is None:
            merged[name] = value
    return merged


def _with_dtype(data: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a config with this dtype wherever it has one."""
    nested = {k: _with_dtype(v, dtype) if isinstance(v, Mapping) else v for k, v in data.items()}
    return nested | dict.fromkeys(_DTYPES & data.keys(), dtype)


def _write_tensors(
    folder: pathlib.Path, params: Params, places: Mapping[str, Place], max_bytes: int
) -> None:
    leaves = trees.leaves_by_path(params)
    entries = [
        Entry(name, np.dtype(leaves[place.tensor.path].dtype), place.shape)
        for name, place in places.items()
    ]
    shards = _shards(entries, max_bytes)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {
            entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard
        }
        total = sum(entry.num_bytes for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, shard in zip(files, shards, strict=True):
        read = partial(_read_by_name, params, places)
        safetensors_files.write(folder / file, shard, read)


def _read_by_name(params: Params, places: Mapping[str, Place], name: str) -> np.ndarray:
    return read_tensor(params, places[name])


def _shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Returns the entries in groups of at most `max_bytes`, or of one entry that is larger."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def _copy_others(source: pathlib.Path, target: pathlib.Path) -> None:
    for file in sorted(source.iterdir()):
        is_weights = ".safetensors" in file.name or file.suffix in (".bin", ".pt", ".pth", ".h5")
        is_index = file.name.endswith(".index.json")
        if file.is_file() and not is_weights and not is_index and file.name != CONFIG:
            shutil.copyfile(file, target / file.name)
