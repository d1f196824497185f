"""Weights of vision-language models: from a Hugging Face folder to params on the devices."""

import dataclasses
import math
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from vla_jax import trees
from vla_jax.backbones import (
    image_settings,
    models,
    safetensors_files,
    vlm,
    vlm_params,
    weight_report,
)
from vla_jax.backbones.image_settings import Preprocessing
from vla_jax.backbones.safetensors_files import StoredTensor
from vla_jax.backbones.tensor_names import Shape, Tensor
from vla_jax.backbones.vlm import VisionLanguageModel
from vla_jax.files import Path, read_json
from vla_jax.types import Params

Index = tuple[tuple[int, int], ...]  # (start, stop) of a slice along each axis
CONFIG = "config.json"


def is_model_folder(path: Path) -> bool:
    """Returns True if `path` is a model's folder: it has a `config.json` with a `model_type`."""
    file = pathlib.Path(path) / CONFIG
    return (
        bool(path) and file.is_file() and "model_type" in read_json(file, "the config of a model")
    )


def load_config(folder: Path, *, options: Any = None) -> Any:
    """Returns the config of a model's folder.

    Resampling and normalisation of images are those of its `preprocessor_config.json` or
    `processor_config.json`, if there is one.

    Args:
      folder: with `config.json`.
      options: `VLMOptions` of the policy; None = the model's defaults. Its `tokenizer` is set to
        the folder's `tokenizer.json`.

    Raises:
      FileNotFoundError: the folder or its `config.json` is missing.
      ValueError: the model, or a field of its files, is not supported.
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
    config = _with_images(config, folder)
    options = config.options if options is None else options
    tokenizer = str(pathlib.Path(folder) / vlm.TOKENIZER)
    return dataclasses.replace(config, options=dataclasses.replace(options, tokenizer=tokenizer))


def _with_images(config: Any, folder: Path) -> Any:
    """Returns the config with the settings of the folder's image processor.

    Raises:
      ValueError: a file is damaged, or has sizes that the model cannot take.
    """
    if not image_settings.has_settings(folder):
        return config
    model = models.get(config)
    settings = model.read_images(folder)
    for name, expected in model.image_sizes(config).items():
        found = getattr(settings, name)
        if found != expected:
            raise ValueError(
                f"{folder}: {name} of the image processor must be {expected} for the model in "
                f"{CONFIG}, got {found}; restore both files, or delete preprocessor_config.json."
            )
    images = Preprocessing(settings.resampling, settings.mean, settings.std)
    return dataclasses.replace(config, images=images)


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
    stored = weight_report.rename_all(model, safetensors_files.find(folder), folder)
    config = _tie_missing_head(model, config, stored)
    shapes, tensors = model.shapes(config), model.tensors(config)
    weight_report.check(model, folder, stored, models.places(config))
    expected = jax.eval_shape(lambda: _zeros(shapes))
    shardings = {
        path: _sharding(path, leaf.shape, mesh)
        for path, leaf in trees.leaves_by_path(expected).items()
    }
    dtype = np.dtype(config.options.param_dtype)
    tensor_by_path = {tensor.path: tensor for tensor in tensors}

    def read(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        read_slice = partial(_slice, tensor_by_path[path], stored, dtype)
        return _place_slices(leaf.shape, shardings[path], read_slice)

    leaves = [read(path, leaf) for path, leaf in trees.leaves_by_path(expected).items()]
    names = [tensor_by_path[path].name for path in trees.leaves_by_path(expected)]
    _warn_if_not_finite(dict(zip(names, leaves, strict=True)), folder)
    params = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    key = jax.random.key(0) if key is None else key
    return config, vlm_params.complete(key, params, config)


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _warn_if_not_finite(arrays: Mapping[str, jax.Array], folder: Path) -> None:
    """Warns of tensors with NaN or infinity, in what this process has of them."""
    bad = [
        name
        for name, array in arrays.items()
        if not all(_all_finite(shard.data) for shard in array.addressable_shards)
    ]
    if bad:
        warnings.warn(
            f"{folder}: tensors with NaN or infinity ({len(bad)}), the first is {bad[0]}; "
            "download the model again",
            stacklevel=3,
        )


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


def _sharding(path: str, shape: Shape, mesh: Any) -> jax.sharding.Sharding:
    """Returns the devices of a param, by the rules of the models.

    Raises:
      ValueError: a dimension that is split is not divisible.
    """
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    rules = tuple((p, spec) for glob, spec in vlm.SHARDING_RULES for p in (glob, f"*/{glob}"))
    sharding = NamedSharding(mesh, trees.lookup(path, rules, PartitionSpec()))
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"{path} of shape {list(shape)} cannot be sharded by {sharding.spec} on a mesh "
            f"{dict(mesh.shape)}; choose a size of the mesh that divides it."
        ) from error
    return sharding


def _place_slices(
    shape: Shape, sharding: jax.sharding.Sharding, read_slice: Callable[[Index], np.ndarray]
) -> jax.Array:
    """Returns a param on its devices; the host holds one slice at a time."""
    devices: dict[Index, list[Any]] = {}
    for device, slices in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(_bounds(slices or (), shape), []).append(device)
    arrays = []
    for bounds, group in devices.items():
        part = read_slice(bounds)
        arrays += [jax.device_put(part, device) for device in group]
        jax.block_until_ready(arrays)
        del part  # its memory is free, or that of the device, before the next slice is read
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _bounds(slices: Sequence[slice], shape: Shape) -> Index:
    parts = (part.indices(size) for part, size in zip(slices, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in parts)


def _slice(
    tensor: Tensor,
    stored: Mapping[str, StoredTensor],
    dtype: np.dtype,
    bounds: Index,
) -> np.ndarray:
    """Returns a slice of a param, read from the file layer by layer."""
    result = _empty([stop - start for start, stop in bounds], dtype)
    index = tuple(slice(*pair) for pair in bounds)
    if "{}" not in tensor.name:
        result[...] = tensor.order.to_params(stored[tensor.name].open())[index]
        return result
    for row, number in enumerate(range(*bounds[0])):
        layer = tensor.order.to_params(stored[tensor.name.format(number)].open())
        result[row] = layer[index[1:]]
    return result


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array aligned to 64 bytes, whose memory a CPU device takes over uncopied."""
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(num_bytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)
