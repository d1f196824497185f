"""The `Dataset` for training that is made from the raw view of any format."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from vla_jax.actions import action_layout
from vla_jax.actions.action_layout import ActionLayout
from vla_jax.data.dataset import (
    ACTION_MASK,
    Dataset,
    Frames,
    digest,
    episode_rows,
    finite_episodes,
    sort_texts,
)
from vla_jax.data.frame_cache import FrameCache
from vla_jax.data.raw import RawDataset, RawEpisode
from vla_jax.data.raw_frames import RawFrames, decode_all
from vla_jax.data.readers import fields as field_maps
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.field_columns import field_column, field_names, parse_key
from vla_jax.data.readers.fields import FieldMap
from vla_jax.types import Resampling

RATE_TOLERANCE = 0.1  # relative difference of the usual step from 1 / fps
CHANGE = 0.1  # in units of half the gripper's range: a change of a gripper that is given as such


def make_dataset(
    raw: RawDataset,
    proposed: FieldMap,
    config: DatasetConfig,
    *,
    cameras: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    resampling: Resampling = "area",
    partial: bool = False,
) -> Dataset:
    """Reads the numbers of all episodes, and opens their images.

    Args:
      raw: the data set.
      proposed: fields that its reader proposes; the config can change them.
      config: fields, gripper, frame rate, treatment of bad episodes, decoding of images.
      cameras: image fields to read; None means all that have a key, () means none.
      image_size: (h, w) in pixels to resize to; None keeps the size on disk.
      resampling: how to resize.
      partial: some of the `cameras` may be missing, but not all.

    Returns:
      The data set: arm first, gripper last, +1 open, -1 closed.

    Raises:
      ValueError: missing keys or cameras, another fps, episodes of different sizes, NaN or
        infinity, gripper values that contradict their declaration; damaged files.
      OSError: no space for the decoded images.
    """
    fps = _frame_rate(raw, config)
    fields = field_maps.choose_fields(proposed, raw, config)
    keys = field_maps.choose_cameras(fields, raw, cameras, partial=partial)
    columns, texts, text_index, kept = _read_numbers(raw, fields, config)
    if ACTION_MASK in columns:
        columns["action"] = _fill_actions(columns["action"], columns[ACTION_MASK])
    finite = finite_episodes(columns, np.cumsum(raw.lengths[kept]), on_bad=config.on_bad)
    rows = episode_rows(np.cumsum(raw.lengths[kept]), finite)
    columns = {name: column[rows] for name, column in columns.items()}
    instructions, index = sort_texts(texts, text_index[rows])
    lengths = raw.lengths[kept[finite]]
    dim = columns["action"].shape[1]
    layout = _layout(fields, dim)
    columns["action"] = action_layout.from_robot(columns["action"], layout)
    cache = FrameCache(config.cache_bytes if config.decode == "on_demand" else 0)
    frames = {
        name: RawFrames(
            raw,
            key,
            cache,
            episodes=kept[finite],
            image_size=image_size,
            resampling=resampling,
            rotate=fields.rotate_images,
        )
        for name, key in keys.items()
    }
    images = {name: each.fingerprint for name, each in frames.items()}
    return Dataset(
        columns=columns,
        frames={name: _open(images, name, raw, config) for name, images in frames.items()},
        episode_ends=np.cumsum(lengths),
        instructions=instructions,
        instruction_index=index,
        fps=fps,
        fingerprint=digest(columns, lengths, instructions, index, images, fps),
        names=_dimension_names(raw, fields, layout),
        action_layout=layout,
    )


def _open(images: RawFrames, name: str, raw: RawDataset, config: DatasetConfig) -> Frames:
    if config.decode == "on_demand":
        return images
    return decode_all(images, name, raw.path, config.decoded_dir)


def _frame_rate(raw: RawDataset, config: DatasetConfig) -> float:
    """Returns the frame rate in Hz, of the data set or else of the config."""
    if raw.fps is None and config.expected_fps is None:
        raise ValueError(
            f"{raw.path} does not state its frame rate; give it with --dataset.expected-fps HZ."
        )
    if raw.fps is None or config.expected_fps is None:
        return float(raw.fps or config.expected_fps or 0.0)
    if not np.isclose(raw.fps, config.expected_fps):
        raise ValueError(
            f"fps of {raw.path} must be {config.expected_fps:g} Hz (expected_fps), got "
            f"{raw.fps:g} Hz; set expected_fps to the rate of the data or record it again."
        )
    return float(raw.fps)


def _read_numbers(
    raw: RawDataset, fields: FieldMap, config: DatasetConfig
) -> tuple[dict[str, np.ndarray], list[str], np.ndarray, np.ndarray]:
    """Returns columns `[F, D]`, texts, their index `[F]`, and the indices of the episodes read."""
    columns: dict[str, np.ndarray] = {}
    index = np.empty(int(raw.lengths.sum()), np.int32)
    known: dict[str, int] = {}
    kept, end, bad = [], 0, []
    for number in range(len(raw.episodes)):
        try:
            episode = raw.episodes[number]
            values = {name: _numbers(episode, keys) for name, keys in fields.columns.items()}
            texts = [text or config.instruction for text in episode.instructions]
            _check_sizes(raw, episode, values, columns)
            _check_rate(raw, episode)
            if fields.gripper_keeps_at_zero:
                values["action"] = hold_grippers(values["action"], fields)
        except ValueError as error:
            if config.on_bad == "error":
                raise
            bad.append(f"{number}: {error}")
            continue
        stop = end + int(raw.lengths[number])
        for name, value in values.items():
            if name not in columns:
                columns[name] = np.empty((len(index), value.shape[1]), np.float32)
            columns[name][end:stop] = value
        index[end:stop] = [known.setdefault(text, len(known)) for text in texts]
        kept.append(number)
        end = stop
    if not kept:
        raise ValueError(f"{raw.path} has no episode that can be read; {'; '.join(bad[:3])}")
    if bad:
        warnings.warn(
            f"left out {len(bad)} of {len(raw.episodes)} episodes of {raw.path} that cannot be "
            f"read: {'; '.join(bad[:3])}",
            stacklevel=3,
        )
    columns = {name: column[:end] for name, column in columns.items()}
    return columns, list(known), index[:end], np.array(kept)


def _numbers(episode: RawEpisode, keys: Sequence[str]) -> np.ndarray:
    """Returns some columns of an episode side by side, `[T, D]`.

    Raises:
      ValueError: a column of texts, or a selection without dimensions.
    """
    values = field_column(episode.columns, keys)
    if values.dtype.kind not in "fiub" or not values.shape[1]:
        raise ValueError(
            f"{' and '.join(keys)} of episode {episode.name} must select numbers, got "
            f"{values.shape[1]} columns of {values.dtype}; choose with --dataset.feature-keys."
        )
    return values


def _fill_actions(action: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns `action [F, A]` with a real action in the place of those that do not exist.

    Args:
      action: `[F, A]`, arbitrary or NaN where the mask is 0.
      mask: `[F, 1]`.

    Raises:
      ValueError: no action exists.
    """
    real = mask[:, 0] > 0.5
    if not real.any():
        raise ValueError(f"{ACTION_MASK} must be True for some frames, got none.")
    return np.where(real[:, None], action, action[real][0])


def _check_sizes(
    raw: RawDataset,
    episode: RawEpisode,
    values: Mapping[str, np.ndarray],
    columns: Mapping[str, np.ndarray],
) -> None:
    """Checks that an episode's columns have the sizes of the first one's."""
    for name, value in values.items():
        if name in columns and value.shape[1] != columns[name].shape[1]:
            raise ValueError(
                f"{name} must have {columns[name].shape[1]} numbers as in the first episode of "
                f"{raw.path}, got {value.shape[1]} in episode {episode.name}; select dimensions "
                "with --dataset.feature-keys, or skip such episodes with --dataset.on-bad skip."
            )


def _dimension_names(
    raw: RawDataset, fields: FieldMap, layout: ActionLayout
) -> dict[str, tuple[str, ...]]:
    """Returns the names of each column's dimensions where all of its keys have some."""
    names = {
        name: field_names(raw.columns, keys)
        for name, keys in fields.columns.items()
        if all(raw.columns[parse_key(key, raw.columns)[0]].names for key in keys)
    }
    if len(names.get("action", ())) == layout.dim:
        names["action"] = action_layout.reorder_names(names["action"], layout)
    return names


def _check_rate(raw: RawDataset, episode: RawEpisode) -> None:
    """Checks that most steps of an episode are 1 / fps apart."""
    if raw.fps is None or len(episode.timestamps) < 2:
        return
    step = float(np.median(np.diff(episode.timestamps)))
    if not abs(step * raw.fps - 1) < RATE_TOLERANCE:
        raise ValueError(
            f"fps of {raw.path} must fit its timestamps, got {raw.fps:g} Hz but steps of "
            f"{step:.4g} s in episode {episode.name}; correct the one that is wrong."
        )


def _layout(fields: FieldMap, dim: int) -> ActionLayout:
    return action_layout.make_layout(
        dim, fields.grippers, fields.gripper_range, only_open=fields.gripper_only_open
    )


def hold_grippers(action: np.ndarray, fields: FieldMap) -> np.ndarray:
    """Returns actions whose grippers, given as changes, are states: open or closed at every step.

    A value near the middle keeps the state before. Until the first change the gripper is in the
    opposite state, and open if there is no change. NaN and infinity stay, to be found later.

    Args:
      action: `[T, dim]` of one episode.
      fields: grippers and their range.

    Source: rel2abs_gripper_actions of octo (octo/data/utils/data_utils.py), for RT-1's data.
    """
    layout = _layout(fields, action.shape[1])
    held = action.copy()
    middle, half = (layout.opened + layout.closed) / 2, (layout.opened - layout.closed) / 2
    for index in layout.grippers:
        signed = (action[:, index] - middle) / half
        change = np.where(np.abs(signed) > CHANGE, np.sign(signed), 0)
        moves = np.flatnonzero(change)
        before = -change[moves[0]] if len(moves) else 1.0
        last = np.maximum.accumulate(np.where(change != 0, np.arange(len(change)), -1))
        states = middle + half * np.where(last >= 0, change[last], before)
        held[:, index] = np.where(np.isfinite(signed), states, signed)
    return held
