"""Writer of LeRobot v3.0 data sets, episode by episode.

All files are written to `root.tmp`, which is renamed at the end: an interrupted recording never
looks like a data set.
"""

import errno
import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from vla_jax.data.dataset import CAMERAS, COLUMNS, Episode, check_episode
from vla_jax.data.readers.lerobot import layout, shards, stats

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(
    root: str | pathlib.Path,
    episodes: Iterable[Episode],
    *,
    fps: float,
    robot_type: str = "unknown",
    names: Mapping[str, Sequence[str]] | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes episodes as they arrive; readable by lerobot and by `lerobot_v3.read`.

    Only one episode is in memory at a time; the iterable may be a generator.

    Args:
      root: folder to create.
      episodes: records with the same fields and image sizes; gripper +1 open, -1 closed.
      fps: steps per second, Hz.
      robot_type: name of the robot, for the metadata.
      names: field -> name of each dimension.
      overwrite: replace an existing data set.

    Returns:
      `root`.

    Raises:
      FileExistsError: `root` exists.
      ValueError: no episodes; an episode with different fields or sizes, NaN or infinity.
      OSError: the disk is full; an existing data set is unchanged.
      ImportError: pyarrow or PyAV is missing.
    """
    root = pathlib.Path(root)
    if root.exists() and not overwrite:
        raise FileExistsError(f"data set {root} exists; choose another folder or overwrite it.")
    episodes = iter(episodes)
    first = next(episodes, None)
    if first is None:
        raise ValueError("episodes must hold at least one episode, got none; record some first.")
    _require_packages()
    partial = root.with_name(root.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        features = _features(first, fps, names or {})
        rows, tasks = _write_episodes(partial, chain([first], episodes), fps)
        _write_meta(partial, rows, tasks, features, fps, robot_type)
    except OSError as error:
        if error.errno not in DISK_FULL:  # from the caller's iterator, with a more precise message
            raise
        raise OSError(
            error.errno,
            f"data set {root} could not be written ({error.strerror}), an earlier one is "
            "unchanged; free space and record again.",
        ) from error
    if root.exists():
        replaced = root.with_name(root.name + ".old")
        root.rename(replaced)
        partial.rename(root)
        shutil.rmtree(replaced)
    else:
        partial.rename(root)
    return root


def _write_episodes(
    root: pathlib.Path, episodes: Iterable[Episode], fps: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Writes images and numbers; returns one row of metadata per episode, and the tasks."""
    rows: list[dict[str, Any]] = []
    tasks: dict[str, int] = {}
    videos: dict[str, shards.Video] = {}
    table, first, total = None, None, 0
    try:
        for index, episode in enumerate(episodes):
            first = first or episode
            _check(episode, index, first)
            task_index = tasks.setdefault(episode.instruction, len(tasks))
            columns = _columns(episode, index, task_index, total, fps)
            table = shards.append_rows(root, table, columns)
            row = _episode_row(episode, index, total, table.file_index, columns)
            for key, images in _images(episode).items():
                video = shards.append_frames(root, videos.get(key), key, images, fps)
                row |= _video_row(key, video, len(images), fps)
                videos[key] = video
            rows.append(row)
            total += len(episode.action)
    finally:
        if table:
            table.writer.close()
        for video in videos.values():
            shards.close_video(video)
    return rows, tasks


def _require_packages() -> None:
    try:
        import av  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "writing LeRobot data sets needs pyarrow and PyAV; install them with `pip install "
            "'vla-jax[data]'`."
        ) from error


def _check(episode: Episode, index: int, first: Episode) -> None:
    check_episode(episode, index, like=first)
    for name, value in {**episode.observation, "action": episode.action}.items():
        if name in COLUMNS and not np.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity in episode {index}.")


def _images(episode: Episode) -> dict[str, np.ndarray]:
    """Returns key on disk -> images `[T, h, w, 3]` of one episode."""
    images = episode.observation
    return {layout.FEATURE_KEYS[name]: images[name] for name in CAMERAS if name in images}


def _columns(
    episode: Episode, index: int, task_index: int, total: int, fps: float
) -> dict[str, np.ndarray]:
    """Returns key on disk -> Parquet column of one episode."""
    steps = np.arange(len(episode.action))
    numbers = {**episode.observation, "action": episode.action}
    return {
        **{
            layout.FEATURE_KEYS[name]: np.asarray(numbers[name], np.float32)
            for name in COLUMNS
            if name in numbers
        },
        "timestamp": (steps / fps).astype(np.float32),
        "frame_index": steps,
        "episode_index": np.full_like(steps, index),
        "index": steps + total,
        "task_index": np.full_like(steps, task_index),
    }


def _episode_row(
    episode: Episode, index: int, total: int, data_file: int, columns: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Returns the metadata of one episode, with lerobot's column names."""
    row = stats.column_stats(columns)
    row |= {key: stats.image_stats(images) for key, images in _images(episode).items()}
    place = shards.place(data_file)
    return {
        "episode_index": index,
        "tasks": [episode.instruction],
        "length": len(episode.action),
        **{f"data/{field}": value for field, value in place.items()},
        "dataset_from_index": total,
        "dataset_to_index": total + len(episode.action),
        **{f"stats/{key}/{s}": v.tolist() for key, fs in row.items() for s, v in fs.items()},
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }


def _video_row(key: str, video: shards.Video, length: int, fps: float) -> dict[str, Any]:
    place = shards.place(video.file_index)
    return {
        **{f"videos/{key}/{field}": value for field, value in place.items()},
        f"videos/{key}/from_timestamp": (video.num_frames - length) / fps,
        f"videos/{key}/to_timestamp": video.num_frames / fps,
    }


def _features(
    first: Episode, fps: float, names: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Returns `features` of info.json: dtype, shape and names of every per-frame value."""
    numbers = {**first.observation, "action": first.action}
    features = {}
    for name, key in layout.FEATURE_KEYS.items():
        if name in CAMERAS and name in numbers:
            features[key] = _video_feature(numbers[name].shape[1:], fps)
        elif name in numbers:
            labels = list(names[name]) if name in names else None
            shape = list(numbers[name].shape[1:])
            features[key] = {"dtype": "float32", "shape": shape, "names": labels}
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        dtype = "float32" if key == "timestamp" else "int64"
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def _video_feature(shape: tuple[int, ...], fps: float) -> dict[str, Any]:
    height, width, channels = shape
    return {
        "dtype": "video",
        "shape": [height, width, channels],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.channels": channels,
            "video.codec": shards.CODEC_NAME,
            "video.pix_fmt": shards.PIXELS,
            "video.is_depth_map": False,
            "video.fps": _rate(fps),
            "has_audio": False,
        },
    }


def _rate(fps: float) -> int | float:
    return int(fps) if float(fps).is_integer() else float(fps)


def _write_meta(
    root: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, int],
    features: Mapping[str, Any],
    fps: float,
    robot_type: str,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    info = {
        "codebase_version": layout.VERSION,
        "robot_type": robot_type,
        "total_episodes": len(rows),
        "total_frames": rows[-1]["dataset_to_index"],
        "total_tasks": len(tasks),
        "chunks_size": shards.CHUNK_FILES,
        "data_files_size_in_mb": shards.DATA_MB,
        "video_files_size_in_mb": shards.VIDEO_MB,
        "fps": _rate(fps),
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": layout.DATA_PATH,
        "video_path": layout.VIDEO_PATH,
        "features": features,
    }
    totals = {key: stats.total_stats(rows, key) for key in features}
    episodes = root / layout.EPISODES_PATH.format(chunk_index=0, file_index=0)
    episodes.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), episodes)
    pq.write_table(_task_table(tasks), root / layout.TASKS_PATH)
    (root / layout.STATS_PATH).write_text(json.dumps(totals, indent=4))
    (root / layout.INFO_PATH).write_text(json.dumps(info, indent=4))


def _task_table(tasks: Mapping[str, int]) -> Any:
    """Returns the task table that lerobot reads: the text is the index of a pandas frame."""
    import pyarrow as pa

    def column(name: str, pandas_type: str, numpy_type: str) -> dict[str, Any]:
        types = {"pandas_type": pandas_type, "numpy_type": numpy_type}
        return {"name": name, "field_name": name, **types, "metadata": None}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": list(tasks.values()), "task": list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
