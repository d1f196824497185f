"""Cached tokens of a frozen backbone: shards of bounded size, memory-mapped.

    folder/shard_00000/tokens.npy      [R, N, D], bfloat16 as its bits in uint16
    folder/shard_00000/mask.npy        [R, N] bool
    folder/shard_00000/files.json      size and CRC-32 of both files, and their place
    folder/shard_00001/…

A shard is complete or absent, so that an interrupted program continues after its last one. All
shards but the last have the same number of frames R, which depends on the sizes only.
"""

import contextlib
import io
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from vla_jax.data import shard_files
from vla_jax.data.shard_files import shard_folder
from vla_jax.files import replacing
from vla_jax.types import Tokens

CacheDtype = Literal["float32", "bfloat16", "float16"]
SHARD_BYTES = 2**28  # bytes of a shard, at most
_TOKENS, _MASK = "tokens.npy", "mask.npy"
_DTYPES = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("<f2"),
}
_STORED = {**_DTYPES, "bfloat16": np.dtype("<u2")}  # .npy files have no bfloat16


class TokenSizes(NamedTuple):
    """Sizes of the tokens of a data set."""

    num_frames: int  # F
    num_tokens: int  # N, tokens per frame
    token_dim: int  # D, features of a token
    dtype: CacheDtype

    @property
    def frame_bytes(self) -> int:
        """Bytes of the tokens and the mask of one frame."""
        return self.num_tokens * (self.token_dim * _DTYPES[self.dtype].itemsize + 1)

    @property
    def total_bytes(self) -> int:
        """Bytes of all frames."""
        return self.num_frames * self.frame_bytes

    @property
    def frames_per_shard(self) -> int:
        """Frames R of every shard but the last."""
        return max(1, SHARD_BYTES // self.frame_bytes)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_frames // self.frames_per_shard)

    def frames(self, shard: int) -> range:
        """Returns the frames of a shard."""
        first = shard * self.frames_per_shard
        return range(first, min(first + self.frames_per_shard, self.num_frames))


class ShardedArray:
    """Memory-mapped `.npy` files with rows `[R, ...]`, indexed like their concatenation.

    Only rows that are read are in memory. Pickled as file names.
    """

    def __init__(self, files: Sequence[pathlib.Path], dtype: str) -> None:
        """Opens the files, which have the same number of rows, except for the last one.

        Args:
          files: in order.
          dtype: of the rows; files of "bfloat16" hold its bits in uint16.
        """
        self.files, self._name = tuple(files), dtype
        self._maps = [np.load(file, mmap_mode="r").view(_dtype(dtype)) for file in self.files]
        num_rows = sum(map(len, self._maps))
        self.shape: tuple[int, ...] = (num_rows, *self._maps[0].shape[1:])
        self.ndim: int = len(self.shape)
        self.dtype: np.dtype = self._maps[0].dtype

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the rows at an integer, a slice, or an array of integers, in memory."""
        rows = range(len(self))[index] if isinstance(index, int | slice) else index
        rows = np.asarray(rows)
        shards, places = np.divmod(np.where(rows < 0, rows + len(self), rows), len(self._maps[0]))
        used = np.unique(shards)
        if len(used) == 1:
            return np.asarray(self._maps[used[0]])[places]
        found = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        for shard in used:
            here = shards == shard
            found[here] = self._maps[shard][places[here]]
        return found

    def __reduce__(self) -> tuple[type["ShardedArray"], tuple[tuple[pathlib.Path, ...], str]]:
        """Pickles the file names, so that worker processes share the pages."""
        return ShardedArray, (self.files, self._name)


def missing_shards(folder: pathlib.Path, sizes: TokenSizes) -> list[int]:
    """Returns the shards that are not written yet.

    Args:
      folder: folder of the shards, which may be absent.
      sizes: of all tokens.
    """
    return shard_files.missing(folder, sizes.num_shards)


def write_shard(
    folder: pathlib.Path,
    shard: int,
    sizes: TokenSizes,
    chunks: Iterable[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Writes a shard, which is complete or absent; one that exists by now is left as it is.

    Args:
      folder: folder of the shards; created if necessary.
      shard: index of the shard.
      sizes: of all tokens.
      chunks: tokens `[C, N, D]` and mask `[C, N]` of its frames, in order.

    Raises:
      OSError: the disk is full.
      ValueError: the chunks have another number of frames than the shard.
    """
    path = shard_folder(folder, shard)
    if path.exists():
        return
    lead = (len(sizes.frames(shard)), sizes.num_tokens)
    stored = _STORED[sizes.dtype]
    headers = (_header(stored, (*lead, sizes.token_dim)), _header(np.dtype(bool), lead))
    names, checksums, written = (_TOKENS, _MASK), [0, 0], 0
    with replacing(path) as part:
        part.mkdir()
        # No memory map: writing to one on a full disk kills the process.
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context((part / name).open("wb")) for name in names]
            _append(files, checksums, headers)
            for tokens, mask in chunks:
                rows = np.ascontiguousarray(tokens, _DTYPES[sizes.dtype]).view(stored)
                _append(files, checksums, (rows.tobytes(), np.asarray(mask, bool).tobytes()))
                written += len(rows)
        if written != lead[0]:
            raise ValueError(f"shard {shard} must have {lead[0]} frames, got {written}.")
        checks = dict(zip(names, checksums, strict=True))
        shard_files.write_index(part, path, sizes.frames(shard), checks)


def check_shard(folder: pathlib.Path, shard: int, sizes: TokenSizes, *, checksums: bool) -> None:
    """Raises a ValueError if a written shard is damaged, or belongs to another place.

    Args:
      folder: folder of the shards.
      shard: index of a written shard.
      sizes: of all tokens.
      checksums: whether to read the files and compare their checksums, not only their sizes.

    Raises:
      ValueError: a file is damaged or missing, or the shard is another one.
    """
    path, frames = shard_folder(folder, shard), sizes.frames(shard)
    remedy = "delete this folder, and it is computed again"
    try:
        shard_files.check_files(path, frames, (_TOKENS, _MASK), checksums=checksums)
        shape = np.load(path / _TOKENS, mmap_mode="r").shape
        wanted = (len(frames), sizes.num_tokens, sizes.token_dim)
        if shape != wanted:
            raise ValueError(f"tokens are {list(shape)} instead of {list(wanted)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}.") from error


def check_shards(folder: pathlib.Path, shards: Sequence[int], sizes: TokenSizes) -> None:
    """Reads written shards once, several at a time, and compares their checksums.

    Args:
      folder: folder of the shards.
      shards: indices of written shards.
      sizes: of all tokens.

    Raises:
      ValueError: a shard is damaged.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        for _ in pool.map(lambda s: check_shard(folder, s, sizes, checksums=True), shards):
            pass


def open_tokens(folder: pathlib.Path, sizes: TokenSizes) -> Tokens:
    """Returns the tokens `[F, N, D]` and their mask `[F, N]` as arrays on disk.

    Args:
      folder: folder with all shards.
      sizes: of all tokens.

    Raises:
      ValueError: a shard is missing, or the size of a file is wrong.
    """
    shards = range(sizes.num_shards)
    for shard in shards:
        check_shard(folder, shard, sizes, checksums=False)
    arrays: list[Any] = [
        ShardedArray([shard_folder(folder, shard) / name for shard in shards], dtype)
        for name, dtype in ((_TOKENS, sizes.dtype), (_MASK, "bool"))
    ]
    return Tokens(*arrays)


def _dtype(name: str) -> np.dtype:
    return np.dtype(bool) if name == "bool" else _DTYPES[name]


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _append(files: Sequence[Any], checksums: list[int], blocks: Sequence[bytes]) -> None:
    """Appends a block to each file and updates the checksums."""
    for number, (file, block) in enumerate(zip(files, blocks, strict=True)):
        file.write(block)
        checksums[number] = zlib.crc32(block, checksums[number])
