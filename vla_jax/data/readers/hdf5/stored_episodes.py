"""Raw view of episodes each of which is one HDF5 group with one data set per key."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.data.lazy_lengths import LazyLengths
from vla_jax.data.raw import Feature, Lazy, LazyEpisodes, RawDataset, RawEpisode
from vla_jax.data.readers.hdf5.hdf5_files import OpenFiles, reading
from vla_jax.data.readers.hdf5.hdf5_objects import (
    attribute,
    check_dataset,
    check_kind,
    child,
    feature,
    is_image,
    num_rows,
    read_all,
    read_steps,
    walk,
)
from vla_jax.data.still_images import StillImages

ENCODED = "observations/images/"  # ALOHA's cameras, which may hold JPEG files
MAX_TRIES = 32  # damaged episodes at the start
PER_STEP = ("obs", "next_obs", "observations", "action", "actions", "action_dict", "rewards",
            "dones", "states", "robot_states")  # fmt: skip


class EpisodePlace(NamedTuple):
    """One episode's group."""

    name: str  # of the episode in the raw view
    file: int  # index in `EpisodeIndex.files`
    group: str  # path of the group inside the file
    instruction: str


class EpisodeIndex(NamedTuple):
    """All episodes of a source; can be pickled."""

    kind: str  # key of READERS
    files: tuple[pathlib.Path, ...]
    places: Sequence[EpisodePlace]
    lengths: np.ndarray | LazyLengths  # [E] int64, 0 for an episode that cannot be read
    fps: float | None  # Hz
    actions: str  # key whose rows are the steps
    skip: tuple[str, ...]  # children of an episode's group that are not per step
    opened: OpenFiles


class EpisodeContent(NamedTuple):
    """Types of the keys of one episode."""

    columns: dict[str, Feature]
    images: dict[str, Feature]


class EpisodeLazy(Lazy[Any]):
    """Mapping of one episode; a key of the data set that this episode lacks is explained."""

    def __init__(
        self, keys: Sequence[str], get: Callable[[str], Any], others: Sequence[str], place: str
    ) -> None:
        """Stores the arguments.

        Args:
          keys: keys of this episode.
          get: computes the value of a key; must be picklable.
          others: keys of the first episode.
          place: file and group, for the message.
        """
        super().__init__(keys, get)
        self._others = tuple(others)
        self._place = place

    def __getitem__(self, key: str) -> Any:
        """Computes the value of a key.

        Raises:
          KeyError: no episode has this key.
          ValueError: only this episode lacks it.
        """
        if key in self._others and key not in self._keys:
            raise ValueError(
                f"{self._place} must hold {key!r} as the first episode does; leave the episode "
                "out or the key."
            )
        return super().__getitem__(key)


class Storage(NamedTuple):
    """One way to store an episode in a group."""

    # (group, file, T, index) -> types of its keys
    inspect: Callable[[Any, pathlib.Path, int, EpisodeIndex], EpisodeContent]
    # (index, episode, key) -> [T, ...]
    column: Callable[[EpisodeIndex, int, str], np.ndarray]
    # (index, episode, key, ascending distinct steps [n]) -> [n, h, w, 3] uint8
    images: Callable[[EpisodeIndex, int, str, np.ndarray], np.ndarray]


def make_source(path: pathlib.Path, index: EpisodeIndex, storage: Storage) -> RawDataset:
    """Returns the raw view of an index; reads the types of the first episode.

    An episode that cannot be read raises its error when it is indexed.

    Args:
      path: file or folder of the data set.
      index: its episodes, at least one.
      storage: functions of the layout.

    Raises:
      ValueError: the first episodes are damaged.
    """
    first = _first_content(index, storage)
    root = path if path.is_dir() else path.parent
    sizes = tuple((str(file.relative_to(root)), file.stat().st_size) for file in index.files)
    names = tuple((place.name, place.instruction) for place in index.places)
    return RawDataset(
        kind=index.kind,
        path=path,
        episodes=LazyEpisodes(
            len(index.places), functools.partial(make_episode, index, first, storage)
        ),
        lengths=index.lengths,
        columns=first.columns,
        images=first.images,
        fps=index.fps,
        fingerprint=digest(index.kind, sizes, names),
    )


def group_of(index: EpisodeIndex, episode: int) -> tuple[Any, pathlib.Path]:
    """Returns the h5py group of an episode, and its file."""
    place = index.places[episode]
    path = index.files[place.file]
    return child(index.opened.get(path), place.group, path), path


def _first_content(index: EpisodeIndex, storage: Storage) -> EpisodeContent:
    """Returns the types of the first episode that can be read, of the first few."""
    for episode in range(min(len(index.places), MAX_TRIES)):
        with contextlib.suppress(ValueError):  # raised below, or when it is read
            return inspect_episode(index, episode, storage)
    return inspect_episode(index, 0, storage)


def inspect_episode(index: EpisodeIndex, episode: int, storage: Storage) -> EpisodeContent:
    """Returns the types of an episode's keys.

    Raises:
      ValueError: the episode is damaged; its actions are not numbers.
    """
    group, path = group_of(index, episode)
    content = storage.inspect(group, path, int(index.lengths[episode]), index)
    if index.actions not in content.columns or content.columns[index.actions].dtype == "str":
        raise ValueError(
            f"{path}: {group.name}/{index.actions} must be an array of numbers; leave the episode "
            "out."
        )
    return content


def inspect_group(
    group: Any, path: pathlib.Path, length: int, index: EpisodeIndex
) -> EpisodeContent:
    """Returns the types of the data sets of an episode that have one row per step.

    Data sets of another length, and of other types than numbers and texts, describe the episode
    as a whole; they are left out.

    Raises:
      ValueError: no steps; `num_samples` is not the number of actions; an observation, action,
        reward or state has another number of rows.
    """
    if not length:
        num_rows(group, index.actions, path)  # explains what is missing
        raise ValueError(
            f"{path}: {group.name}/{index.actions} must have at least one step, got none; leave "
            "the episode out."
        )
    samples = attribute(group, "num_samples", path)
    is_number = isinstance(samples, int | float | np.number)  # not an array or a text
    if samples is not None and not (is_number and samples == length):
        raise ValueError(
            f"{path}: num_samples of {group.name} must be the number of its actions, expected "
            f"{length}, got {samples!r:.40}; correct the attribute."
        )
    content = EpisodeContent({}, {})
    for key, dataset in walk(group, path, skip=index.skip).items():
        with reading(path, dataset.name):
            rows = dataset.shape[0] if dataset.shape else None
            kind = feature(dataset) if rows == length else None
        is_per_step = key.partition("/")[0] in PER_STEP
        if rows != length and is_per_step:
            raise ValueError(
                f"{path}: {dataset.name} must have {length} rows, one per action, got "
                f"{rows if rows is not None else 'a single value'}; leave the episode out."
            )
        if kind is None and is_per_step and not key.startswith(ENCODED):
            check_kind(kind, dataset, path)
        if kind is not None:
            check_dataset(dataset, path)  # bounds the number of steps by what is on disk
            (content.images if is_image(kind) else content.columns)[key] = kind
    return content


def make_episode(
    index: EpisodeIndex, first: EpisodeContent, storage: Storage, episode: int
) -> RawEpisode:
    """Returns the episode at an index."""
    place, length = index.places[episode], int(index.lengths[episode])
    content = inspect_episode(index, episode, storage)
    where = f"{index.files[place.file]}: {place.group or '/'}"
    images = functools.partial(_images, index, episode, content.images, storage)
    return RawEpisode(
        name=place.name,
        columns=EpisodeLazy(
            list(content.columns),
            functools.partial(storage.column, index, episode),
            list(first.columns),
            where,
        ),
        images=EpisodeLazy(list(content.images), images, list(first.images), where),
        instructions=(place.instruction,) * length,
        timestamps=np.arange(length) / (index.fps or 1.0),
    )


def load_column(index: EpisodeIndex, episode: int, key: str) -> np.ndarray:
    """Returns a data set of an episode; see `Storage.column`."""
    group, path = group_of(index, episode)
    column = read_all(child(group, key, path), path)
    if len(column) != index.lengths[episode]:
        raise ValueError(f"{path}: {group.name}/{key} has changed since the data set was opened.")
    return column


def _images(
    index: EpisodeIndex, episode: int, kinds: Mapping[str, Feature], storage: Storage, key: str
) -> StillImages:
    height, width, _ = kinds[key].shape
    load = functools.partial(storage.images, index, episode, key)
    return StillImages(int(index.lengths[episode]), (height, width), load)


def load_arrays(index: EpisodeIndex, episode: int, key: str, steps: np.ndarray) -> np.ndarray:
    """Returns images `[n, h, w, 3]` that are stored as arrays; see `Storage.images`."""
    group, path = group_of(index, episode)
    dataset = child(group, key, path)
    check_dataset(dataset, path)
    return read_steps(dataset, steps, path)


ONE_DATA_SET_PER_KEY = Storage(inspect_group, load_column, load_arrays)
