"""Parts of a conversion: consecutive episodes with a Parquet file and videos of their own.

A part is written by one process and does not depend on other parts: indices that count all
episodes before it are added when all parts are finished. Its JSON file is written last, so that a
part is finished exactly if it has one.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.conversion.conversion_plan import Plan
from vla_jax.data.raw import RawDataset, RawEpisode, RawImages
from vla_jax.data.readers.field_columns import field_column
from vla_jax.data.readers.lerobot import shards, stats
from vla_jax.data.readers.lerobot.episode_rows import stats_row, video_row
from vla_jax.files import write_json

PART_FRAMES, MAX_PARTS = 2000, 256  # frames of a part, at least; parts, at most
TASKS = "vla_jax.task"  # column of the texts in the Parquet file of a part
SHIFT = "shift"  # entry of an episode: largest distance of a timestamp to steps / fps, s
_FRAMES = 64  # decoded at a time

_NUMPY = {"float32": np.float32, "int64": np.int64, "bool": np.bool_, "string": np.str_}


class EpisodePart(NamedTuple):
    """Consecutive episodes."""

    index: int  # number of the part and of its files
    episodes: range  # indices in the source


class ConversionError(ValueError):
    """An episode of the source that cannot be converted."""

    def __init__(self, index: int, sentence: str) -> None:
        super().__init__(index, sentence)
        self.index = index
        self.sentence = sentence

    def __str__(self) -> str:
        return f"episode {self.index} cannot be converted: {self.sentence}"


def make_parts(lengths: np.ndarray) -> list[EpisodePart]:
    """Divides episodes of the given lengths `[E]`; the result depends on nothing else."""
    wanted = max(PART_FRAMES, -(-int(lengths.sum()) // MAX_PARTS))
    parts, start, frames = [], 0, 0
    for index, length in enumerate(lengths.tolist(), 1):
        frames += length
        if frames >= wanted or index == len(lengths):
            parts.append(EpisodePart(len(parts), range(start, index)))
            start, frames = index, 0
    return parts


def table_path(root: pathlib.Path, part: int) -> pathlib.Path:
    """Returns the path of a part's Parquet file."""
    return root / f"parts/{part:05d}.parquet"


def facts_path(root: pathlib.Path, part: int) -> pathlib.Path:
    """Returns the path of the JSON file of a finished part."""
    return root / f"parts/{part:05d}.json"


def write_part(
    root: pathlib.Path, raw: RawDataset, plan: Plan, part: EpisodePart, *, skip_bad: bool
) -> int:
    """Converts the episodes of a part; an unfinished attempt is replaced.

    Args:
      root: folder of the conversion.
      raw: the source.
      plan: names and types.
      part: the episodes.
      skip_bad: leave out episodes that cannot be read, instead of an error.

    Returns:
      Number of episodes left out.

    Raises:
      ConversionError: an episode cannot be read.
      OSError: the disk is full.
    """
    bad: dict[int, str] = {}
    while True:  # again without an episode whose frames turn out to be unreadable
        kept = [index for index in part.episodes if index not in bad]
        try:
            rows = _write(root, raw, plan, part.index, kept)
        except ConversionError as error:
            if not skip_bad:
                raise
            bad[error.index] = error.sentence
        else:
            break
    totals = {
        key: stats.total_stats(rows, key)
        for key in (*plan.columns, *plan.cameras)
        if rows and f"stats/{key}/mean" in rows[0]
    }
    facts = {"rows": rows, "totals": totals, "bad": {str(i): text for i, text in bad.items()}}
    write_json(facts_path(root, part.index), facts)
    return len(bad)


def _write(
    root: pathlib.Path, raw: RawDataset, plan: Plan, file_index: int, episodes: Sequence[int]
) -> list[dict[str, Any]]:
    """Writes the files of a part; returns length, videos and statistics of every episode."""
    import pyarrow.parquet as pq

    path, table = table_path(root, file_index), None
    path.parent.mkdir(parents=True, exist_ok=True)
    videos: dict[str, shards.Video] = {}
    rows = []
    try:
        for index in episodes:
            episode = _open(raw, index)
            columns, tasks = _columns(raw, plan, index, episode)
            row = {"length": len(tasks), SHIFT: _shift(episode, plan.fps)}
            row |= stats_row(stats.column_stats(columns))
            for key, camera in plan.cameras.items():
                images = _images(plan, index, episode, camera, key, len(tasks))
                if key not in videos:
                    height, width, _ = plan.image_features[key].shape
                    videos[key] = shards.new_video(root, key, file_index, (height, width), plan.fps)
                row |= stats_row({key: stats.image_stats(_sampled(index, images))})
                for start in range(0, len(tasks), _FRAMES):
                    frames = _read(index, images, slice(start, start + _FRAMES))
                    frames = frames[:, ::-1, ::-1] if plan.rotate_images else frames
                    videos[key] = shards.encode(videos[key], frames)
                row |= video_row(key, videos[key], len(tasks), plan.fps)
            chunk = shards.arrow_table(columns | {TASKS: tasks})
            table = table or pq.ParquetWriter(path, chunk.schema, compression="snappy")
            table.write_table(chunk)
            rows.append(row)
    finally:
        if table:
            table.close()
        for video in videos.values():
            shards.close_video(video)
    return rows


def _open(raw: RawDataset, index: int) -> RawEpisode:
    try:
        return raw.episodes[index]
    except (ValueError, OSError, LookupError) as error:
        raise ConversionError(index, _sentence(error)) from error


def _columns(
    raw: RawDataset, plan: Plan, index: int, episode: RawEpisode
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the columns and the texts of an episode, all of one length."""
    length = int(raw.lengths[index])
    try:
        columns = {key: _column(plan, key, episode.columns) for key in plan.columns}
        tasks = np.array(list(episode.instructions), np.str_)
    except (ValueError, OSError, LookupError) as error:
        raise ConversionError(index, _sentence(error)) from error
    for key, values in {**columns, TASKS: tasks}.items():
        if len(values) != length or not length:
            raise ConversionError(
                index, f"{key} must have {max(length, 1)} steps, got {len(values)}; repair it."
            )
    return columns, tasks


def _shift(episode: RawEpisode, fps: float) -> float:
    """Returns the largest distance of the timestamps to those of the converted episode, s."""
    distances = np.abs(episode.timestamps - np.arange(len(episode.timestamps)) / fps)
    return float(np.nan_to_num(distances, nan=np.inf).max(initial=0.0))


def _column(plan: Plan, key: str, source: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns a column `[T, ...]` with its type on disk."""
    feature, keys = plan.features[key], plan.columns[key]
    is_whole = len(keys) == 1 and keys[0] in source
    values = source[keys[0]] if is_whole else field_column(source, keys)
    with np.errstate(over="ignore"):  # above float32: infinity, as in lerobot
        return values.astype(_NUMPY[feature.dtype]).reshape(len(values), *feature.shape)


def _images(
    plan: Plan, index: int, episode: RawEpisode, camera: str, key: str, length: int
) -> RawImages:
    try:
        images = episode.images[camera]
    except (ValueError, OSError, LookupError) as error:
        raise ConversionError(index, _sentence(error)) from error
    shape = (length, *plan.image_features[key].shape)
    if tuple(images.shape) != shape:
        sentence = f"camera {camera} must have the shape {shape}, got {images.shape}; resize it."
        raise ConversionError(index, sentence)
    return images


def _sampled(index: int, images: RawImages) -> np.ndarray:
    """Returns the frames of which statistics are made."""
    count = min(len(images), stats.SAMPLED_FRAMES)
    return _read(index, images, np.linspace(0, len(images) - 1, count).astype(int))


def _read(index: int, images: RawImages, steps: slice | np.ndarray) -> np.ndarray:
    try:
        return images[steps]
    except (ValueError, OSError, LookupError) as error:
        raise ConversionError(index, _sentence(error)) from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
