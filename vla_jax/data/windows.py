"""Windows of `W` steps with chunks of `K` actions, cut from a data set by NumPy indexing.

What is kept beside the data set grows with its episodes, not with its frames: windows are found by
the numbers of windows of the episodes, and normalised when they are cut.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vla_jax.config import checked
from vla_jax.data import clipping, normalize
from vla_jax.data.dataset import (
    ACTION_MASK,
    COLUMNS,
    Dataset,
    digest,
    instruction_starts,
)
from vla_jax.data.instruction_table import InstructionTable, Tokenize, instruction_table
from vla_jax.data.shared_arrays import SharedArrays, attach
from vla_jax.data.window_index import window_index
from vla_jax.types import Array, Batch, Tokens, make_observation

ALWAYS = -1  # instruction_steps: the instruction is visible at every step
Scale = Callable[[str, np.ndarray], np.ndarray]


@dataclass(frozen=True)
@checked(instruction_steps=(-1, 2**31 - 1), stride=(1, 2**31 - 1))
class WindowConfig:
    """Sizes of a window and its action chunks."""

    window_size: int = 16  # W, environment steps
    action_horizon: int = 1  # K, actions predicted at each step, environment steps
    stride: int = 1  # environment steps between the ends of consecutive windows
    instruction_steps: int = 1  # initial steps with a visible instruction; -1 = all steps

    def __post_init__(self) -> None:
        """Checks the sizes."""
        least = {"instruction_steps": ALWAYS}
        for name, value in asdict(self).items():
            if value < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, got {value}.")


def cut(
    dataset: Dataset,
    config: WindowConfig,
    episode: np.ndarray | int,
    last: np.ndarray | int,
    *,
    instructions: InstructionTable,
    tokens: Tokens | None = None,
    scale: Scale | None = None,
) -> Batch:
    """Returns the windows that end at step `last` of `episode`.

    Step j of a window is step t = last - W + 1 + j of the episode. Where t < 0 the window is
    padded with the episode's first observation and `timestep_mask` is False. Its target k is
    the action at t + k; `action_mask` is True where step t is real and t + k < T. Targets that
    do not exist are all zeros, gripper included.

    Args:
      dataset: columns and images.
      config: sizes.
      episode: `[...]` episode of each window.
      last: `[...]` last step of each window.
      instructions: from `instruction_table`.
      tokens: cached outputs of the backbone, `[num_frames, N, D]`; images are then left out.
      scale: normalises values of a column, (name, `[..., D]`) -> `[..., D]`; None = not at all.

    Returns:
      A batch with the leading axes of `episode`: none, or `[B]`.
    """
    episode, last = np.asarray(episode), np.asarray(last)
    steps = last[..., None] + np.arange(1 - config.window_size, 1)
    return gather(
        dataset,
        config,
        np.broadcast_to(episode[..., None], steps.shape),
        np.maximum(steps, 0),
        steps >= 0,
        instructions=instructions,
        tokens=tokens,
        scale=scale,
    )


def gather(
    dataset: Dataset,
    config: WindowConfig,
    episode: np.ndarray,
    step: np.ndarray,
    mask: np.ndarray,
    *,
    instructions: InstructionTable,
    tokens: Tokens | None = None,
    scale: Scale | None = None,
) -> Batch:
    """Returns the given steps of episodes as a batch, each with its chunk of K actions.

    Args:
      dataset: columns and images.
      config: sizes.
      episode: `[..., W]` episode of each step.
      step: `[..., W]` index of each step within its episode.
      mask: `[..., W]`, True where the step is real; other steps are arbitrary.
      instructions: from `instruction_table`.
      tokens: cached outputs of the backbone, `[num_frames, N, D]`; images are then left out.
      scale: normalises values of a column, (name, `[..., D]`) -> `[..., D]`; None = not at all.

    Returns:
      A batch with leading axes `[..., W]`; actions that do not exist are all zeros.
    """
    ends = dataset.episode_ends[episode]
    rows = np.where(episode > 0, dataset.episode_ends[episode - 1], 0) + step
    targets = rows[..., None] + np.arange(config.action_horizon)
    action_mask = mask[..., None] & (targets < ends[..., None])
    existing = np.minimum(targets, ends[..., None] - 1)
    if ACTION_MASK in dataset.columns:
        action_mask = action_mask & (take(dataset.columns[ACTION_MASK], existing)[..., 0] > 0.5)
    scale = scale or _unchanged
    action = scale("action", take(dataset.columns["action"], existing))
    action *= action_mask[..., None]
    steps = config.instruction_steps
    visible = (steps == ALWAYS) | (instructions.age(rows) < steps)
    columns = {n: c for n, c in dataset.columns.items() if n in COLUMNS and n != "action"}
    values = {name: scale(name, take(column, rows)) for name, column in columns.items()}
    frames = dataset.frames if tokens is None else {}
    return Batch(
        observation=make_observation(
            values | {name: take(source, rows) for name, source in frames.items()},
            instruction=instructions.ids[np.where(visible, instructions.index[rows], -1)],
        ),
        tokens=None if tokens is None else Tokens(*(take(part, rows) for part in tokens)),
        timestep_mask=mask,
        action=action,
        action_mask=action_mask,
        action_dims=_action_dims(dataset, mask.shape),
    )


def _unchanged(name: str, values: np.ndarray) -> np.ndarray:
    del name
    return values


def _action_dims(dataset: Dataset, lead: tuple[int, ...]) -> np.ndarray | None:
    """Returns `[*lead, A]`, False for the numbers that the robot has not; None if it has all."""
    layout = dataset.action_layout
    if not layout.missing:
        return None
    return np.broadcast_to(~np.isin(np.arange(layout.size), layout.missing), (*lead, layout.size))


def take(source: Any, rows: np.ndarray) -> np.ndarray:
    """Returns `source[rows]` in memory: `[..., W]` rows of an array or of an array on disk."""
    return np.asarray(source[rows])


class Windows:
    """All windows of a data set, normalised: a random-access source for grain.

    `windows[i]` is a `Batch` without the axis `B`; `windows[indices]` with an array of indices
    is the batch of those windows. Nothing changes after construction.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: WindowConfig,
        *,
        tokenize: Tokenize,
        norm_stats: Mapping[str, normalize.NormStats],
        normalization: normalize.NormalizeConfig | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        """Checks the arguments; warns if normalisation clips many values.

        Args:
          dataset: source of the windows.
          config: sizes of the windows.
          tokenize: the backbone's, from an instruction to token ids `[S]` int32.
          norm_stats: statistics of every column, from `compute_norm_stats` or a checkpoint.
          normalization: method of each column; None means the defaults.
          tokens: cached outputs of the backbone, `[num_frames, N, D]` and `[num_frames, N]`,
            arrays, or arrays on disk of `token_files`.

        Raises:
          ValueError: `tokens` have another number of frames; a column has no statistics.
        """
        methods = normalization or normalize.NormalizeConfig()
        frames = int(dataset.episode_ends[-1])
        if tokens is not None and (tokens.tokens.ndim != 3 or len(tokens.tokens) != frames):
            raise ValueError(
                f"tokens must be [{frames}, N, D], one row per frame of the data set, got "
                f"{tokens.tokens.shape}; compute them again for this data set."
            )
        missing = dataset.columns.keys() - norm_stats.keys()
        if missing:
            raise ValueError(
                f"norm_stats must cover {sorted(dataset.columns)}, {sorted(missing)} missing; "
                "compute them with normalize.compute_norm_stats."
            )
        for name, column in dataset.columns.items():
            if name in COLUMNS:
                clipping.warn_if_clipped(name, column, norm_stats[name], methods)
        self.dataset = dataset
        self.norm_stats = dict(norm_stats)
        self.methods = methods
        self.config = config
        self.tokens = tokens
        self.instructions = instruction_table(dataset, tokenize)
        _check_stride(config.stride, dataset.episode_ends)
        self.index = window_index(dataset.episode_ends, config.stride)
        given = dataset.instruction_index[instruction_starts(dataset)]
        self.identity = {
            **_identity(dataset, config, norm_stats, methods, tokens),
            # one row for every text that is given, also if it is given again
            "instructions": digest(self.instructions.ids[given]),
        }

        self._shared = SharedArrays()
        self.sizes = (int(self.index.ends[-1]),)
        self.weights = (1.0,)
        self.names = ()

    def __len__(self) -> int:
        """Returns the number of windows."""
        return self.sizes[0]

    def __getitem__(self, index: Any) -> Batch:
        """Returns the window at an index, or the batch of windows at an array of indices."""
        return cut(
            self.dataset,
            self.config,
            *self.index.place(index),
            instructions=self.instructions,
            tokens=self.tokens,
            scale=self.scale,
        )

    def scale(self, name: str, values: np.ndarray) -> np.ndarray:
        """Returns values `[..., D]` of a column, normalised."""
        return normalize.normalize_field(name, values, self.norm_stats[name], self.methods)

    def __getstate__(self) -> dict[str, Any]:
        """Returns large arrays as file references, so that worker processes share their pages."""
        state = {name: value for name, value in self.__dict__.items() if name != "_shared"}
        return _map_arrays(self._shared.detach, state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Maps the arrays in files."""
        self.__dict__.update({**_map_arrays(attach, state), "_shared": SharedArrays()})


def _map_arrays(function: Callable[[Any], Any], state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of `Windows` with a function applied to what grows with the frames."""
    dataset, instructions = state["dataset"], state["instructions"]
    tokens = state["tokens"]
    return {
        **state,
        "dataset": dataset._replace(
            columns={name: function(column) for name, column in dataset.columns.items()},
            frames={name: function(frames) for name, frames in dataset.frames.items()},
            instruction_index=function(dataset.instruction_index),
        ),
        "instructions": instructions._replace(index=function(instructions.index)),
        "tokens": None if tokens is None else Tokens(*map(function, tokens)),
    }


def _identity(
    dataset: Dataset,
    config: WindowConfig,
    norm_stats: Mapping[str, normalize.NormStats],
    methods: normalize.NormalizeConfig,
    tokens: Tokens | None,
) -> dict[str, Any]:
    """Returns everything that the windows depend on, as flat JSON values."""
    stats = normalize.to_json({name: norm_stats[name] for name in dataset.columns})
    return {
        "dataset": dataset.fingerprint,
        "fields": sorted([*dataset.columns, *dataset.frames]),
        **asdict(config),
        **{f"normalize_{name}": method for name, method in asdict(methods).items()},
        "norm_stats": digest(stats),
        "tokens": None if tokens is None else digest(*(_sample(part) for part in tokens)),
    }


def _sample(array: Array) -> np.ndarray:
    """Returns every 997th row, enough to distinguish two caches."""
    return np.asarray(array[::997])


def _check_stride(stride: int, episode_ends: np.ndarray) -> None:
    """Raises a ValueError if every episode has one window only because of the stride."""
    longest = int(np.diff(episode_ends, prepend=0).max())
    if stride > max(longest, 1):
        raise ValueError(
            f"stride must be at most {longest}, the steps of the longest episode, got {stride}."
        )
