"""The `Dataset` for training that is made from the raw view of any format."""

from collections.abc import Sequence

import numpy as np

from vla_jax.actions import action_layout
from vla_jax.actions.action_layout import ActionLayout
from vla_jax.data.dataset import ACTION_MASK, Dataset, Frames, digest, sort_texts
from vla_jax.data.frame_cache import FrameCache
from vla_jax.data.frame_records import open_records, records_folder
from vla_jax.data.raw import RawDataset
from vla_jax.data.raw_frames import RawFrames, decode_all
from vla_jax.data.readers import fields as field_maps
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.field_columns import field_names, parse_key
from vla_jax.data.readers.fields import FieldMap
from vla_jax.data.readers.grippers import make_layout
from vla_jax.data.readers.read_numbers import read_numbers
from vla_jax.types import Resampling


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
    columns, texts, text_index, episodes = read_numbers(raw, fields, config)
    if ACTION_MASK in columns:
        columns["action"] = _fill_actions(columns["action"], columns[ACTION_MASK])
    instructions, index = sort_texts(texts, text_index)
    lengths = raw.lengths[episodes]
    layout = make_layout(fields, columns["action"].shape[1])
    columns["action"] = action_layout.from_robot(columns["action"], layout)
    cache = FrameCache(config.cache_bytes if config.decode == "on_demand" else 0)
    frames = {
        name: RawFrames(
            raw,
            key,
            cache,
            episodes=episodes,
            image_size=image_size,
            resampling=resampling,
            rotate=fields.rotate_images,
        )
        for name, key in keys.items()
    }
    open_camera = _OPEN[config.decode]
    opened = {name: open_camera(each, name, raw, config) for name, each in frames.items()}
    images = {name: fingerprint for name, (_, fingerprint) in opened.items()}
    return Dataset(
        columns=columns,
        frames={name: each for name, (each, _) in opened.items()},
        episode_ends=np.cumsum(lengths),
        instructions=instructions,
        instruction_index=index,
        fps=fps,
        fingerprint=digest(columns, lengths, instructions, index, images, fps),
        names=_dimension_names(raw, fields, layout),
        action_layout=layout,
    )


_Opened = tuple[Frames, str]  # the images of a camera, and their fingerprint


def _open_on_demand(
    images: RawFrames, name: str, raw: RawDataset, config: DatasetConfig
) -> _Opened:
    del name, raw, config
    return images, images.fingerprint


def _open_whole(images: RawFrames, name: str, raw: RawDataset, config: DatasetConfig) -> _Opened:
    return decode_all(images, name, raw.path, config.decoded_dir), images.fingerprint


def _open_records(images: RawFrames, name: str, raw: RawDataset, config: DatasetConfig) -> _Opened:
    del raw
    recorded = open_records(records_folder(images, name, config.decoded_dir), images, name)
    return recorded, recorded.fingerprint


_OPEN = {"on_demand": _open_on_demand, "whole": _open_whole, "records": _open_records}  # `decode`


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
