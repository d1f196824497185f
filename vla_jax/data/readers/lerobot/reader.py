"""LeRobot v3.0 data sets, read without lerobot: Parquet for numbers, MP4 for images."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.actions.gripper import Gripper, gripper_to_open_positive
from vla_jax.data import video_frames as video_frames
from vla_jax.data.dataset import (
    CAMERAS,
    COLUMNS,
    Dataset,
    OnBad,
    digest,
    episode_rows,
    episode_starts,
    finite_episodes,
)
from vla_jax.data.readers.lerobot import layout as layout
from vla_jax.data.readers.lerobot.layout import DATA_PATH, INFO_PATH, TASKS_PATH, VIDEO_PATH
from vla_jax.data.video_frames import Segment

TIME_TOLERANCE = 1e-3  # seconds; timestamps are float32


def read(
    root: str | pathlib.Path,
    *,
    feature_keys: Mapping[str, str] | None = None,
    cameras: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    gripper: Gripper = "open_positive",
    image_size: tuple[int, int] | None = None,
    cache_dir: str | pathlib.Path | None = None,
    expected_fps: float | None = None,
    on_bad: OnBad = "error",
) -> Dataset:
    """Reads a LeRobot v3.0 data set; its images are decoded once and memory-mapped.

    Args:
      root: folder that holds `meta/`, `data/` and `videos/`.
      feature_keys: our field -> key on disk, such as `{"image_primary":
        "observation.images.top"}`, where it differs from `lerobot_layout.FEATURE_KEYS`; all of
        them must exist, others are read where they do.
      cameras: fields of the images to read; None means all that have a key, () none.
      columns: fields of the numbers to read beside "action"; None means all that have a key.
      gripper: meaning of the action's last number on disk; the data set read has +1 open,
        -1 closed.
      image_size: (h, w) in pixels to resize to; None keeps the size on disk.
      cache_dir: folder for decoded images; None means `root/.frames`.
      expected_fps: frames per second that the user counts on, Hz; None takes what is there.
      on_bad: "error" refuses NaN and infinity, "skip" leaves those episodes out and says so.

    Returns:
      The data set.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: another version, damaged or contradictory files, unknown keys, another fps,
        NaN or infinity, gripper values that the declared meaning does not allow.
      OSError: no space for the decoded images.
      ImportError: pyarrow or PyAV is missing.
    """
    root = pathlib.Path(root)
    info = layout.read_info(root)
    layout.check_fps(root, info, expected_fps)
    keys = layout.feature_keys(root, info, feature_keys, cameras, columns)
    episodes = _read_episodes(root, info, [keys[name] for name in CAMERAS if name in keys])
    table = _read_data(root, info, episodes, [keys[name] for name in COLUMNS if name in keys])
    ends = np.cumsum(episodes["length"])
    _check_times(root, info, table, ends)
    numbers = {name: table[keys[name]] for name in COLUMNS if name in keys}
    keep = finite_episodes(numbers, ends, on_bad=on_bad)
    rows = episode_rows(ends, keep)
    numbers = {name: column[rows] for name, column in numbers.items()}
    numbers["action"] = gripper_to_open_positive(numbers["action"], gripper)
    tasks = _read_tasks(root)
    task_indices = table["task_index"][episode_starts(ends)[keep]]
    segments = {
        name: _segments(root, info, episodes, keep, keys[name]) for name in CAMERAS if name in keys
    }
    instructions = tuple(_task(root, tasks, index) for index in task_indices)
    lengths = np.asarray(episodes["length"])[keep]
    return Dataset(
        columns=numbers,
        frames=video_frames.read_frames(
            segments,
            root,
            cache_dir=pathlib.Path(cache_dir) if cache_dir else None,
            image_size=image_size,
        ),
        episode_ends=np.cumsum(lengths),
        instructions=instructions,
        fps=float(info["fps"]),
        fingerprint=_fingerprint(root, numbers, lengths, instructions, segments, image_size),
        names={name: layout.dimension_names(info, keys[name]) for name in numbers},
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
    """Length, files and times of every episode, ordered by its index."""
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
            f"frames as {INFO_PATH} promises, got {count} with {frames}; copy the data set again."
        )
    return episodes


def _read_data(
    root: pathlib.Path,
    info: Mapping[str, Any],
    episodes: Mapping[str, np.ndarray],
    keys: Sequence[str],
) -> dict[str, np.ndarray]:
    """Columns of all frames, ordered by episode and step; features as float32 `[F, D]`."""
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
            f"meta/episodes promises, got {len(order)}; copy the data set again."
        )
    return {name: column[order] for name, column in columns.items()}


def _matrix(table: Any, key: str, size: int, path: pathlib.Path) -> np.ndarray:
    """A column of lists or numbers as float32 `[rows, size]`."""
    column = values = table[key].combine_chunks()
    while hasattr(values, "flatten") and values.type.num_fields:
        values = values.flatten()
    if len(values) != len(column) * size:
        raise ValueError(
            f"feature {key!r} must have {size} numbers per frame as {INFO_PATH} says, got "
            f"{len(values) / max(len(column), 1):g} in {path}; record or convert it again."
        )
    numbers = values.to_numpy(zero_copy_only=False)
    return np.asarray(numbers, np.float32).reshape(len(column), size)


def _check_times(
    root: pathlib.Path, info: Mapping[str, Any], table: Mapping[str, np.ndarray], ends: np.ndarray
) -> None:
    """Timestamps must be step / fps: a wrong rate would pair images with other actions."""
    steps = np.arange(ends[-1]) - np.repeat(episode_starts(ends), np.diff(ends, prepend=0))
    times = table["timestamp"].astype(np.float64)
    wrong = np.flatnonzero(np.abs(times - steps / info["fps"]) > TIME_TOLERANCE)
    if len(wrong):
        found = steps[wrong[0]] / times[wrong[0]] if times[wrong[0]] > 0 else np.nan
        raise ValueError(
            f"fps of {root} must fit its timestamps, got {info['fps']:g} Hz in {INFO_PATH} but "
            f"{found:.4g} Hz at frame {wrong[0]}; correct the one that is wrong."
        )


def _read_tasks(root: pathlib.Path) -> dict[int, str]:
    """Task index -> instruction. The text is the pandas index, whatever its column is called."""
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
) -> list[Segment]:
    """Where the frames of each kept episode lie in the videos of one camera."""
    chunks, files, times = (
        episodes[f"videos/{key}/{field}"][keep]
        for field in ("chunk_index", "file_index", "from_timestamp")
    )
    return [
        Segment(
            root / layout.file_path(info, "video_path", VIDEO_PATH, chunk, file, key),
            round(float(time) * info["fps"]),
            int(length),
        )
        for chunk, file, time, length in zip(
            chunks, files, times, episodes["length"][keep], strict=True
        )
    ]


def _fingerprint(
    root: pathlib.Path,
    numbers: Mapping[str, np.ndarray],
    lengths: np.ndarray,
    instructions: tuple[str, ...],
    segments: Mapping[str, Sequence[Segment]],
    image_size: tuple[int, int] | None,
) -> str:
    """Identity of the content; videos count by name and size, and so survive a copy."""
    videos = {
        name: sorted({(s.path.relative_to(root).as_posix(), s.path.stat().st_size) for s in parts})
        for name, parts in segments.items()
    }
    return digest(numbers, lengths, instructions, videos, image_size)
