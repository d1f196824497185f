"""Adapters of Hugging Face's `peft`: low-rank factors from its files to params, and back.

The tensors of an adapter are named after the live modules of a model; `renames` and `live_names` of
a `VisionLanguageModel` lead from these to the names in a model's file, and back.
"""

import collections
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vla_jax import trees
from vla_jax.backbones import (
    models,
    peft_settings,
    safetensors_files,
    weight_export,
    weight_report,
)
from vla_jax.backbones.safetensors_files import Entry, StoredTensor
from vla_jax.backbones.tensor_names import Place
from vla_jax.backbones.vlm import VisionLanguageModel
from vla_jax.files import Path, replacing, write_json
from vla_jax.nn import lora
from vla_jax.nn.lora import LoraConfig
from vla_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


class Factors(NamedTuple):
    """Low-rank factors of one linear map."""

    a: np.ndarray  # [in, r]
    b: np.ndarray  # [r, out]
    scale: float  # of the update


def describe(folder: Path, config: Any) -> LoraConfig:
    """Returns the adaptation of a PEFT adapter, without reading its tensors.

    `nn.lora.add` then gives a tree of the shapes that `read_adapter` returns. Rank and alpha are
    those of the map with the largest rank; `read_adapter` gives every map its own scale.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      config: of the model that was adapted.

    Raises:
      FileNotFoundError, ValueError: as for `read_adapter`.
    """
    adapter = _open(pathlib.Path(folder), config)
    if not adapter.pairs:
        return LoraConfig()
    live_names = [live_name for live_name, _ in adapter.pairs.values()]
    largest = max(live_names, key=adapter.settings.rank)
    rank, scale = adapter.settings.rank(largest), adapter.settings.scale(largest)
    paths = dict.fromkeys(adapter.places[name].tensor.path for name in adapter.pairs)
    return LoraConfig(rank, scale * rank, tuple(path.removesuffix("/kernel") for path in paths))


def read_adapter(folder: Path, config: Any, params: Params) -> Params:
    """Returns the params with the low-rank factors of a PEFT adapter, float32.

    All factors have the largest rank R of the adapter: smaller ones are padded with zeros, and the
    layers of a stack that have no adapter get zeros. The gradients of padding are zero.
    `describe` gives the config with which `init` makes the same tree. Dropout is not applied.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      config: of the model that was adapted.
      params: of that model; factors that they have already are removed. Params that the adapter
        stores whole (`modules_to_save`) are replaced.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, has settings that are not supported, or belongs to another
        model.
    """
    adapter = _open(pathlib.Path(folder), config)
    factors: dict[str, dict[int | None, Factors]] = collections.defaultdict(dict)
    for name, (live_name, pair) in adapter.pairs.items():
        place, settings = adapter.places[name], adapter.settings
        found = _read_factors(place, pair, settings.rank(live_name), settings.scale(live_name))
        factors[place.tensor.path][place.layer] = found
    rank = max((f.a.shape[1] for layers in factors.values() for f in layers.values()), default=0)
    params = lora.remove(params)
    for path, layers in factors.items():
        params = _update(params, path.split("/")[:-1], lambda m, ls=layers: _stack(m, ls, rank))
    for name, tensor in adapter.whole.items():
        params = _replace(params, adapter.places[name], tensor)
    return params


def write_adapter(
    folder: Path, config: Any, params: Params, *, modules_to_save: Sequence[str] = ()
) -> None:
    """Writes the low-rank factors as a PEFT adapter; complete or not at all.

    Padding of ranks and layers is removed. `peft` loads the folder on the model that the adapter
    was trained on.

    Args:
      folder: to create; must not exist.
      config: of the model.
      params: of the model, with low-rank factors.
      modules_to_save: path globs of params that are stored whole besides, because they were trained
        too.

    Raises:
      FileExistsError: `folder` exists.
      ValueError: the params have no factors, or a glob matches nothing.
    """
    folder = pathlib.Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; choose another name.")
    model = models.get(config)
    places = models.places(config)
    tensors, settings = {}, []
    for name, place in places.items():
        module = _live_name(model, name).removesuffix(".weight")
        found = _layer_factors(params, place)
        if found is not None:
            a, b = _to_file(place, found)
            tensors |= {
                f"{_PREFIX}{module}.lora_A.weight": a,
                f"{_PREFIX}{module}.lora_B.weight": b,
            }
            settings.append((module, found.a.shape[1], found.scale))
    if not tensors:
        raise ValueError("params must have low-rank factors that are not zero, got none.")
    paths = {place.tensor.path: 0 for place in places.values()}
    trees.check_globs(modules_to_save, paths, name="modules_to_save")
    saved = set()
    for name, place in places.items():
        if trees.matches(place.tensor.path, modules_to_save):
            live_name = _live_name(model, name)
            saved.add(live_name.rpartition(".")[0])
            tensors[_PREFIX + live_name] = weight_export.read_tensor(lora.remove(params), place)
    entries = [Entry(name, array.dtype, array.shape) for name, array in tensors.items()]
    with replacing(folder) as part:
        part.mkdir()
        write_json(part / CONFIG, peft_settings.to_json(settings, sorted(saved)))
        safetensors_files.write(part / WEIGHTS, entries, tensors.__getitem__)


class _Adapter(NamedTuple):
    """An adapter's files: settings, and the tensors by the names of the model's table."""

    settings: peft_settings.Settings
    places: dict[str, Place]  # of the model
    # live name of a map, and its factors by the keys A and B
    pairs: dict[str, tuple[str, dict[str, StoredTensor]]]
    whole: dict[str, StoredTensor]  # stored whole


def _open(folder: pathlib.Path, config: Any) -> _Adapter:
    """Reads settings and names of an adapter; arguments and errors as `read_adapter`."""
    settings = peft_settings.read(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{folder / WEIGHTS} is missing; save the adapter in safetensors format."
        )
    places = models.places(config)
    stored = safetensors_files.tensors_of_file(folder / WEIGHTS)
    return _Adapter(settings, places, *_sort(models.get(config), stored, places, folder))


def _sort(
    model: VisionLanguageModel,
    stored: Mapping[str, StoredTensor],
    places: Mapping[str, Place],
    folder: pathlib.Path,
) -> tuple[dict[str, tuple[str, dict[str, StoredTensor]]], dict[str, StoredTensor]]:
    """Returns the factors, and the tensors stored whole, by the names of the model's table.

    The factors of a map come with its live name, as a dict with the keys A and B.
    """
    pairs: dict[str, tuple[str, dict[str, StoredTensor]]] = {}
    whole = {}
    for name, tensor in stored.items():
        factor = re.fullmatch(r"(?P<module>.*)\.lora_(?P<factor>[AB])\.weight", name)
        live_name = (factor["module"] if factor else name).removeprefix(_PREFIX)
        file_name = weight_report.rename(model, f"{live_name}.weight" if factor else live_name)
        place = places.get(file_name)
        if place is None or (factor and not place.tensor.path.endswith("/kernel")):
            raise ValueError(
                f"{folder / WEIGHTS} has the tensor {name}, which is not of a map that this model "
                "can adapt; check that the adapter belongs to it, and is plain LoRA."
            )
        if factor:
            pairs.setdefault(file_name, (live_name, {}))[1][factor["factor"]] = tensor
        elif tensor.shape != place.shape:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} must be {list(place.shape)} by the config of the "
                f"model, got {list(tensor.shape)}; check that the adapter belongs to it."
            )
        else:
            whole[file_name] = tensor
    for live_name, pair in pairs.values():
        if len(pair) < 2:
            (found,) = pair
            missing = "B" if found == "A" else "A"
            raise ValueError(
                f"{folder / WEIGHTS} has lora_{found} of {live_name}, but not lora_{missing}; save "
                "the adapter again."
            )
    return pairs, whole


def _read_factors(
    place: Place, pair: Mapping[str, StoredTensor], rank: int, scale: float
) -> Factors:
    """Returns the factors of a map; those of a convolution over patches become those of a map."""
    num_outputs, *others = place.shape
    shapes = {"A": (rank, *others), "B": (num_outputs, rank, *(1 for _ in others[1:]))}
    for factor, shape in shapes.items():
        if pair[factor].shape != shape:
            raise ValueError(
                f"{pair[factor].file}: lora_{factor} of {place.tensor.path} must be {list(shape)}, "
                f"got {list(pair[factor].shape)}; check {CONFIG} and that the adapter belongs to "
                "this model."
            )
    a = place.tensor.order.to_params(pair["A"].open().astype(np.float32))
    b = pair["B"].open().astype(np.float32).reshape(num_outputs, rank).T
    return Factors(a, b, scale)


def _to_file(place: Place, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inverse of `_read_factors`: A and B as `peft` stores them."""
    num_outputs, *others = place.shape
    a = place.tensor.order.to_file(factors.a)
    b = factors.b.T.reshape(num_outputs, -1, *(1 for _ in others[1:]))
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)


def _stack(linear_map: Params, layers: Mapping[int | None, Factors], rank: int) -> Params:
    """Returns a linear map with the factors of its layers, padded to a rank."""
    *lead, num_inputs, num_outputs = linear_map["kernel"].shape
    a = np.zeros((*lead, num_inputs, rank), np.float32)
    b = np.zeros((*lead, rank, num_outputs), np.float32)
    scale = np.zeros(lead, np.float32)
    for layer, found in layers.items():
        index = () if layer is None else (layer,)
        a[(*index, slice(None), slice(found.a.shape[1]))] = found.a
        b[(*index, slice(found.b.shape[0]))] = found.b
        scale[index] = found.scale
    factors = {"lora_a": a, "lora_b": b, "lora_scale": scale}
    return {**linear_map, **{name: jnp.asarray(array) for name, array in factors.items()}}


def _layer_factors(params: Params, place: Place) -> Factors | None:
    """Returns the factors of a map without padding; None if it has none or all are zero."""
    linear_map: Any = params
    for name in place.tensor.path.split("/")[:-1]:
        linear_map = linear_map[name]
    if not place.tensor.path.endswith("/kernel") or not lora.is_adapted(linear_map):
        return None
    names = ("lora_a", "lora_b", "lora_scale")
    index = () if place.layer is None else place.layer
    a, b, scale = (np.asarray(linear_map[name][index], np.float32) for name in names)
    used = np.flatnonzero(a.any(axis=0) | b.any(axis=1))
    rank = used[-1] + 1 if len(used) else 0
    return Factors(a[:, :rank], b[:rank], float(scale)) if rank else None


def _live_name(model: VisionLanguageModel, name: str) -> str:
    """Returns the name of a live module's param, from that in the model's table."""
    for pattern, replacement in model.live_names:
        name = re.sub(pattern, replacement, name)
    return name


def _replace(params: Params, place: Place, tensor: StoredTensor) -> Params:
    """Returns the params with one tensor of a file in its place, in the dtype of the param."""
    *parents, leaf_name = place.tensor.path.split("/")
    array = place.tensor.order.to_params(tensor.open())

    def replace(entry: Params) -> Params:
        leaf = jnp.asarray(entry[leaf_name])
        index = () if place.layer is None else place.layer
        return {**entry, leaf_name: leaf.at[index].set(array.astype(leaf.dtype))}

    return _update(params, parents, replace)


def _update(params: Params, names: Sequence[str], function: Any) -> Params:
    """Returns the params with `function` applied to the dict at a path."""
    if not names:
        return function(params)
    first, *others = names
    return {**params, first: _update(params[first], others, function)}
