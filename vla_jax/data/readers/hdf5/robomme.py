"""RoboMME's demonstrations: `episode_<i>/timestep_<t>/{obs, action, info}`, one group per step.

Some episodes begin with a video that is shown before the task; its steps have `info/is_video_demo`
set and no target. The column `action_mask`, which is not in the file, is False there. Where the
file holds "None" or nothing instead of an action, the row is NaN. The rate is not in the file; it
is that of ManiSkill, 20 Hz.

Source: RoboMME, `doc/h5_data_format.md` of robomme_benchmark (08c1283).
"""

import pathlib
from typing import Any

import numpy as np

from vla_jax.data.raw import Feature, RawDataset
from vla_jax.data.readers.fields import FieldMap, GripperRange
from vla_jax.data.readers.hdf5.camera_fields import camera_fields
from vla_jax.data.readers.hdf5.hdf5_files import OpenFiles, hdf5_paths, import_h5py, reading
from vla_jax.data.readers.hdf5.hdf5_objects import (
    by_number,
    check_dataset,
    check_kind,
    child,
    is_image,
    names_of,
    read_all,
    text,
    walk,
)
from vla_jax.data.readers.hdf5.layouts import layout_of
from vla_jax.data.readers.hdf5.stored_episodes import (
    EpisodeContent,
    EpisodeIndex,
    EpisodePlace,
    Storage,
    group_of,
    make_source,
)

FPS = 20.0  # Hz
ACTION = "action/joint_action"
IS_SHOWN = "info/is_video_demo"
MASK = "action_mask"
GOALS = ("task_goal", "language goal")  # names of the instruction, the second in older files
STEP = "timestep_"


def probe(path: pathlib.Path) -> bool:
    """Returns True for RoboMME's demonstrations."""
    return layout_of(path) == "robomme"


def open(path: pathlib.Path, *, split: str | None = None) -> RawDataset:
    """Opens the raw view.

    Episodes are named `episode_3`, in files with a group per task `<task>/episode_3`, in a folder
    with several files `1/episode_3`.

    Args:
      path: file, or folder of files.
      split: must be None, the format has no splits.

    Raises:
      FileNotFoundError: there is no HDF5 file.
      ValueError: damaged files; no episodes.
      ImportError: h5py is missing.
    """
    if split is not None:
        raise ValueError(f"{path}: RoboMME's demonstrations have no splits, got split {split!r}.")
    files = hdf5_paths(path)
    if not files:
        raise FileNotFoundError(f"{path} must hold HDF5 files (.hdf5, .h5), got none.")
    opened, places, lengths = OpenFiles(), [], []
    for number, file in enumerate(files):
        root = opened.get(file)
        prefix = f"{number}/" if len(files) > 1 else ""
        for group in _episodes(root, file):
            length, goal = _summary(root, group, file)
            places.append(EpisodePlace(prefix + group, number, group, goal))
            lengths.append(length)
    if not places:
        raise ValueError(f"{path} must hold at least one episode, got none.")
    index = EpisodeIndex(
        "robomme", tuple(files), places, np.array(lengths, np.int64), FPS, ACTION, (), opened,
    )  # fmt: skip
    return make_source(path, index, Storage(_inspect, _column, _images))


def _episodes(root: Any, file: pathlib.Path) -> list[str]:
    """Returns the paths of the episodes' groups: at the root, or in one group per task."""
    h5py = import_h5py()
    names = names_of(root, file)
    if any(name.startswith("episode_") for name in names):
        return by_number([n for n in names if n.startswith("episode_")], "episode_", file, "/")
    found = []
    for task in names:
        group = child(root, task, file)
        if isinstance(group, h5py.Group):
            inner = by_number(names_of(group, file), "episode_", file, task)
            found += [f"{task}/{name}" for name in inner]
    return found


def _summary(root: Any, group: str, file: pathlib.Path) -> tuple[int, str]:
    """Returns number of steps, without a look at their names, and instruction of an episode.

    Zero steps mean that the episode cannot be read.
    """
    try:
        episode = child(root, group, file)
        goal = _goal(episode, file)
        with reading(file, episode.name):
            return max(0, len(episode) - ("setup" in episode)), goal
    except ValueError:  # reading the episode raises the error
        return 0, ""


def _goal(episode: Any, file: pathlib.Path) -> str:
    """Returns the instruction, the first if there are several wordings."""
    setup = child(episode, "setup", file)
    names = names_of(setup, file)
    goal = child(setup, next((name for name in GOALS if name in names), GOALS[0]), file)
    return text(_value(goal, file), file, goal.name)


def _value(dataset: Any, file: pathlib.Path) -> Any:
    """Returns the content of a small data set; texts as str or an array of str."""
    return read_all(dataset, file)[()]


def _steps(episode: Any, file: pathlib.Path, length: int) -> list[Any]:
    names = [name for name in names_of(episode, file) if name != "setup"]
    names = by_number(names, STEP, file, episode.name)
    if len(names) != length:
        raise ValueError(f"{file}: {episode.name} has changed since the data set was opened.")
    return names


def _inspect(episode: Any, file: pathlib.Path, length: int, index: EpisodeIndex) -> EpisodeContent:
    """Returns the types of the keys of the last step, and of the first where these are missing."""
    _goal(episode, file)
    names = _steps(episode, file, length)
    if not names:
        raise ValueError(f"{file}: {episode.name} must hold {STEP}0, …, got no step; leave it out.")
    content = EpisodeContent({}, {})
    for name in dict.fromkeys((names[-1], names[0])):
        for key, dataset in walk(child(episode, name, file), file).items():
            with reading(file, dataset.name):
                kind = _kind(dataset)
            check_kind(kind, dataset, file)
            known = content.columns.get(key) or content.images.get(key)
            if kind is not None and (known is None or known.dtype == "str"):
                (content.images if is_image(kind) else content.columns)[key] = kind
    if IS_SHOWN in content.columns:
        content.columns[MASK] = Feature("bool", ())
    return content


def _kind(dataset: Any) -> Feature | None:
    h5py = import_h5py()
    if h5py.check_string_dtype(dataset.dtype) is not None:
        return Feature("str", tuple(dataset.shape))
    return (
        Feature(dataset.dtype.name, tuple(dataset.shape)) if dataset.dtype.kind in "biuf" else None
    )


def _column(index: EpisodeIndex, episode: int, key: str) -> np.ndarray:
    if key == MASK:
        return ~_column(index, episode, IS_SHOWN).astype(bool).reshape(-1)
    group, path = group_of(index, episode)
    names = _steps(group, path, int(index.lengths[episode]))
    rows = [_row(group, name, key, path) for name in names]
    known = [row for row in rows if row is not None] or [np.array("")]
    shape, dtype = known[-1].shape, known[-1].dtype
    for name, row in zip(names, rows, strict=True):
        if row is not None and (row.shape != shape or row.dtype.kind != dtype.kind):
            raise ValueError(
                f"{path}: {group.name}/{name}/{key} must be {dtype} {shape} as in the last step, "
                f"got {row.dtype} {row.shape}; leave the episode out."
            )
    missing = np.full(shape, np.nan if dtype.kind == "f" else "")
    if dtype.kind not in "fU" and len(known) < len(rows):
        raise ValueError(f"{path}: {group.name} must hold {key} at every step; leave it out.")
    return np.stack([missing.astype(dtype) if row is None else row for row in rows])


def _row(episode: Any, name: str, key: str, path: pathlib.Path) -> np.ndarray | None:
    """Returns one step of a column; None where the file holds no action."""
    step = child(episode, name, path)
    is_action = key.startswith("action/")
    with reading(path, f"{step.name}/{key}"):
        exists = key in step
    if is_action and not exists:
        return None
    value = np.asarray(_value(child(step, key, path), path))
    is_none = is_action and value.dtype.kind == "U" and value.shape == () and value == "None"
    return None if is_none else value


def _images(index: EpisodeIndex, episode: int, key: str, steps: np.ndarray) -> np.ndarray:
    group, path = group_of(index, episode)
    names = _steps(group, path, int(index.lengths[episode]))
    images = []
    for step in steps if len(steps) else (0,):
        dataset = child(group, f"{names[step]}/{key}", path)
        check_dataset(dataset, path)
        images.append(read_all(dataset, path))
        if images[-1].shape != images[0].shape or images[-1].dtype != np.uint8:
            raise ValueError(
                f"{path}: {dataset.name} must be uint8 {images[0].shape}, got "
                f"{images[-1].dtype} {images[-1].shape}; leave the episode out."
            )
    return np.stack(images)[: len(steps)]


def fields(raw: RawDataset) -> FieldMap:
    """Returns the fields of RoboMME's baselines: 7 joint angles and a gripper, -1 closed, +1 open.

    `action_mask` is False in the video that is shown before the task.
    """
    proprio = ("obs/joint_state", "obs/gripper_state[:1]")
    has_proprio = all(key.partition("[")[0] in raw.columns for key in proprio)
    columns = {"action": (ACTION,), **({"proprio": proprio} if has_proprio else {})}
    if MASK in raw.columns:
        columns["action_mask"] = (MASK,)
    return FieldMap(
        cameras=camera_fields(
            (key for key in raw.images if key.startswith("obs/")), ("obs/front_rgb",)
        ),
        columns=columns,
        grippers=(-1,),
        gripper_range=GripperRange(closed=-1.0, opened=1.0),
        robot="robomme",
    )
