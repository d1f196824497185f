"""Episodes of a LeRobot data set as columns: length, files and start in each camera's video."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.readers.lerobot import layout
from vla_jax.data.readers.lerobot.info import REPAIR, Info, is_integer, wrong
from vla_jax.data.readers.lerobot.parquet_files import damage_in_one_sentence, read_table

EPISODES_JSONL, TASKS_JSONL = "meta/episodes.jsonl", "meta/tasks.jsonl"  # v2
MAX_FILE_NUMBER = 10**9


class FilePlaces(NamedTuple):
    """Files of all episodes, as the numbers of folder and file."""

    chunk: np.ndarray  # [E] int64
    file: np.ndarray  # [E] int64
    start: np.ndarray  # [E] float64, seconds of the episode's time 0 in the video; 0 for numbers


class EpisodeTable(NamedTuple):
    """All episodes, by ascending episode index."""

    index: np.ndarray  # [E] int64, episode index; may have gaps
    lengths: np.ndarray  # [E] int64, steps
    data: FilePlaces
    videos: Mapping[str, FilePlaces]  # camera -> place


def read_episodes(info: Info) -> EpisodeTable:
    """Reads the table of episodes.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: damaged, or contradicts `meta/info.json`.
      ImportError: pyarrow is missing.
    """
    table = _read_shared(info) if info.has_shared_files else _read_separate(info)
    where = info.root / ("meta/episodes" if info.has_shared_files else EPISODES_JSONL)
    repeated = np.flatnonzero(np.diff(table.index) == 0)
    if len(repeated):
        got = f"episode {table.index[repeated[0]]} twice"
        wrong(where, "episode_index", "different for every episode", got)
    if not len(table.index) or table.index[0] < 0:
        wrong(where, "episode_index", "at least one index from 0 on", table.index[:1].tolist())
    if table.lengths.min() < 1 or table.lengths.max() > 2**40:
        bad = int(np.flatnonzero((table.lengths < 1) | (table.lengths > 2**40))[0])
        got = int(table.lengths[bad])
        wrong(where, f"length of episode {table.index[bad]}", "at least one step", got)
    count, frames = len(table.index), int(table.lengths.sum())
    stated = (
        count if info.num_episodes is None else info.num_episodes,
        frames if info.num_frames is None else info.num_frames,
    )
    if (count, frames) != stated:
        raise ValueError(
            f"{info.root} must hold {stated[0]} episodes with {stated[1]} frames as "
            f"{layout.INFO_PATH} states, got {count} with {frames} in {where}; {REPAIR}."
        )
    return table


def _read_separate(info: Info) -> EpisodeTable:
    """Reads `meta/episodes.jsonl` of v2: one Parquet file and video per episode."""
    path = info.root / EPISODES_JSONL
    rows = [(row.get("episode_index"), row.get("length")) for row in read_lines(path)]
    for line, (index, length) in enumerate(rows, 1):
        if not (is_integer(index) and is_integer(length)):
            wrong(path, f"episode_index and length in line {line}", "integers", (index, length))
    values = np.array(rows, np.int64).reshape(-1, 2)
    values = values[np.argsort(values[:, 0], kind="stable")]
    index = values[:, 0]
    zeros = np.zeros(len(index), np.int64)
    place = FilePlaces(index // info.chunks_size, zeros, np.zeros(len(index)))
    return EpisodeTable(index, values[:, 1], place, dict.fromkeys(info.videos, place))


def _read_shared(info: Info) -> EpisodeTable:
    """Reads `meta/episodes/*/*.parquet` of v3."""
    numbers = ("chunk_index", "file_index")
    videos = [f"videos/{key}/{n}" for key in info.videos for n in (*numbers, "from_timestamp")]
    names = ["episode_index", "length", *(f"data/{n}" for n in numbers), *videos]
    paths = sorted((info.root / "meta/episodes").glob("*/*.parquet"))
    if not paths:
        raise FileNotFoundError(
            f"data set {info.root} must hold meta/episodes/*/*.parquet, got none; copy it again."
        )
    tables = [read_table(path, names) for path in paths]
    columns = {
        name: np.concatenate(
            [_column(table, name, path) for table, path in zip(tables, paths, strict=True)]
        )
        for name in names
    }
    order = np.argsort(columns["episode_index"], kind="stable")
    columns = {name: column[order] for name, column in columns.items()}
    zeros = np.zeros(len(order))

    def place(prefix: str, start: np.ndarray) -> FilePlaces:
        return FilePlaces(columns[f"{prefix}/chunk_index"], columns[f"{prefix}/file_index"], start)

    return EpisodeTable(
        columns["episode_index"],
        columns["length"],
        place("data", zeros),
        {
            key: place(f"videos/{key}", columns[f"videos/{key}/from_timestamp"])
            for key in info.videos
        },
    )


def _column(table: Any, name: str, path: pathlib.Path) -> np.ndarray:
    """Returns a column of numbers: int64, or float64 for times."""
    import pyarrow as pa

    column, is_time = table[name], name.endswith("timestamp")
    if column.null_count:
        wrong(path, name, "a number for every episode", f"{column.null_count} nulls")
    try:
        numbers = column.cast(pa.float64() if is_time else pa.int64()).to_numpy()
    except pa.ArrowException:  # `wrong` raises
        wrong(path, name, "numbers of seconds" if is_time else "integers", str(column.type))
    if is_time and not np.isfinite(numbers).all():
        wrong(path, name, "finite", numbers[~np.isfinite(numbers)][0])
    if "/" in name and not is_time and len(numbers) and not _are_file_numbers(numbers):
        wrong(path, name, f"numbers in [0, {MAX_FILE_NUMBER}]", [numbers.min(), numbers.max()])
    return numbers


def _are_file_numbers(numbers: np.ndarray) -> bool:
    return bool(numbers.min() >= 0 and numbers.max() <= MAX_FILE_NUMBER)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a file with one JSON object per line.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: a line is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"file {path} is missing; copy the data set again.")
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")  # twice as fast as line by line
    except (ValueError, RecursionError):  # `_line` finds and raises the error
        rows = []
    if len(rows) != len(lines) or not all(isinstance(row, dict) for row in rows):
        rows = [_line(path, number, line) for number, line in enumerate(lines, 1)]
    return rows


def _line(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"line {number} of {path} must be JSON, got {str(error)[:100]}; {REPAIR}."
        ) from error
    if not isinstance(row, dict):
        wrong(path, f"line {number}", "a JSON object", row)
    return row


def read_tasks(info: Info) -> dict[int, str]:
    """Reads task index -> instruction.

    Raises:
      FileNotFoundError: the table of tasks is missing.
      ValueError: it is damaged, or a task has no text.
    """
    if info.has_shared_files:
        path = info.root / layout.TASKS_PATH
        indices, texts = _task_columns(path)
    else:
        path = info.root / TASKS_JSONL
        rows = read_lines(path)
        indices, texts = ([row.get(name) for row in rows] for name in ("task_index", "task"))
    for index, text in zip(indices, texts, strict=True):
        if not is_integer(index) or not isinstance(text, str):
            wrong(path, "task_index and task", "an index from 0 on and a text", (index, text))
    tasks = dict(zip(indices, texts, strict=True))
    if len(tasks) < len(indices):
        wrong(path, "task_index", "different for every task", sorted(indices)[:9])
    if info.has_shared_files and sorted(indices) == list(range(len(indices))) != indices:
        # lerobot takes the task at a position, whatever its index is
        wrong(path, "task_index", "0, 1, 2, … in this order", indices[:9], "sort the table by it")
    return tasks


def _task_columns(path: pathlib.Path) -> tuple[Sequence[Any], Sequence[Any]]:
    """Returns the indices and texts of v3; the text is the pandas index, under any name."""
    table = read_table(path)
    texts = [name for name in table.column_names if name != "task_index"]
    if len(texts) != 1 or table.num_columns != 2:
        raise ValueError(
            f"{path} must have the column task_index and one of texts, got {table.column_names}; "
            "copy the data set again."
        )
    with damage_in_one_sentence(path):
        return table["task_index"].to_pylist(), table[texts[0]].to_pylist()
