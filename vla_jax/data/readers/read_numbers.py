"""Numbers and instructions of all episodes of a raw data set, in memory."""

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vla_jax.data.dataset import ACTION_MASK
from vla_jax.data.raw import EpisodeBlock, RawDataset
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.field_columns import field_column, parse_key
from vla_jax.data.readers.fields import FieldMap
from vla_jax.data.readers.grippers import hold_grippers

RATE_TOLERANCE = 0.1  # relative difference of the usual step from 1 / fps


class Numbers(NamedTuple):
    """Numbers and texts of the episodes that could be read, of `F` steps together."""

    columns: dict[str, np.ndarray]  # field -> [F, D] float32
    texts: list[str]  # different instructions
    text_index: np.ndarray  # [F] int32 into `texts`
    episodes: np.ndarray  # [E] int64, their indices in the raw data set


class _Piece(NamedTuple):
    """Checked numbers of consecutive episodes, of `n` steps together."""

    episodes: range  # in the raw data set
    columns: Mapping[str, np.ndarray]  # field -> [n, D] float32
    block: EpisodeBlock


def read_numbers(raw: RawDataset, fields: FieldMap, config: DatasetConfig) -> Numbers:
    """Reads the columns of the fields, and the instructions.

    Memory is taken as episodes are read, so that a wrong length in an index takes none.

    Args:
      raw: the data set.
      fields: columns to read, and grippers.
      config: treatment of bad episodes, and the instruction of steps without one.

    Raises:
      ValueError: an episode is damaged, holds NaN or infinity, or has other sizes or another rate
        than the others; with `skip_bad_episodes`: every episode is bad.
    """
    columns = {name: np.empty((0, 0), np.float32) for name in fields.columns}
    index = np.empty(0, np.int32)
    known: dict[str, int] = {}
    episodes: list[np.ndarray] = []
    bad: list[str] = []
    end, total = 0, int(raw.lengths.sum())
    for piece in _pieces(raw, fields, bad if config.skip_bad_episodes else None):
        stop = end + len(piece.block.timestamps)
        for name, values in piece.columns.items():
            columns[name] = _with_room(columns[name], stop, total, values.shape[1:])
            columns[name][end:stop] = values
        index = _with_room(index, stop, total, ())
        index[end:stop] = _text_index(piece.block, known, config.instruction)
        episodes.append(np.array(piece.episodes))
        end = stop
    if not end:
        raise ValueError(f"{raw.path} has no episode that can be read; {'; '.join(bad[:3])}")
    if bad:
        warnings.warn(
            f"left out {len(bad)} of {len(raw.episodes)} episodes of {raw.path} that cannot be "
            f"read: {'; '.join(bad[:3])}",
            stacklevel=4,
        )
    columns = {name: column[:end] for name, column in columns.items()}
    return Numbers(columns, list(known), index[:end], np.concatenate(episodes))


def _pieces(raw: RawDataset, fields: FieldMap, bad: list[str] | None) -> Iterator[_Piece]:
    """Yields the numbers of all episodes; adds the error of a bad one to `bad`, or raises it."""
    keys = sorted(
        {parse_key(key, raw.columns)[0] for keys in fields.columns.values() for key in keys}
    )
    sizes: dict[str, int] = {}
    count = len(raw.episodes)
    ends = range(1, count + 1) if raw.blocks is None else raw.blocks.ends.tolist()
    for start, stop in itertools.pairwise([0, *ends]):
        if raw.blocks is not None:
            try:
                block = raw.blocks.read(start, stop, keys)
                piece = _checked(raw, fields, range(start, stop), block, sizes)
            except ValueError:
                pass  # one by one, below, finds the episode that is wrong
            else:
                yield piece
                continue
        for number in range(start, stop):
            try:
                block = _read_episode(raw, number, keys)
                piece = _checked(raw, fields, range(number, number + 1), block, sizes)
            except ValueError as error:
                if bad is None:
                    raise
                bad.append(f"{number}: {error}")
            else:
                yield piece


def _read_episode(raw: RawDataset, number: int, keys: Sequence[str]) -> EpisodeBlock:
    episode = raw.episodes[number]
    columns = {key: episode.columns[key] for key in keys}
    texts = list(episode.instructions)
    return EpisodeBlock(
        f"episode {episode.name}", columns, texts, np.arange(len(texts)), episode.timestamps
    )


def _checked(
    raw: RawDataset,
    fields: FieldMap,
    episodes: range,
    block: EpisodeBlock,
    sizes: dict[str, int],
) -> _Piece:
    """Returns the fields of some episodes; `sizes` are those of the first, which this sets.

    Raises:
      ValueError: one of them is bad; the sentence names it where there is only one.
    """
    lengths = raw.lengths[episodes.start : episodes.stop]
    where = f"{block.name} of {raw.path}"
    columns = {
        field: _numbers(block.columns, keys, where) for field, keys in fields.columns.items()
    }
    found = [len(block.timestamps), len(block.text_index), *map(len, columns.values())]
    if set(found) != {int(lengths.sum())}:
        raise ValueError(
            f"{where} must have {lengths.sum()} steps as the index states, got {found} times, "
            "texts and numbers; copy the data set again."
        )
    for field, values in columns.items():
        _check_size(field, values.shape[1], sizes.get(field), where)
    _check_rate(raw.fps, block.timestamps, lengths, where)
    if fields.gripper_keeps_at_zero:
        parts = np.split(columns["action"], np.cumsum(lengths)[:-1])
        columns["action"] = np.concatenate([hold_grippers(part, fields) for part in parts])
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is refused below
        columns = {field: values.astype(np.float32) for field, values in columns.items()}
    _check_finite(columns, fields, where)
    sizes.update({field: values.shape[1] for field, values in columns.items()})
    return _Piece(episodes, columns, block)


def _numbers(columns: Mapping[str, np.ndarray], keys: Sequence[str], where: str) -> np.ndarray:
    """Returns some columns side by side, `[n, D]`.

    Raises:
      ValueError: a column of texts, or a selection without dimensions.
    """
    values = field_column(columns, keys)
    if values.dtype.kind not in "fiub" or not values.shape[1]:
        raise ValueError(
            f"{' and '.join(keys)} of {where} must select numbers, got {values.shape[1]} columns "
            f"of {values.dtype}; choose with --dataset.feature-keys."
        )
    return values


def _check_size(field: str, size: int, expected: int | None, where: str) -> None:
    if expected not in (None, size):
        raise ValueError(
            f"{field} must have {expected} numbers as in the first episode, got {size} in {where}; "
            "select dimensions with --dataset.feature-keys, or skip such episodes with "
            "--skip-bad-episodes."
        )


def _check_rate(fps: float | None, times: np.ndarray, lengths: np.ndarray, where: str) -> None:
    """Checks that most steps of each episode are 1 / fps apart."""
    if fps is None:
        return
    ends = np.cumsum(lengths)
    steps = np.diff(times)
    odd = ~(np.abs(steps * fps - 1) < RATE_TOLERANCE)
    odd[ends[:-1] - 1] = False  # from an episode to the next
    for number in np.unique(np.searchsorted(ends, np.flatnonzero(odd), side="right")):
        inside = slice(ends[number] - lengths[number], ends[number])
        step = float(np.median(np.diff(times[inside])))
        if not abs(step * fps - 1) < RATE_TOLERANCE:
            raise ValueError(
                f"fps of {where} must fit its timestamps, got {fps:g} Hz but steps of {step:.4g} "
                "s; correct the one that is wrong."
            )


def _check_finite(columns: Mapping[str, np.ndarray], fields: FieldMap, where: str) -> None:
    """Checks that all numbers are finite, but those of actions that do not exist."""
    for field, values in columns.items():
        wrong = ~np.isfinite(values)
        if field == "action" and ACTION_MASK in columns:
            wrong &= columns[ACTION_MASK] > 0.5
        if wrong.any():
            step, dim = (int(place[0]) for place in np.nonzero(wrong))
            kind = "NaN" if np.isnan(values[step, dim]) else "infinity"
            raise ValueError(
                f"{field} must be finite, got {kind} in number {dim} of "
                f"{' + '.join(fields.columns[field])} at step {step} of {where}; repair the data, "
                "or skip such episodes with --skip-bad-episodes."
            )


def _text_index(block: EpisodeBlock, known: dict[str, int], default: str) -> np.ndarray:
    """Returns the texts of all steps `[n]` as indices into `known`, which gets the new ones."""
    used, places = np.unique(block.text_index, return_inverse=True)
    texts = [str(block.texts[int(number)]) or default for number in used]
    return np.array([known.setdefault(text, len(known)) for text in texts], np.int32)[places]


def _with_room(rows: np.ndarray, needed: int, total: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array with at least `needed` rows `[*shape]`; copies seldom, as it doubles."""
    if needed <= len(rows):
        return rows
    # untouched pages of a new array take no memory
    larger = np.empty((max(needed, min(2 * needed, total)), *shape), rows.dtype)
    if len(rows):
        larger[: len(rows)] = rows
    return larger
