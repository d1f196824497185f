"""Writer of LeRobot v3.0 data sets, episode by episode.

All files are written to `root.tmp`, which is renamed at the end: an interrupted recording never
looks like a data set. After an error, a signal or on a full disk it is deleted.
"""

import contextlib
import errno
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from vla_jax import folder_lock
from vla_jax.data.dataset import ACTION_MASK, CAMERAS, COLUMNS, Episode, check_episode
from vla_jax.data.raw import Feature
from vla_jax.data.readers.lerobot import layout, shards, stats
from vla_jax.data.readers.lerobot.episode_rows import (
    index_columns,
    position_row,
    stats_row,
    video_row,
    write_rows,
)
from vla_jax.data.readers.lerobot.features import features_json, write_description
from vla_jax.files import delete_folder

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(
    root: str | pathlib.Path,
    episodes: Iterable[Episode],
    *,
    fps: float,
    robot_type: str = "unknown",
    names: Mapping[str, Sequence[str]] | None = None,
    overwrite: bool = False,
    finish: Callable[[pathlib.Path], None] = lambda folder: None,
) -> pathlib.Path:
    """Writes episodes as they arrive; readable by lerobot and by `readers.open`.

    Only one episode is in memory at a time; the iterable may be a generator.

    Args:
      root: folder to create.
      episodes: records with the same fields and image sizes; gripper +1 open, -1 closed.
      fps: steps per second, Hz.
      robot_type: name of the robot, for the metadata.
      names: field -> name of each dimension; without names of the action its last number is
        named "gripper", so that readers know it.
      overwrite: replace an existing data set.
      finish: writes further files into the complete folder, before it gets its name.

    Returns:
      `root`.

    Raises:
      FileExistsError: `root` exists.
      BlockingIOError: another process is writing it.
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
    require_packages()
    root.parent.mkdir(parents=True, exist_ok=True)
    with hold_name(root), _complete_or_absent(root) as partial:
        features = _features(first, fps, names or {})
        rows, tasks = _write_episodes(partial, chain([first], episodes), fps)
        write_rows(partial, 0, rows)
        write_description(
            partial,
            features,
            list(tasks),
            {key: stats.total_stats(rows, key) for key in features},
            num_episodes=len(rows),
            num_frames=rows[-1]["dataset_to_index"],
            fps=fps,
            robot_type=robot_type,
        )
        finish(partial)
    return root


def hold_name(root: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Holds the lock of a data set that is being written, `.NAME.lock` beside it.

    Args:
      root: folder of the data set, in an existing folder.

    Raises:
      BlockingIOError: another process is writing it.
    """
    path = root.with_name(f".{root.name}.lock")
    return folder_lock.hold(path, f"data set {root}", "choose another folder")


@contextlib.contextmanager
def _complete_or_absent(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty folder, which gets the name `root` at the end, or is deleted by any error."""
    partial = root.with_name(root.name + ".tmp")
    delete_folder(partial)
    try:
        partial.mkdir()
        yield partial
        replace(root, partial)
    except OSError as error:
        if error.errno not in DISK_FULL:  # from the caller's iterator, with a more precise message
            raise
        raise OSError(
            error.errno,
            f"data set {root} could not be written ({error.strerror}), an earlier one is "
            "unchanged; free space and record again.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # an error above has the reason


def replace(root: pathlib.Path, finished: pathlib.Path) -> None:
    """Gives a finished folder the name `root`; a data set of this name is deleted."""
    if root.exists():
        replaced = root.with_name(root.name + ".old")
        root.rename(replaced)
        finished.rename(root)
        shutil.rmtree(replaced)
    else:
        finished.rename(root)


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
            length, task = len(episode.action), episode.instruction
            task_index = np.full(length, tasks.setdefault(task, len(tasks)))
            columns = _numbers(episode) | index_columns(index, total, task_index, fps)
            table = shards.append_rows(root, table, columns)
            row = position_row(index, total, length, [task], table.file_index, 0)
            row |= stats_row(stats.column_stats(columns))
            for key, images in _images(episode).items():
                video = shards.append_frames(root, videos.get(key), key, images, fps)
                row |= stats_row({key: stats.image_stats(images)})
                row |= video_row(key, video, length, fps)
                videos[key] = video
            rows.append(row)
            total += length
    finally:
        if table:
            table.writer.close()
        for video in videos.values():
            shards.close_video(video)
    return rows, tasks


def require_packages() -> None:
    """Raises an ImportError that names the extra, if pyarrow or PyAV is missing."""
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


def _numbers(episode: Episode) -> dict[str, np.ndarray]:
    """Returns key on disk -> Parquet column of one episode."""
    numbers = {**episode.observation, "action": episode.action}
    columns = {
        layout.FEATURE_KEYS[name]: np.asarray(numbers[name], np.float32)
        for name in COLUMNS
        if name in numbers
    }
    if episode.action_mask is not None:
        columns[layout.FEATURE_KEYS[ACTION_MASK]] = np.asarray(episode.action_mask, bool)[:, None]
    return columns


def _features(
    first: Episode, fps: float, names: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Returns `features` of info.json: dtype, shape and names of every per-frame value."""
    arm = tuple(f"arm_{number}" for number in range(first.action.shape[1] - 1))
    names = {"action": (*arm, "gripper"), **names}
    labels = {layout.FEATURE_KEYS[name]: tuple(value) for name, value in names.items()}
    columns = {
        key: Feature(str(column.dtype), column.shape[1:], labels.get(key, ()))
        for key, column in _numbers(first).items()
    }
    images = {key: Feature("uint8", value.shape[1:]) for key, value in _images(first).items()}
    described = features_json(columns, images, fps)
    order = [key for key in layout.FEATURE_KEYS.values() if key in described]
    return {key: described[key] for key in (*order, *layout.INDEX_KEYS)}
