"""Windows of one data set or of a mixture of several, as a training reads them.

Every data set of a mixture is normalised with its own statistics. The policy has the largest
`action_dim` and `proprio_dim` of them; cameras and numbers that a robot lacks are masked. A frozen
backbone encodes the frames of each data set once, for all mixtures that contain it.
"""

import pathlib
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from train.cache import frame_tokens
from train.configs import ImitateConfig
from train.data_parts import DataPart, read_parts
from train.setup import make_windows
from vla_jax.acting.mixture_robots import MixtureRobot
from vla_jax.actions.action_layout import ActionLayout
from vla_jax.data.loader import WindowSource
from vla_jax.data.mixing import Mixed
from vla_jax.data.normalize import NormStats
from vla_jax.data.packing import Packed
from vla_jax.data.windows import Windows
from vla_jax.types import Batch


class TrainingInputs(NamedTuple):
    """Data of a training: batches to draw from, statistics, an example to plot."""

    source: WindowSource  # windows, or rows of packed episodes
    norm_stats: dict[str, NormStats]  # of the robot that acts: that of the first data set
    robots: dict[str, MixtureRobot]  # name -> robot of every data set of a mixture; else empty
    example: Batch  # one window `[1, W, ...]`, to plot
    action_names: tuple[str, ...]  # of that window; () if unknown
    fps: float  # of that window, Hz
    action_layout: ActionLayout  # of the robot that acts
    frozen_params: pathlib.Path | None  # folder of a frozen backbone's params, in the cache


def read_training_inputs(config: ImitateConfig) -> TrainingInputs:
    """Reads all data, and encodes them once if the backbone is frozen.

    Raises:
      ValueError: the data sets do not fit the policy, or each other; see `read_dataset`.
    """
    parts = read_parts(config)
    if config.mixture:
        _warn_of_rates(config, parts)
    cached = [
        frame_tokens(part.config, part.dataset, part.norm_stats) if config.frozen_backbone else None
        for part in parts
    ]
    decoder = config.agent.policy.decoder
    windows = [
        make_windows(
            part.config,
            part.dataset,
            part.norm_stats,
            window_size=decoder.window_size,
            action_horizon=decoder.action_horizon,
            stride=config.stride,
            tokens=tokens.tokens if tokens else None,
        )
        for part, tokens in zip(parts, cached, strict=True)
    ]
    first = parts[0]
    source, example = _source(config, parts, windows)
    names = () if config.mixture else tuple(first.dataset.names.get("action", ()))
    return TrainingInputs(
        source=source,
        norm_stats=first.norm_stats,
        robots={part.name: part.robot for part in parts if config.mixture},
        example=example,
        action_names=names,
        fps=first.dataset.fps,
        action_layout=first.dataset.action_layout,
        frozen_params=cached[0].params_folder if cached[0] else None,
    )


def _source(
    config: ImitateConfig, parts: Sequence[DataPart], windows: Sequence[Windows]
) -> tuple[WindowSource, Batch]:
    """Returns the batches to draw from, and the last window of the first data set."""
    packed = [Packed(each) if config.pack else each for each in windows]
    last = [len(windows[0]) - 1]
    if not config.mixture:
        return packed[0], windows[0][last]
    names, weights = [part.name for part in parts], [part.weight for part in parts]
    whole = Mixed(dict(zip(names, windows, strict=True)), weights)
    source = Mixed(dict(zip(names, packed, strict=True)), weights) if config.pack else whole
    return source, whole[last]


def _warn_of_rates(config: ImitateConfig, parts: Sequence[DataPart]) -> None:
    rates = {part.name: part.dataset.fps for part in parts}
    if len(set(rates.values())) > 1:
        warnings.warn(
            f"the data sets of {config.mixture} have different rates in Hz, {rates}: the steps of "
            "a window and of an action chunk span different times.",
            stacklevel=3,
        )
