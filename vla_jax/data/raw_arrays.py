"""Raw view of episodes that are arrays in memory, for small formats and for tests."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.data.raw import Feature, RawDataset, RawEpisode
from vla_jax.data.still_images import StillImages


class ArrayEpisode(NamedTuple):
    """One episode of `T` steps as arrays."""

    columns: Mapping[str, np.ndarray]  # key -> [T, ...]
    images: Mapping[str, np.ndarray]  # key -> [T, h, w, 3] uint8
    instructions: Sequence[str]  # T texts


def make_raw(
    kind: str, path: pathlib.Path, episodes: Sequence[ArrayEpisode], *, fps: float
) -> RawDataset:
    """Returns the raw view of episodes that lie in memory.

    Args:
      kind: key of `READERS`.
      path: file or folder that they come from.
      episodes: at least one; all with the same keys.
      fps: steps per second, Hz.

    Raises:
      ValueError: no episodes.
    """
    if not episodes:
        raise ValueError(f"{path} must hold at least one episode, got none.")
    lengths = np.array([len(episode.instructions) for episode in episodes])
    first = episodes[0]
    return RawDataset(
        kind=kind,
        path=path,
        episodes=[
            RawEpisode(
                name=str(number),
                columns=episode.columns,
                images={key: _still(images) for key, images in episode.images.items()},
                instructions=episode.instructions,
                timestamps=np.arange(lengths[number]) / fps,
            )
            for number, episode in enumerate(episodes)
        ],
        lengths=lengths,
        columns={key: _feature(column) for key, column in first.columns.items()},
        images={key: _feature(images) for key, images in first.images.items()},
        fps=fps,
        fingerprint=digest(*((e.columns, e.images, tuple(e.instructions)) for e in episodes)),
    )


def _still(images: np.ndarray) -> StillImages:
    return StillImages(len(images), (images.shape[1], images.shape[2]), images.__getitem__)


def _feature(values: np.ndarray) -> Feature:
    return Feature("str" if values.dtype.kind in "UO" else values.dtype.name, values.shape[1:])
