"""Reader of LeRobot v3.0 data sets, without lerobot: numbers from Parquet, images from MP4."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.actions.gripper import gripper_to_open_positive
from vla_jax.data.dataset import (
    CAMERAS,
    COLUMNS,
    Dataset,
    digest,
    episode_rows,
    episode_starts,
    finite_episodes,
)
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.lerobot import layout
from vla_jax.data.readers.lerobot.layout import DATA_PATH, INFO_PATH, TASKS_PATH, VIDEO_PATH
from vla_jax.data.readers.videos import open_videos
from vla_jax.data.video_frames import Segment
from vla_jax.types import Resampling

TIME_TOLERANCE = 1e-3  # seconds; timestamps are float32


def probe(path: pathlib.Path) -> bool:
    """Returns True if `path` is a LeRobot data set of version 3."""
    try:
        info = json.loads((path / INFO_PATH).read_text(encoding="utf-8"))
        return str(info["codebase_version"]).startswith("v3.")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read(
    config: DatasetConfig,
    *,
    cameras: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    resampling: Resampling = "area",
) -> Dataset:
    """Reads a LeRobot v3.0 data set.

    Args:
      config: `path` is the folder that holds `meta/`, `data/` and `videos/`. `feature_keys` maps
        fields to keys on disk that differ from `layout.FEATURE_KEYS`; these keys must exist,
        other keys are read if they exist.
      cameras: image fields to read; None means all that have a key, () means none.
      image_size: (h, w) in pixels to resize to; None keeps the size on disk.
      resampling: how to resize.

    Returns:
      The data set; the gripper is +1 open, -1 closed.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: another version, damaged or contradictory files, unknown keys, another fps,
        NaN or infinity, gripper values that contradict `config.gripper`.
      OSError: no space for the decoded images.
      ImportError: pyarrow or PyAV is missing.
    """
    root = pathlib.Path(config.path)
    info = layout.read_info(root)
    layout.check_fps(root, info, config.expected_fps)
    keys = layout.feature_keys(root, info, dict(config.feature_keys), cameras, config.columns)
    episodes = _read_episodes(root, info, [keys[name] for name in CAMERAS if name in keys])
    table = _read_data(root, info, episodes, [keys[name] for name in COLUMNS if name in keys])
    ends = np.cumsum(episodes["length"])
    _check_times(root, info, table, ends)
    columns = {name: table[keys[name]] for name in COLUMNS if name in keys}
    keep = finite_episodes(columns, ends, on_bad=config.on_bad)
    rows = episode_rows(ends, keep)
    columns = {name: column[rows] for name, column in columns.items()}
    columns["action"] = gripper_to_open_positive(columns["action"], config.gripper)
    tasks = _read_tasks(root)
    task_indices = table["task_index"][episode_starts(ends)[keep]]
    times = np.split(table["timestamp"].astype(np.float64), ends[:-1])
    segments = {
        name: _segments(root, info, episodes, keep, keys[name], times)
        for name in CAMERAS
        if name in keys
    }
    instructions = tuple(_task(root, tasks, index) for index in task_indices)
    lengths = np.asarray(episodes["length"])[keep]
    return Dataset(
        columns=columns,
        frames=open_videos(segments, config, image_size=image_size, resampling=resampling),
        episode_ends=np.cumsum(lengths),
        instructions=instructions,
        fps=float(info["fps"]),
        fingerprint=_fingerprint(root, columns, lengths, instructions, segments, image_size),
        names={name: layout.dimension_names(info, keys[name]) for name in columns},
    )


def _read_table(path: pathlib.Path, columns: Sequence[str] | None = None) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            "reading LeRobot data sets needs pyarrow; install it with `pip install "
            "'vla-jax[data]'`."
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"Parquet file {path} is missing; copy the data set again.")
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns or () if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(
                    f"Parquet file {path} must have the columns {columns}, {missing} "
                    "missing; copy the data set again."
                )
            return file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"Parquet file {path} cannot be read, it is damaged or cut short ({error}); copy the "
            "data set again."
        ) from error


def _read_episodes(
    root: pathlib.Path, info: Mapping[str, Any], camera_keys: Sequence[str]
) -> dict[str, np.ndarray]:
    """Returns length, files and times of every episode, ordered by episode index."""
    names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    names += [
        f"videos/{key}/{field}"
        for key in camera_keys
        for field in ("chunk_index", "file_index", "from_timestamp")
    ]
    paths = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not paths:
        raise FileNotFoundError(
            f"data set {root} must hold meta/episodes/*/*.parquet, got none; copy it again."
        )
    tables = [_read_table(path, names) for path in paths]
    columns = {n: np.concatenate([table[n].to_numpy() for table in tables]) for n in names}
    order = np.argsort(columns["episode_index"], kind="stable")
    episodes = {name: column[order] for name, column in columns.items()}
    frames, count = int(episodes["length"].sum()), len(order)
    if (count, frames) != (info["total_episodes"], info["total_frames"]):
        raise ValueError(
            f"{root} must hold {info['total_episodes']} episodes with {info['total_frames']} "
            f"frames as {INFO_PATH} states, got {count} with {frames}; copy the data set again."
        )
    return episodes


def _read_data(
    root: pathlib.Path,
    info: Mapping[str, Any],
    episodes: Mapping[str, np.ndarray],
    keys: Sequence[str],
) -> dict[str, np.ndarray]:
    """Returns the columns of all frames, ordered by episode and step; features `[F, D]` float32."""
    indices = ["episode_index", "frame_index", "task_index", "timestamp"]
    files = sorted(set(zip(episodes["data/chunk_index"], episodes["data/file_index"], strict=True)))
    paths = [root / layout.file_path(info, "data_path", DATA_PATH, *place) for place in files]
    tables = [_read_table(path, [*indices, *keys]) for path in paths]
    columns = {n: np.concatenate([t[n].to_numpy() for t in tables]) for n in indices}
    for key in keys:
        size = int(np.prod(info["features"][key]["shape"]))
        parts = [_matrix(table, key, size, p) for table, p in zip(tables, paths, strict=True)]
        columns[key] = np.concatenate(parts)
    order = np.lexsort((columns["frame_index"], columns["episode_index"]))
    expected = np.repeat(episodes["episode_index"], episodes["length"])
    if not np.array_equal(columns["episode_index"][order], expected):
        raise ValueError(
            f"data of {root} must hold {len(expected)} frames, as many of each episode as "
            f"meta/episodes states, got {len(order)}; copy the data set again."
        )
    return {name: column[order] for name, column in columns.items()}


def _matrix(table: Any, key: str, size: int, path: pathlib.Path) -> np.ndarray:
    """Returns a column of lists or numbers as float32 `[rows, size]`."""
    column = values = table[key].combine_chunks()
    while hasattr(values, "flatten") and values.type.num_fields:
        values = values.flatten()
    if len(values) != len(column) * size:
        raise ValueError(
            f"feature {key!r} must have {size} numbers per frame as {INFO_PATH} states, got "
            f"{len(values) / max(len(column), 1):g} in {path}; record or convert it again."
        )
    numbers = values.to_numpy(zero_copy_only=False)
    return np.asarray(numbers, np.float32).reshape(len(column), size)


def _check_times(
    root: pathlib.Path, info: Mapping[str, Any], table: Mapping[str, np.ndarray], ends: np.ndarray
) -> None:
    """Checks that timestamps are step / fps: a wrong rate would pair images with other actions."""
    steps = np.arange(ends[-1]) - np.repeat(episode_starts(ends), np.diff(ends, prepend=0))
    times = table["timestamp"].astype(np.float64)
    wrong = np.flatnonzero(np.abs(times - steps / info["fps"]) > TIME_TOLERANCE)
    if len(wrong):
        rate = steps[wrong[0]] / times[wrong[0]] if times[wrong[0]] > 0 else np.nan
        raise ValueError(
            f"fps of {root} must fit its timestamps, got {info['fps']:g} Hz in {INFO_PATH} but "
            f"{rate:.4g} Hz at frame {wrong[0]}; correct the one that is wrong."
        )


def _read_tasks(root: pathlib.Path) -> dict[int, str]:
    """Returns task index -> instruction; the text is the pandas index, under any column name."""
    table = _read_table(root / TASKS_PATH)
    texts = [name for name in table.column_names if name != "task_index"]
    if len(texts) != 1 or table.num_columns != 2:
        raise ValueError(
            f"{root / TASKS_PATH} must have the column task_index and one of texts, got "
            f"{table.column_names}; copy the data set again."
        )
    return dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True))


def _task(root: pathlib.Path, tasks: Mapping[int, str], index: int) -> str:
    if int(index) not in tasks:
        raise ValueError(
            f"{root / TASKS_PATH} must name every task, got no task_index {index}; copy the data "
            "set again."
        )
    return tasks[int(index)]


def _segments(
    root: pathlib.Path,
    info: Mapping[str, Any],
    episodes: Mapping[str, np.ndarray],
    keep: np.ndarray,
    key: str,
    times: Sequence[np.ndarray],
) -> list[Segment]:
    """Returns the video segment of each kept episode for one camera."""
    chunks, files, starts = (
        episodes[f"videos/{key}/{field}"][keep]
        for field in ("chunk_index", "file_index", "from_timestamp")
    )
    return [
        Segment(
            root / layout.file_path(info, "video_path", VIDEO_PATH, chunk, file, key),
            start + times[episode],
        )
        for episode, chunk, file, start in zip(keep, chunks, files, starts, strict=True)
    ]


def _fingerprint(
    root: pathlib.Path,
    numbers: Mapping[str, np.ndarray],
    lengths: np.ndarray,
    instructions: tuple[str, ...],
    segments: Mapping[str, Sequence[Segment]],
    image_size: tuple[int, int] | None,
) -> str:
    """Returns a hash of the content; of videos only name and size, so that copies are equal."""
    videos = {
        name: sorted({(s.path.relative_to(root).as_posix(), s.path.stat().st_size) for s in parts})
        for name, parts in segments.items()
    }
    return digest(numbers, lengths, instructions, videos, image_size)
