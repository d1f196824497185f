"""Files with the numbers of a LeRobot data set: rows of each episode, blocks, a hash of all."""

import os
from collections.abc import Iterator

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.data.readers.lerobot.episode_table import EpisodeTable, FilePlaces
from vla_jax.data.readers.lerobot.info import Info, paths_of

MAX_SIZES = 512  # files of a kind whose sizes are part of the fingerprint
BLOCK_BYTES = 2**25  # of all columns of the episodes that are read together


def expected_rows(info: Info, table: EpisodeTable) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first row of every episode, and the rows of its file, where lerobot wrote it."""
    if "{episode_index" in info.data_path:
        return np.zeros_like(table.lengths), table.lengths
    files = np.stack([table.data.chunk, table.data.file], axis=1)
    _, owner = np.unique(files, axis=0, return_inverse=True)
    owner = owner.reshape(-1)
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(table.lengths[order])
    totals = np.bincount(owner, weights=table.lengths).astype(np.int64)
    starts = np.empty_like(ends)
    starts[order] = ends - table.lengths[order]
    return starts - (np.cumsum(totals) - totals)[owner], totals[owner]


def block_ends(info: Info, table: EpisodeTable, positions: np.ndarray) -> np.ndarray:
    """Returns the ends of the blocks of chosen episodes that lie one after the other in a file.

    Args:
      info: description of the data set.
      table: its episodes.
      positions: `[E]` chosen rows of the table.

    Returns:
      `[num_blocks]` int64, exclusive, indices of `positions`; of v2 there is a block per episode.
    """
    chunk, file, _ = (part[positions] for part in table.data)
    lengths, starts = table.lengths[positions], expected_rows(info, table)[0][positions]
    follows = (starts[1:] == starts[:-1] + lengths[:-1]) & (np.diff(chunk) == 0)
    follows &= (np.diff(file) == 0) & ("{episode_index" not in info.data_path)
    numbers = sum(max(abs(int(np.prod(each.shape))), 1) for each in info.columns.values())
    piece = np.cumsum(lengths) // max(BLOCK_BYTES // (8 * numbers), 1)
    last = np.append(~follows | (np.diff(piece) > 0), True)
    return np.flatnonzero(last) + 1


def hash_files(info: Info, table: EpisodeTable) -> Iterator[str]:
    """Yields a hash of the Parquet files, then of each camera's videos: names, and some sizes.

    Raises:
      FileNotFoundError: a Parquet file is missing, or some of a camera's videos; a camera whose
        videos are all missing was not copied, which is found when its images are read.
    """
    for key, place in {"": table.data, **table.videos}.items():
        paths = _paths(info, table.index, place, key)
        found: set[str] = set()
        for folder in sorted({path.rpartition("/")[0] for path in paths}):
            if (info.root / folder).is_dir():
                names = os.listdir(info.root / folder)
                found.update([f"{folder}/{name}" for name in names] if folder else names)
        missing = [path for path in paths if path not in found]
        if missing and (not key or len(missing) < len(paths)):
            kind = "video" if key else "Parquet file"
            raise FileNotFoundError(
                f"{kind} {info.root / missing[0]} is missing, one of {len(missing)}; copy the data "
                "set again."
            )
        every = -(-len(paths) // MAX_SIZES)
        sizes = [
            0 if missing else os.stat(f"{info.root}/{path}").st_size for path in paths[::every]
        ]
        yield digest("\n".join(paths), len(missing), sizes)


def _paths(info: Info, episodes: np.ndarray, place: FilePlaces, key: str) -> list[str]:
    """Returns the different paths of the Parquet files or a camera's videos, sorted."""
    template = info.video_path if key else info.data_path
    chunk, file = place.chunk, place.file
    if "{episode_index" not in template:
        numbers = np.stack([episodes // info.chunks_size * info.chunks_size, chunk, file], axis=1)
        episodes, chunk, file = np.unique(numbers, axis=0).T
    return sorted(set(paths_of(template, info, episodes, chunk, file, key)))
