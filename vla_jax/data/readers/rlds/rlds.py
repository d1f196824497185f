"""Reader of RLDS data sets: Open X-Embodiment, DROID and others that TFDS wrote.

The keys are those of a step, nested ones joined by "/". A value that TFDS stores as a ragged
array has two columns, `KEY/ragged_flat_values` (all values of the episode) and
`KEY/ragged_row_lengths_0` (how many belong to each step). The episodes are in the order of the
files, so that `train/7` is what TFDS reads as the split "train[7:8]".
"""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.data.raw import Feature, LazyEpisodes, RawDataset
from vla_jax.data.readers.rlds.open_x import fields, known_rate
from vla_jax.data.readers.rlds.record_index import read_index
from vla_jax.data.readers.rlds.rlds_episodes import RldsEpisodes, column_types
from vla_jax.data.readers.rlds.rlds_layout import (
    Split,
    Version,
    find_version,
    read_version,
    version_folders,
)
from vla_jax.data.readers.rlds.rlds_values import FEATURE_KINDS
from vla_jax.data.readers.rlds.tf_features import TfFeature, read_features

__all__ = ["episode_metadata", "fields", "open", "probe"]


def probe(path: pathlib.Path) -> bool:
    """Returns whether the path holds an RLDS data set, or the folder of its versions."""
    path = pathlib.Path(path)
    return bool(version_folders(path)) or (path.is_file() and ".tfrecord-" in path.name)


def open(path: pathlib.Path, *, split: str | None = None) -> RawDataset:
    """Opens a data set.

    Args:
      path: folder of a version, of a data set with versions, or one above it.
      split: name of one split; None means all.

    Returns:
      The raw view; `fps` is that of a known data set of Open X-Embodiment, otherwise None, and
      then the timestamps count steps.

    Raises:
      FileNotFoundError: a description or record file is missing.
      ValueError: no such split; no or several data sets; a damaged file.
      ImportError: a package of the extra `data` is missing.
    """
    reader = _open_episodes(pathlib.Path(path), split)
    paths = [path for each in reader.splits for path in each.paths if path.is_file()]
    files = [(path.name, path.stat().st_size) for path in paths]
    cameras = {key: each for key, each in reader.steps.items() if each.is_camera}
    return RawDataset(
        "rlds",
        reader.version.root,
        LazyEpisodes(len(reader.lengths), reader.episode),
        reader.lengths,
        column_types(reader.steps),
        {key: Feature("uint8", each.shape) for key, each in cameras.items()},
        reader.fps,
        digest(reader.version.name, files, reader.lengths, sorted(reader.steps.items())),
    )


def episode_metadata(
    path: pathlib.Path, *, split: str | None = None
) -> Sequence[Mapping[str, np.ndarray]]:
    """Returns what a data set stores once per episode, such as `episode_metadata/file_path`.

    Args:
      path: as in `open`.
      split: as in `open`.

    Returns:
      For every episode a mapping key -> value, read when it is indexed.
    """
    return _open_episodes(pathlib.Path(path), split).metadata()


def _open_episodes(path: pathlib.Path, split: str | None) -> RldsEpisodes:
    """Reads descriptions and indices."""
    version = read_version(find_version(path))
    steps, rest = read_features(version.root)
    splits = _chosen(version, split)
    step_sizes = _step_sizes(version, steps)
    indices = [read_index(version, each, step_sizes) for each in splits]
    return RldsEpisodes(version, splits, indices, steps, rest, known_rate(version.name))


def _chosen(version: Version, split: str | None) -> list[Split]:
    chosen = [each for each in version.splits if split in (None, each.name)]
    if not chosen:
        names = ", ".join(each.name for each in version.splits)
        raise ValueError(f"{version.root} has the splits {names}, got {split!r}; choose one.")
    return chosen


def _step_sizes(version: Version, steps: Mapping[str, TfFeature]) -> dict[str, int]:
    """Returns keys that tell the number of steps -> values per step; numbers before texts."""
    sizes = {}
    for kind, member in FEATURE_KINDS.items():
        for key, feature in steps.items():
            shape = feature.outer if member.is_bytes else (*feature.outer, *feature.shape)
            size = int(np.prod(shape, dtype=np.int64))
            if feature.kind == kind and not feature.is_dynamic and -1 not in shape and size > 0:
                sizes[key] = size
    numbers = {key: size for key, size in sizes.items() if steps[key].kind == "number"}
    if not sizes:
        raise ValueError(
            f"{version.root / 'features.json'}: no feature of the steps has a fixed size, so that "
            "their number is unknown; write the data set with is_first."
        )
    return numbers or sizes
