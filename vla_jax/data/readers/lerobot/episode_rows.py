"""Rows of `meta/episodes`: position and statistics of every episode of a LeRobot data set."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.data.readers.lerobot import layout, shards, stats


def index_columns(
    index: int, first_frame: int, task_index: np.ndarray, fps: float
) -> dict[str, np.ndarray]:
    """Returns the columns of one episode that every data set has, `[T]` each.

    Args:
      index: of the episode.
      first_frame: frames of all episodes before it.
      task_index: `[T]` int64.
      fps: Hz.
    """
    steps = np.arange(len(task_index))
    return {
        "timestamp": (steps / fps).astype(np.float32),
        "frame_index": steps,
        "episode_index": np.full_like(steps, index),
        "index": steps + first_frame,
        "task_index": np.asarray(task_index, np.int64),
    }


def stats_row(statistics: Mapping[str, stats.Stats]) -> dict[str, Any]:
    """Returns statistics as entries of an episode's row."""
    return {
        f"stats/{key}/{name}": value.tolist()
        for key, values in statistics.items()
        for name, value in values.items()
    }


def video_row(key: str, video: shards.Video, length: int, fps: float) -> dict[str, Any]:
    """Returns the position in a video of an episode that has just been encoded."""
    place = shards.place(video.file_index)
    return {
        **{f"videos/{key}/{field}": value for field, value in place.items()},
        f"videos/{key}/from_timestamp": (video.num_frames - length) / fps,
        f"videos/{key}/to_timestamp": video.num_frames / fps,
    }


def position_row(
    index: int, first_frame: int, length: int, tasks: Sequence[str], data_file: int, meta_file: int
) -> dict[str, Any]:
    """Returns the position of an episode in the data set and in its Parquet files.

    Args:
      index: of the episode.
      first_frame: frames of all episodes before it.
      length: T.
      tasks: its distinct texts.
      data_file: number of the Parquet file with its numbers.
      meta_file: number of the Parquet file with its row.
    """
    meta = shards.place(meta_file)
    return {
        "episode_index": index,
        "tasks": list(tasks),
        "length": length,
        **{f"data/{field}": value for field, value in shards.place(data_file).items()},
        "dataset_from_index": first_frame,
        "dataset_to_index": first_frame + length,
        **{f"meta/episodes/{field}": value for field, value in meta.items()},
    }


def write_rows(root: pathlib.Path, meta_file: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as the n-th file of `meta/episodes`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = root / layout.EPISODES_PATH.format(**shards.place(meta_file))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
