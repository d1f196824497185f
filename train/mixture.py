"""Windows of one data set or of a mixture of several, as a training reads them.

A mixture is a JSON file; relative paths begin at its folder:

    {"datasets": [
      {"name": "bridge", "weight": 2, "path": "bridge/1.0.0", "cameras": ["primary=image_0"]},
      {"name": "so100", "weight": 1, "path": "so100", "expected_fps": 30}
    ]}

Each entry has the fields of `DatasetConfig`, a name and a weight; entries without `cache_bytes`
share those of `--dataset.cache-bytes` equally. Every data set is normalised with
its own statistics. The policy has the largest `action_dim` and `proprio_dim` of them; cameras and
numbers that a robot lacks are masked.
"""

import pathlib
import re
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

from train.cache import frame_tokens
from train.configs import ImitateConfig
from train.setup import check_action_dim, compute_norm_stats, make_windows, read_dataset
from vla_jax import config as configs
from vla_jax.actions.action_layout import ActionLayout
from vla_jax.data.loader import WindowSource
from vla_jax.data.mixing import Mixed
from vla_jax.data.normalize import NormStats
from vla_jax.data.packing import Packed
from vla_jax.data.readers import reader
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.windows import Windows
from vla_jax.files import read_json
from vla_jax.types import Batch

NAME = re.compile(r"\w[\w.-]*")  # of a part: it names a file of the run


class MixturePart(NamedTuple):
    """One data set of a mixture."""

    name: str
    weight: float  # share of the batches, on any scale
    dataset: DatasetConfig


class TrainingInputs(NamedTuple):
    """Data of a training: batches to draw from, statistics, an example to plot."""

    source: WindowSource  # windows, or rows of packed episodes
    norm_stats: dict[str, NormStats]  # of the robot that acts: that of the first data set
    part_stats: dict[str, dict[str, NormStats]]  # of every data set of a mixture; else empty
    example: Batch  # one window `[1, W, ...]`, to plot
    action_names: tuple[str, ...]  # of that window; () if unknown
    fps: float  # of that window, Hz
    action_layout: ActionLayout  # of the robot that acts
    frozen_params: pathlib.Path | None  # folder of a frozen backbone's params, in the cache


class _Part(NamedTuple):
    windows: Windows
    norm_stats: dict[str, NormStats]
    frozen_params: pathlib.Path | None


def read_training_inputs(config: ImitateConfig) -> TrainingInputs:
    """Reads all data, and encodes them once if the backbone is frozen.

    Raises:
      ValueError: the data sets do not fit the policy, or each other; see `read_dataset`.
    """
    parts = read_mixture(config)
    if not parts:
        part = _read_part(config, config.dataset, partial=False)
        source: Any = Packed(part.windows) if config.pack else part.windows
        example = part.windows[[len(part.windows) - 1]]
        return _training_inputs(config, source, example, [part], {})
    read = [_read_part(config, each.dataset, partial=True) for each in parts]
    windows = {each.name: part.windows for each, part in zip(parts, read, strict=True)}
    weights = [each.weight for each in parts]
    rates = {name: part.dataset.fps for name, part in windows.items()}
    if len(set(rates.values())) > 1:
        warnings.warn(
            f"the data sets of {config.mixture} have different rates in Hz, {rates}: the steps of "
            "a window and of an action chunk span different times.",
            stacklevel=2,
        )
    mixed = Mixed(windows, weights)
    example = mixed[[mixed.sizes[0] - 1]]
    if config.pack:
        mixed = Mixed({name: Packed(part) for name, part in windows.items()}, weights)
    stats = {each.name: part.norm_stats for each, part in zip(parts, read, strict=True)}
    return _training_inputs(config, mixed, example, read, stats)


def read_mixture(config: ImitateConfig) -> list[MixturePart]:
    """Returns the data sets of the config's mixture; none if it has no mixture.

    Raises:
      FileNotFoundError: the file or one of the data sets is missing.
      ValueError: the file is no mixture, or no reader recognises a data set.
    """
    if not config.mixture:
        return []
    if config.frozen_backbone:
        raise ValueError(
            f"mixture must be empty with frozen_backbone, got {config.mixture}; train one data set "
            'on cached tokens, or freeze the backbone with --freeze "backbone/*".'
        )
    path = pathlib.Path(config.mixture)
    entries = read_json(path, "a mixture of data sets").get("datasets")
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ValueError(
            f"datasets in {path} must be a list of objects with path, name and weight, got "
            f"{type(entries).__name__}."
        )
    share = {"cache_bytes": config.dataset.cache_bytes // max(len(entries), 1)}
    parts = [_read_entry(path, number, share | entry) for number, entry in enumerate(entries)]
    names = [part.name for part in parts]
    if not parts or len(set(names)) < len(names) or not all(map(NAME.fullmatch, names)):
        raise ValueError(
            f"datasets in {path} must be at least one, with different names of letters, digits, "
            f"'-', '_' and '.', got {names}."
        )
    for part in parts:
        reader.find_reader(part.dataset)
    return parts


def _read_entry(path: pathlib.Path, number: int, entry: dict[str, Any]) -> MixturePart:
    fields = dict(entry)
    name, weight = str(fields.pop("name", number)), fields.pop("weight", 1)
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


def _read_part(config: ImitateConfig, dataset: DatasetConfig, *, partial: bool) -> _Part:
    """Reads one data set; `partial` ones may lack cameras and numbers that the policy has."""
    config = replace(config, dataset=dataset)
    data = read_dataset(config, partial=partial)
    norm_stats = compute_norm_stats(config, data)
    cached = frame_tokens(config, data, norm_stats) if config.frozen_backbone else None
    decoder = config.agent.policy.decoder
    windows = make_windows(
        config,
        data,
        norm_stats,
        window_size=decoder.window_size,
        action_horizon=decoder.action_horizon,
        stride=config.stride,
        tokens=cached.tokens if cached else None,
    )
    return _Part(windows, norm_stats, cached.params_folder if cached else None)


def _training_inputs(
    config: ImitateConfig,
    source: WindowSource,
    example: Batch,
    parts: list[_Part],
    part_stats: dict[str, dict[str, NormStats]],
) -> TrainingInputs:
    first = parts[0]
    check_action_dim(config, example.action.shape[-1])
    data = first.windows.dataset
    return TrainingInputs(
        source=source,
        norm_stats=first.norm_stats,
        part_stats=part_stats,
        example=example,
        action_names=() if part_stats else tuple(data.names.get("action", ())),
        fps=data.fps,
        action_layout=data.action_layout,
        frozen_params=first.frozen_params,
    )
