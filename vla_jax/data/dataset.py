"""The data set record: numeric columns in memory, images as arrays or read on demand.

The frames of all episodes are concatenated along the axis `F`; `episode_ends` marks the end of
each episode. The numbers of a robot data set fit in memory; images may stay on disk, as memory
maps or as videos. Actions follow the library's convention: gripper +1 open, -1 closed.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from vla_jax.actions.action_layout import ActionLayout

CAMERAS = ("image_primary", "image_wrist")
COLUMNS = ("proprio", "environment_state", "action")
# column [F, 1], 0 where a frame has no action, as in a video that is shown before the task
ACTION_MASK = "action_mask"
OnBad = Literal["error", "skip"]


class Frames(Protocol):
    """Images `[F, h, w, 3]` uint8 of one camera: an array or an object indexed like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(F, h, w, 3)."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Always uint8."""
        ...

    def __len__(self) -> int:
        """Returns F."""
        ...

    def __getitem__(self, index: Any, /) -> np.ndarray:
        """Returns the images at an integer, a slice, or an array of integers `[...]`."""
        ...


class Episode(NamedTuple):
    """One demonstration of `T` steps."""

    observation: Mapping[str, np.ndarray]  # field name of Observation -> [T, ...], images uint8
    action: np.ndarray  # [T, A] float32, gripper (last) +1 open / -1 closed
    instruction: str  # task as a sentence
    # [T] bool, False where the robot only watches, so that there is no action; None = all True
    action_mask: np.ndarray | None = None


class Dataset(NamedTuple):
    """Concatenated episodes; `F` frames, `E` episodes."""

    columns: Mapping[
        str, np.ndarray
    ]  # proprio [F, P], environment_state [F, E], action [F, A], ...
    frames: Mapping[str, Frames]  # camera -> [F, h, w, 3] uint8
    episode_ends: np.ndarray  # [E] int64, exclusive
    instructions: tuple[str, ...]  # all texts of the data set, each once, sorted
    instruction_index: np.ndarray  # [F] int32 into `instructions`
    fps: float  # frames per second, Hz
    fingerprint: str  # hash of the content
    names: Mapping[str, tuple[str, ...]]  # column -> name of each dimension, where known
    action_layout: ActionLayout  # order and range of the actions on disk


def from_episodes(
    episodes: Iterable[Episode],
    *,
    fps: float,
    names: Mapping[str, Sequence[str]] | None = None,
    on_bad: OnBad = "error",
) -> Dataset:
    """Builds a data set in memory from episode records.

    Args:
      episodes: records with the same fields, each with at least one step.
      fps: steps per second, Hz.
      names: column -> name of each dimension.
      on_bad: treatment of episodes with NaN or infinity: "error" raises, "skip" leaves them
        out.

    Returns:
      The data set; its arrays are copies.

    Raises:
      ValueError: no episodes; episodes with different fields or sizes; NaN or infinity.
    """
    episodes = list(episodes)
    if not episodes:
        raise ValueError("episodes must hold at least one episode, got none; record some first.")
    for index, episode in enumerate(episodes):
        check_episode(episode, index, like=episodes[0])
    ends = np.cumsum([len(episode.action) for episode in episodes])
    fields = episodes[0].observation.keys()
    columns = {name: _stack(episodes, name) for name in fields if name in COLUMNS}
    columns["action"] = np.concatenate([e.action for e in episodes]).astype(np.float32)
    masks = [e.action_mask for e in episodes if e.action_mask is not None]
    if masks:
        columns[ACTION_MASK] = np.concatenate(masks).astype(np.float32)[:, None]
    keep = finite_episodes(columns, ends, on_bad=on_bad)
    rows = episode_rows(ends, keep)
    columns = {name: column[rows] for name, column in columns.items()}
    frames = {name: _stack(episodes, name)[rows] for name in fields if is_camera(name)}
    lengths = np.diff(ends, prepend=0)[keep]
    texts = tuple(episodes[index].instruction for index in keep)
    instructions, index = sort_texts(texts, np.repeat(np.arange(len(texts)), lengths))
    dim = columns["action"].shape[1]
    return Dataset(
        columns=columns,
        frames=frames,
        episode_ends=np.cumsum(lengths),
        instructions=instructions,
        instruction_index=index,
        fps=float(fps),
        fingerprint=digest(columns, frames, lengths, texts, fps),
        names={key: tuple(value) for key, value in (names or {}).items()},
        action_layout=ActionLayout(dim, (dim - 1,)),
    )


def is_camera(name: str) -> bool:
    """Returns True for a field of images: image_primary, image_wrist, image_<name>."""
    return name.startswith("image_")


def sort_texts(texts: Sequence[str], index: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the texts that occur, sorted and each once, and the index into them.

    Args:
      texts: any texts.
      index: `[F]` into `texts`.

    Returns:
      Texts, and index `[F]` int32 into them.
    """
    used = np.unique(index)
    ordered = sorted({texts[int(number)] for number in used})
    place = {text: number for number, text in enumerate(ordered)}
    lookup = np.zeros(len(texts), np.int32)
    lookup[used] = [place[texts[int(number)]] for number in used]
    return tuple(ordered), lookup[index]


def episode_instructions(dataset: Dataset) -> tuple[str, ...]:
    """Returns the instruction at the first step of every episode."""
    first = dataset.instruction_index[episode_starts(dataset.episode_ends)]
    return tuple(dataset.instructions[index] for index in first)


def instruction_starts(dataset: Dataset) -> np.ndarray:
    """Returns `[F]` bool, True where an episode starts or its instruction changes."""
    starts = np.diff(dataset.instruction_index, prepend=-1) != 0
    starts[episode_starts(dataset.episode_ends)] = True
    return starts


def episode_starts(episode_ends: np.ndarray) -> np.ndarray:
    """Returns the first frame of every episode `[E]`."""
    return np.concatenate([[0], episode_ends[:-1]]).astype(np.int64)


def check_episode(episode: Episode, index: int, *, like: Episode) -> None:
    """Checks that an episode can be part of a data set.

    Args:
      episode: the record to check.
      index: its index, for the message.
      like: an episode with the expected fields and sizes.

    Raises:
      ValueError: no steps; an unknown field; fields, lengths or sizes that differ from `like`;
        images that are not uint8 `[T, h, w, 3]`.
    """
    steps, expected = _fields(episode), _fields(like)
    if steps.keys() != expected.keys():
        raise ValueError(
            f"episode {index} must have the fields {sorted(expected)} of the first episode, "
            f"got {sorted(steps)}; record every episode with the same sensors."
        )
    for name, value in steps.items():
        if name in episode.observation and name not in COLUMNS and not is_camera(name):
            raise ValueError(
                f"observation field must be one of {COLUMNS[:2]} or image_<camera>, got {name!r} "
                f"in episode {index}; rename it."
            )
        if is_camera(name) and (value.dtype != np.uint8 or value.ndim != 4 or value.shape[3] != 3):
            raise ValueError(
                f"{name} must be uint8 [T, h, w, 3], got {value.dtype} {value.shape} in episode "
                f"{index}; convert the images first."
            )
        shape = (len(episode.action), *expected[name].shape[1:])
        if value.shape != shape or not shape[0]:
            raise ValueError(
                f"{name} of episode {index} must have shape {shape} with at least one step, "
                f"got {value.shape}; give every field one row per action and one size for all."
            )


def finite_episodes(
    columns: Mapping[str, np.ndarray], episode_ends: np.ndarray, *, on_bad: OnBad = "error"
) -> np.ndarray:
    """Returns the indices of the episodes whose numbers are all finite.

    Args:
      columns: name -> `[F, D]`.
      episode_ends: `[E]`, exclusive.
      on_bad: "error" raises if there is NaN or infinity, "skip" leaves those episodes out
        and issues one warning with their number.

    Returns:
      Episode indices, ascending.

    Raises:
      ValueError: NaN or infinity where `on_bad` is "error"; no episode is left.
    """
    bad: set[int] = set()
    for name, column in columns.items():
        frames = np.flatnonzero(~np.isfinite(column).all(axis=1))
        owners = np.searchsorted(episode_ends, frames, side="right")
        if len(frames) and on_bad == "error":
            step = frames[0] - episode_starts(episode_ends)[owners[0]]
            raise ValueError(
                f"{name} must be finite, got NaN or infinity in episode {owners[0]} at step "
                f'{step}; repair the data or read it with on_bad="skip".'
            )
        bad.update(owners.tolist())
    if len(bad) == len(episode_ends):
        raise ValueError("every episode holds NaN or infinity; repair the data.")
    if bad:
        warnings.warn(
            f"left out {len(bad)} of {len(episode_ends)} episodes with NaN or infinity: "
            f"{sorted(bad)[:8]}",
            stacklevel=2,
        )
    return np.array([e for e in range(len(episode_ends)) if e not in bad], np.int64)


def episode_rows(episode_ends: np.ndarray, episodes: np.ndarray) -> np.ndarray | slice:
    """Returns the frames of the given ascending episodes; a slice if these are all episodes."""
    if len(episodes) == len(episode_ends):
        return slice(None)
    episode_mask = np.isin(np.arange(len(episode_ends)), episodes)
    return np.flatnonzero(np.repeat(episode_mask, np.diff(episode_ends, prepend=0)))


def digest(*parts: object) -> str:
    """Returns a hash of arrays, mappings, texts and numbers: 16 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Mapping):
            part = digest(*(item for key in sorted(part) for item in (key, part[key])))
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype.str}{part.shape}".encode())
            # bytes: bfloat16 has no buffer format
            state.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            state.update(repr(part).encode())
    return state.hexdigest()[:16]


def _fields(episode: Episode) -> dict[str, np.ndarray]:
    fields = {**episode.observation, "action": episode.action}
    return fields if episode.action_mask is None else {**fields, ACTION_MASK: episode.action_mask}


def _stack(episodes: Sequence[Episode], name: str) -> np.ndarray:
    stacked = np.concatenate([episode.observation[name] for episode in episodes])
    return stacked if is_camera(name) else stacked.astype(np.float32)
