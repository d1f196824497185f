"""Raw view of LeRobot data sets of the versions 2.0, 2.1 and 3.0, without lerobot."""

import functools
import pathlib
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.data.raw import (
    Blocks,
    EpisodeBlock,
    Feature,
    Lazy,
    LazyEpisodes,
    RawDataset,
    RawEpisode,
    RawImages,
)
from vla_jax.data.readers.lerobot.data_files import block_ends, expected_rows, hash_files
from vla_jax.data.readers.lerobot.episode_table import (
    EpisodeTable,
    FilePlaces,
    read_episodes,
    read_tasks,
)
from vla_jax.data.readers.lerobot.info import Info, paths_of, read_info, read_json, wrong
from vla_jax.data.readers.lerobot.layout import INFO_PATH
from vla_jax.data.readers.lerobot.parquet_files import ParquetRows, read_schema
from vla_jax.data.readers.lerobot.parquet_images import decode_stills
from vla_jax.data.readers.lerobot.parquet_values import feature_of, to_numpy
from vla_jax.data.still_images import StillImages
from vla_jax.data.video_images import VideoImages
from vla_jax.data.video_pieces import VideoPieces

NUMBER = Feature("int64", ())
TIME = Feature("float64", ())
INDICES = ("episode_index", "frame_index", "task_index")


def open_lerobot(path: pathlib.Path, *, split: str | None = None) -> RawDataset:
    """Opens a LeRobot data set; arguments, result and errors as `readers.open`.

    Columns have lerobot's dtypes: float32 for all floats, int64 for all integers. The frame of a
    step is the one that the video shows at the step's timestamp.
    """
    info = read_info(path)
    table = read_episodes(info)
    tasks = read_tasks(info)
    fingerprint = digest(table.index, table.lengths, *hash_files(info, table))
    info = _with_stored_columns(info, table)
    positions = _positions(info, len(table.index), split)
    source = LeRobotSource(info, table, tasks, positions)
    lengths = table.lengths[positions]
    return RawDataset(
        kind="lerobot_v3" if info.has_shared_files else "lerobot_v2",
        path=path,
        episodes=LazyEpisodes(len(lengths), source.episode),
        lengths=lengths,
        columns=info.columns,
        images=info.images,
        fps=info.fps,
        fingerprint=digest(fingerprint, lengths),
        blocks=Blocks(block_ends(info, table, positions), source.block),
    )


class LeRobotSource:
    """Makes the episodes of a data set; picklable, and safe to share by threads."""

    def __init__(
        self, info: Info, table: EpisodeTable, tasks: Mapping[int, str], positions: np.ndarray
    ) -> None:
        """Stores the arguments.

        Args:
          info: description of the data set.
          table: its episodes.
          tasks: task index -> instruction.
          positions: `[E]` chosen rows of the table.
        """
        self._info = info
        self._table = table
        self._tasks = dict(tasks)
        self._positions = positions
        self._starts, self._file_rows = expected_rows(info, table)
        self._rows = ParquetRows()
        self._videos = VideoPieces()

    def episode(self, index: int) -> RawEpisode:
        """Returns the episode at an index; reads its times and tasks."""
        position = int(self._positions[index])
        path, rows = self._place(position)
        times = self._read(path, rows, "timestamp", TIME)
        if not np.isfinite(times).all():
            wrong(path, f"timestamp of episode {self._table.index[position]}", "finite", "NaN")
        info = self._info
        image = functools.partial(self._images, position, path, rows, times)
        return RawEpisode(
            name=str(self._table.index[position]),
            columns=Lazy(list(info.columns), functools.partial(self._column, path, rows)),
            images=Lazy(list(info.images), image),
            instructions=self._instructions(path, rows),
            timestamps=times - times[0],
        )

    def block(self, start: int, stop: int, keys: Sequence[str]) -> EpisodeBlock:
        """Reads some columns of the episodes [start, stop) of one file, where lerobot writes them.

        Raises:
          ValueError: they lie elsewhere in the file, or something is wrong with one of them.
        """
        table, positions = self._table, self._positions[start:stop]
        lengths, first = table.lengths[positions], int(positions[0])
        path, row = self._path(first, table.data), int(self._starts[first])
        if self._rows.num_rows(path) != self._file_rows[first]:
            expected = f"{self._file_rows[first]} as meta/ states"
            wrong(path, "number of rows", expected, self._rows.num_rows(path))
        stored = self._rows.read_together(
            path, [*{*INDICES, "timestamp", *keys}], row, row + int(lengths.sum())
        )
        times = to_numpy(stored["timestamp"], TIME, "timestamp", path)
        episodes, frames, tasks = (to_numpy(stored[key], NUMBER, key, path) for key in INDICES)
        known = np.array(sorted(self._tasks), np.int64)
        starts = np.cumsum(lengths) - lengths
        is_usual = (
            np.array_equal(episodes, np.repeat(table.index[positions], lengths))
            and np.delete(np.diff(frames) > 0, starts[1:] - 1).all()
            and np.isin(tasks, known).all()
            and np.isfinite(times).all()
        )
        if not is_usual:
            wrong(path, "rows", "in the order of episodes and steps", "others")
        return EpisodeBlock(
            name=f"episodes {episodes[0]} to {episodes[-1]}",
            columns={k: to_numpy(stored[k], self._info.columns[k], k, path) for k in keys},
            texts=[self._tasks[index] for index in known.tolist()],
            text_index=np.searchsorted(known, tasks),
            timestamps=times - np.repeat(times[starts], lengths),
        )

    def _place(self, position: int) -> tuple[pathlib.Path, np.ndarray]:
        """Returns the Parquet file of an episode, and its rows in the order of `frame_index`."""
        episode, place = int(self._table.index[position]), self._table.data
        path = self._path(position, place)
        rows = self._rows_of(position, path, episode)
        length = int(self._table.lengths[position])
        if len(rows) != length:
            got = f"{len(rows)} of {self._rows.num_rows(path)} rows"
            wrong(path, f"rows of episode {episode}", f"{length} as meta/ states", got)
        frames = self._read(path, rows, "frame_index", NUMBER)
        steps = np.diff(frames)
        if np.any(steps <= 0):
            rows = rows[np.argsort(frames, kind="stable")]
            steps = np.diff(np.sort(frames))
        if np.any(steps == 0):
            twice = int(np.sort(frames)[:-1][steps == 0][0])
            wrong(path, f"frame_index of episode {episode}", "different in every row", twice)
        return path, rows

    def _rows_of(self, position: int, path: pathlib.Path, episode: int) -> np.ndarray:
        """Returns the rows of an episode: where lerobot writes it, else wherever it is."""
        start, length = int(self._starts[position]), int(self._table.lengths[position])
        if self._rows.num_rows(path) == self._file_rows[position]:
            rows = np.arange(start, start + length)
            if np.all(self._read(path, rows, "episode_index", NUMBER) == episode):
                return rows
        return self._rows.find(path, "episode_index", episode)

    def _path(self, position: int, place: FilePlaces, key: str = "") -> pathlib.Path:
        """Returns the Parquet file of an episode, or the video of a camera."""
        one = slice(position, position + 1)
        template = self._info.video_path if key else self._info.data_path
        numbers = self._table.index[one], place.chunk[one], place.file[one]
        return self._info.root / paths_of(template, self._info, *numbers, key)[0]

    def _instructions(self, path: pathlib.Path, rows: np.ndarray) -> list[str]:
        indices = self._read(path, rows, "task_index", NUMBER)
        missing = [int(index) for index in np.unique(indices) if int(index) not in self._tasks]
        if missing:
            known = f"one of the {len(self._tasks)} tasks in meta/"
            wrong(path, "task_index", known, missing[0])
        return [self._tasks[index] for index in indices.tolist()]

    def _column(self, path: pathlib.Path, rows: np.ndarray, key: str) -> np.ndarray:
        return self._read(path, rows, key, self._info.columns[key])

    def _read(self, path: pathlib.Path, rows: np.ndarray, key: str, feature: Feature) -> np.ndarray:
        return to_numpy(self._rows.read(path, key, rows), feature, key, path)

    def _images(
        self, position: int, path: pathlib.Path, rows: np.ndarray, times: np.ndarray, key: str
    ) -> RawImages:
        if key not in self._info.videos:
            load = functools.partial(self._load_stills, path, rows, key)
            height, width, _ = self._info.images[key].shape
            return StillImages(len(rows), (height, width), load)
        place = self._table.videos[key]
        video = self._path(position, place, key)
        return VideoImages(video, place.start[position] + times, self._videos)

    def _load_stills(
        self, path: pathlib.Path, rows: np.ndarray, key: str, steps: np.ndarray
    ) -> np.ndarray:
        values = self._rows.read(path, key, rows[steps], is_large=True)
        height, width, _ = self._info.images[key].shape
        return decode_stills(values, (height, width), key, path, self._info.root)


def _positions(info: Info, count: int, split: str | None) -> np.ndarray:
    """Returns the positions of the episodes of a split; lerobot itself reads all of them."""
    if split is None:
        return np.arange(count)
    if split not in info.splits:
        raise ValueError(
            f"split must be one of {sorted(info.splits)} of {info.root}, got {split!r}; leave it "
            "out to read all episodes."
        )
    positions = np.arange(count)[info.splits[split]]
    if not len(positions):
        raise ValueError(f"split {split!r} of {info.root} must hold episodes, got none of {count}.")
    return positions


def _with_stored_columns(info: Info, table: EpisodeTable) -> Info:
    """Returns a description with the columns of the first Parquet file.

    Those of v2 are the file's, as lerobot reads them; those of v3 are those of info.json, and of
    the file where it has others.
    """
    first = table.index[:1], table.data.chunk[:1], table.data.file[:1]
    path = info.root / paths_of(info.data_path, info, *first)[0]
    columns, other = dict(info.columns) if info.has_shared_files else {}, []
    for field in read_schema(path):
        if field.name in info.images or field.name in columns:
            continue
        feature = feature_of(field.type, info.columns.get(field.name))
        if feature is None:
            other.append(field.name)
        else:
            columns[field.name] = feature
    if other:
        warnings.warn(
            f"columns {other} of {path} are left out: they hold neither numbers nor texts",
            stacklevel=4,
        )
    return info._replace(columns=columns)


def probe_v3(path: pathlib.Path) -> bool:
    """Returns True if `path` is a LeRobot data set of version 3, or of an unknown version."""
    return (path / INFO_PATH).is_file() and not probe_v2(path)


def probe_v2(path: pathlib.Path) -> bool:
    """Returns True if `path` is a LeRobot data set of version 2."""
    return _version(path).startswith("v2.")


def _version(path: pathlib.Path) -> str:
    try:
        return str(read_json(path / INFO_PATH).get("codebase_version"))
    except (OSError, ValueError):  # opening the data set raises the error
        return ""
