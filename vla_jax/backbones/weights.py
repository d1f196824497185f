"""Weights of vision-language models: from a Hugging Face folder to params, and back.

`load` reads the weights shard by shard onto the devices, `export` writes what `transformers` loads.
"""

import dataclasses
import pathlib
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from safetensors.numpy import save_file

from vla_jax import trees
from vla_jax.backbones import models, safetensors_files, vlm
from vla_jax.backbones.safetensors_files import StoredTensor
from vla_jax.backbones.tensor_names import Tensor
from vla_jax.backbones.vlm import VisionLanguageModel
from vla_jax.files import Path, read_json, replacing, write_json
from vla_jax.nn import lora
from vla_jax.types import Params

CONFIG = "config.json"


class LoadReport(NamedTuple):
    """Names of tensors, after renaming."""

    used: tuple[str, ...]  # tensors of the file that become params
    missing: tuple[str, ...]  # tensors that the model needs and the file lacks
    left_over: tuple[str, ...]  # tensors of the file that the model does not know
    ignored: tuple[str, ...]  # tensors of the file that the model does not need


def is_folder(path: Path) -> bool:
    """Returns True if `path` is a model's folder: it has a `config.json` with a `model_type`."""
    file = pathlib.Path(path) / CONFIG
    return file.is_file() and "model_type" in read_json(file, "the config of a model")


def load_config(folder: Path, *, options: Any = None) -> Any:
    """Returns the config of a model's folder.

    Args:
      folder: with `config.json`.
      options: `VLMOptions` of the policy; None = the model's defaults. Its `tokenizer` is set to
        the folder's `tokenizer.json`.

    Raises:
      FileNotFoundError: the folder or its `config.json` is missing.
      ValueError: the model, or a field of its config, is not supported.
    """
    file = pathlib.Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; give the folder of a model as downloaded from Hugging Face."
        )
    try:
        config = models.from_json(read_json(file, "the config of a model"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    options = config.options if options is None else options
    tokenizer = str(pathlib.Path(folder) / vlm.TOKENIZER)
    return dataclasses.replace(config, options=dataclasses.replace(options, tokenizer=tokenizer))


def load(
    folder: Path,
    *,
    config: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    key: jax.Array | None = None,
) -> tuple[Any, Params]:
    """Returns config and params of a model.

    Every param is read in slices, one device's after the other, so that the host holds one shard of
    one param besides what lies on the devices.

    Args:
      folder: with `config.json` and `*.safetensors`.
      config: from `load_config`, with other options; None = that of the folder.
      mesh: devices over which the params are sharded, by the rules of the model; None = JAX's
        default device.
      key: for the random factors of a low-rank adaptation, consumed; None = `key(0)`.

    Returns:
      The config, and params in `config.options.param_dtype`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or its tensors are not those of the config.
    """
    config = load_config(folder) if config is None else config
    model = models.get(config)
    stored = rename(model, safetensors_files.find(folder))
    config = _tie_missing_head(model, config, stored)
    expected = jax.eval_shape(lambda: _zeros(model.shapes(config)))
    report = compare(model, config, stored)
    _check(folder, report, stored, model.tensors(config), expected)
    dtype = np.dtype(config.options.param_dtype)
    places = {tensor.path: tensor for tensor in model.tensors(config)}

    def read(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        def read_slice(index: Any) -> np.ndarray:
            return _slice(places[path], stored, leaf, index, dtype)

        return jax.make_array_from_callback(leaf.shape, _sharding(path, mesh), read_slice)

    leaves = [read(path, leaf) for path, leaf in trees.leaves_by_path(expected).items()]
    params = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    key = jax.random.key(0) if key is None else key
    return config, vlm.complete(key, params, config)


def rename(
    model: VisionLanguageModel, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Returns the tensors under the names of the model's table, whatever wrote the file."""
    renamed = {}
    for name, tensor in stored.items():
        for pattern, replacement in model.renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def compare(model: VisionLanguageModel, config: Any, stored: Mapping[str, Any]) -> LoadReport:
    """Returns which tensors of a file are used, missing, left over and ignored.

    Args:
      model: the model.
      config: its config.
      stored: tensors from `rename`; only their names are used.
    """
    needed = [
        name for tensor in model.tensors(config) for name in _names(tensor, model.shapes(config))
    ]
    others = [name for name in stored if name not in set(needed)]
    ignored = [n for n in others if any(re.fullmatch(p, n) for p in model.ignored)]
    return LoadReport(
        used=tuple(name for name in needed if name in stored),
        missing=tuple(name for name in needed if name not in stored),
        left_over=tuple(name for name in others if name not in ignored),
        ignored=tuple(ignored),
    )


def to_tensors(config: Any, params: Params) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, by name, as Hugging Face's model reads them.

    Args:
      config: of the model.
      params: of the model; low-rank factors are merged, learned tokens left out.
    """
    leaves = trees.leaves_by_path(lora.merge(params))
    tensors = {}
    for tensor in models.get(config).tensors(config):
        leaf = np.asarray(leaves[tensor.path])
        if "{}" in tensor.name:
            for number, layer in enumerate(leaf):
                tensors[tensor.name.format(number)] = tensor.order.to_file(layer)
        else:
            tensors[tensor.name] = tensor.order.to_file(leaf)
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def export(folder: Path, config: Any, params: Params, *, like: Path | None = None) -> None:
    """Writes a folder that Hugging Face's `transformers` loads; complete or not at all.

    Args:
      folder: to create; must not exist.
      config: of the model.
      params: of the model; low-rank factors are merged, learned tokens left out.
      like: folder of the original model, whose other files (tokenizer, preprocessing) are copied.

    Raises:
      FileExistsError: `folder` exists.
    """
    folder = pathlib.Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; choose another name.")
    dtype = np.dtype(config.options.param_dtype).name
    with replacing(folder) as part:
        part.mkdir()
        if like is not None:
            _copy_others(pathlib.Path(like), part)
        write_json(part / CONFIG, {**models.get(config).to_json(config), "dtype": dtype})
        save_file(to_tensors(config, params), part / "model.safetensors", {"format": "pt"})


def _copy_others(source: pathlib.Path, target: pathlib.Path) -> None:
    for file in sorted(source.iterdir()):
        is_weights = ".safetensors" in file.name or file.suffix in (".bin", ".pt", ".pth")
        if file.is_file() and not is_weights and file.name != CONFIG:
            shutil.copyfile(file, target / file.name)


def _zeros(shapes: Any) -> Params:
    return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def _tie_missing_head(model: VisionLanguageModel, config: Any, stored: Mapping[str, Any]) -> Any:
    """Returns the config with a tied head if only the head of the logits is missing."""
    head = [t for t in model.tensors(config) if t.path == "language/head/kernel"]
    if not head or head[0].name in stored:
        return config
    warnings.warn(
        f"the model has no {head[0].name}, though its config.json says that it is not tied; the "
        "embedding is used for the logits instead",
        stacklevel=3,
    )
    return dataclasses.replace(
        config, language=dataclasses.replace(config.language, tied_head=True)
    )


def _names(tensor: Tensor, shapes: Params) -> Sequence[str]:
    """Returns the names in a file of a param, one for each layer if it is stacked."""
    if "{}" not in tensor.name:
        return [tensor.name]
    leaf: Any = shapes
    for name in tensor.path.split("/"):
        leaf = leaf[name]
    return [tensor.name.format(number) for number in range(leaf[0])]


def _check(
    folder: Path,
    report: LoadReport,
    stored: Mapping[str, StoredTensor],
    tensors: Sequence[Tensor],
    expected: Params,
) -> None:
    """Raises a ValueError for the first difference between a file and the config."""
    for names, problem in (
        (report.missing, "lacks {} of {total} tensors that its config.json needs"),
        (report.left_over, "has {} tensors that its config.json does not describe"),
    ):
        if names:
            total = len(report.used) + len(report.missing)
            raise ValueError(
                f"{folder} {problem.format(len(names), total=total)}: {_abbreviate(names)}; check "
                "that config.json and weights belong to the same, complete model."
            )
    leaves = trees.leaves_by_path(expected)
    for tensor in tensors:
        shape, is_stacked = leaves[tensor.path].shape, "{}" in tensor.name
        expected_shape = tensor.order.file_shape(shape[1:] if is_stacked else shape)
        count = shape[0] if is_stacked else 1
        for name in (tensor.name.format(number) for number in range(count)):
            if stored[name].shape != expected_shape:
                raise ValueError(
                    f"{stored[name].file}: {name} must be {list(expected_shape)} by config.json, "
                    f"got {list(stored[name].shape)}; check that both belong to the same model."
                )


def _abbreviate(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _sharding(path: str, mesh: Any) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    rules = tuple((p, spec) for glob, spec in vlm.SHARDING_RULES for p in (glob, f"*/{glob}"))
    spec = trees.lookup(path, rules, jax.sharding.PartitionSpec())
    return NamedSharding(mesh, spec)


def _slice(
    tensor: Tensor,
    stored: Mapping[str, StoredTensor],
    leaf: jax.ShapeDtypeStruct,
    index: tuple[slice, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """Returns a slice of a param, read from the file layer by layer."""
    bounds = [part.indices(size) for part, size in zip(index, leaf.shape, strict=True)]
    result = np.empty([len(range(*bound)) for bound in bounds], dtype)
    if "{}" not in tensor.name:
        result[...] = tensor.order.to_params(stored[tensor.name].open())[index]
        return result
    for row, number in enumerate(range(*bounds[0])):
        layer = tensor.order.to_params(stored[tensor.name.format(number)].open())
        result[row] = layer[index[1:]]
    return result
