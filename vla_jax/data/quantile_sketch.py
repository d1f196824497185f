"""Quantiles of a stream of rows in bounded memory: a mergeable sketch, exact for small sets.

    sketch = empty(7)
    for actions in episodes:                 # each [T, 7]
        sketch = add(sketch, actions)
    q01, q99 = quantiles(sketch, (0.01, 0.99))

Level h holds rows of weight 2^h. A level with more than `capacity` rows is sorted, and every
second of its rows moves up with twice the weight, in turn the even and the odd ones. Each such
compaction changes the rank of any value by at most 2^h, so that the sum of these weights bounds
the error of every rank, in whatever order the sketches were made and merged: at most

    error / n <= ceil(log2(n / capacity)) / capacity

of n rows, 0.4 % for 10^8 rows with the default capacity; the sketch carries its own sum. Up to
`capacity` rows nothing is compacted and the quantiles are those of `numpy.quantile`.

Source: Munro and Paterson 1980, "Selection and sorting with limited storage"; Manku, Rajagopalan
and Lindsay 1998, "Approximate medians and other order statistics in one pass".
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CAPACITY = 4096  # rows per level


class QuantileSketch(NamedTuple):
    """Sketch of rows of D numbers; NaN and infinity are left out, dimension by dimension."""

    levels: tuple[np.ndarray, ...]  # level h: [rows, D] float64 of weight 2^h; NaN = left out
    is_odd: tuple[bool, ...]  # whether the next compaction of level h keeps its odd rows
    count: np.ndarray  # [D] int64, finite values seen
    error: int  # upper bound of the error of any rank, in rows
    capacity: int  # rows that a level may hold


def empty(dim: int, capacity: int = CAPACITY) -> QuantileSketch:
    """Returns a sketch of no rows.

    Args:
      dim: D, numbers per row.
      capacity: rows that a level may hold; memory is 8 D capacity bytes per doubling of the rows.

    Raises:
      ValueError: a capacity below 2.
    """
    if capacity < 2:
        raise ValueError(f"capacity must be at least 2 rows, got {capacity}.")
    return QuantileSketch((np.zeros((0, dim)),), (False,), np.zeros(dim, np.int64), 0, capacity)


def add(sketch: QuantileSketch, rows: np.ndarray) -> QuantileSketch:
    """Returns the sketch with some rows added.

    Args:
      sketch: of rows of D numbers.
      rows: `[T, D]`.
    """
    values = np.array(rows, np.float64)
    values[~np.isfinite(values)] = np.nan
    count = sketch.count + np.isfinite(values).sum(0)
    for start in range(0, max(len(values), 1), sketch.capacity):
        piece = values[start : start + sketch.capacity]
        levels = (np.concatenate([sketch.levels[0], piece]), *sketch.levels[1:])
        sketch = _compact(sketch._replace(levels=levels))
    return sketch._replace(count=count)


def merge(first: QuantileSketch, second: QuantileSketch) -> QuantileSketch:
    """Returns the sketch of all rows of two sketches.

    Raises:
      ValueError: they differ in capacity or in the numbers per row.
    """
    kinds = [(sketch.capacity, len(sketch.count)) for sketch in (first, second)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"sketches must have one (capacity, D), got {kinds[0]} and {kinds[1]}.")
    height = max(len(first.levels), len(second.levels))
    padded = [_with_height(sketch, height) for sketch in (first, second)]
    pairs = zip(padded[0].levels, padded[1].levels, strict=True)
    odd = zip(padded[0].is_odd, padded[1].is_odd, strict=True)
    return _compact(
        QuantileSketch(
            tuple(np.concatenate(pair) for pair in pairs),
            tuple(a != b for a, b in odd),
            first.count + second.count,
            first.error + second.error,
            first.capacity,
        )
    )


def quantiles(sketch: QuantileSketch, fractions: Sequence[float]) -> np.ndarray:
    """Returns quantiles of every dimension, interpolated linearly as by `numpy.quantile`.

    Args:
      sketch: of rows of D numbers.
      fractions: Q numbers in [0, 1].

    Returns:
      `[Q, D]` float64; NaN for a dimension without finite values.
    """
    result = np.full((len(fractions), len(sketch.count)), np.nan)
    for d, count in enumerate(sketch.count):
        if count:
            values, weights = weighted_values(sketch, d)
            ends = np.cumsum(weights)
            # ranks among the rows in the sketch: NaN may have taken part in a compaction
            ranks = np.asarray(fractions, np.float64) * (ends[-1] - 1)
            lower = np.searchsorted(ends, np.floor(ranks), side="right")
            upper = np.searchsorted(ends, np.ceil(ranks), side="right")
            low, high, part = values[lower], values[upper], ranks - np.floor(ranks)
            # as numpy.quantile: from the nearer end, so that results are equal to the last bit
            step = high - low
            result[:, d] = np.where(part < 0.5, low + step * part, high - step * (1 - part))
    return result


def weighted_values(sketch: QuantileSketch, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of one dimension in ascending order, and their weights; both `[N]`."""
    values = np.concatenate([level[:, dim] for level in sketch.levels])
    weights = np.repeat(2 ** np.arange(len(sketch.levels)), [len(level) for level in sketch.levels])
    kept = np.isfinite(values)
    order = np.argsort(values[kept], kind="stable")
    return values[kept][order], weights[kept][order]


def _compact(sketch: QuantileSketch) -> QuantileSketch:
    """Moves every second row of the full levels one level up, from the lowest level on."""
    levels, is_odd, error = list(sketch.levels), list(sketch.is_odd), sketch.error
    height = 0
    while height < len(levels):
        if len(levels[height]) > sketch.capacity:
            rows = np.sort(levels[height], axis=0)  # NaN last
            even = len(rows) - len(rows) % 2
            if height + 1 == len(levels):
                levels.append(rows[:0])
                is_odd.append(False)
            kept = rows[int(is_odd[height]) : even : 2]
            levels[height], levels[height + 1] = (
                rows[even:],
                np.concatenate([levels[height + 1], kept]),
            )
            is_odd[height] = not is_odd[height]
            error += 2**height
        height += 1
    return sketch._replace(levels=tuple(levels), is_odd=tuple(is_odd), error=error)


def _with_height(sketch: QuantileSketch, height: int) -> QuantileSketch:
    missing = height - len(sketch.levels)
    blank = (np.zeros((0, len(sketch.count))),) * missing
    return sketch._replace(
        levels=(*sketch.levels, *blank), is_odd=(*sketch.is_odd, *(False,) * missing)
    )
