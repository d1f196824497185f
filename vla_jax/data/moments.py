"""Mergeable statistics of the rows of a column: extremes, mean, spread, values that are not finite.

Memory does not grow with the rows. Results of parts that are merged in another order differ by
rounding only.
"""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Statistics of each of D numbers over some rows, NaN and infinity left out."""

    count: np.ndarray  # [D] int64, finite values
    num_bad: np.ndarray  # [D] int64, values that are NaN or infinite
    low: np.ndarray  # [D] float64, smallest value; inf without values
    high: np.ndarray  # [D] float64, largest value; -inf without values
    num_low: np.ndarray  # [D] int64, values equal to `low`
    num_high: np.ndarray  # [D] int64, values equal to `high`
    mean: np.ndarray  # [D] float64
    square: np.ndarray  # [D] float64, sum of the squared distances from the mean


def moments_of(rows: np.ndarray) -> Moments:
    """Returns the statistics of rows `[T, D]`."""
    values = np.asarray(rows, np.float64)
    finite = np.isfinite(values)
    count = finite.sum(0)
    low = np.where(finite, values, np.inf).min(0, initial=np.inf)
    high = np.where(finite, values, -np.inf).max(0, initial=-np.inf)
    filled = np.where(finite, values, 0.0)
    mean = filled.sum(0) / np.maximum(count, 1)
    return Moments(
        count=count,
        num_bad=len(values) - count,
        low=low,
        high=high,
        num_low=(finite & (values == low)).sum(0),
        num_high=(finite & (values == high)).sum(0),
        mean=mean,
        square=(np.where(finite, filled - mean, 0.0) ** 2).sum(0),
    )


def merge_moments(first: Moments, second: Moments) -> Moments:
    """Returns the statistics of the rows of both.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    count = first.count + second.count
    low, high = np.minimum(first.low, second.low), np.maximum(first.high, second.high)
    share = second.count / np.maximum(count, 1)
    step = second.mean - first.mean
    return Moments(
        count=count,
        num_bad=first.num_bad + second.num_bad,
        low=low,
        high=high,
        num_low=_counts_at(low, first.low, first.num_low, second.low, second.num_low),
        num_high=_counts_at(high, first.high, first.num_high, second.high, second.num_high),
        mean=first.mean + step * share,
        square=first.square + second.square + step**2 * first.count * share,
    )


def std(moments: Moments) -> np.ndarray:
    """Returns the standard deviation `[D]` of the population; 0 without values."""
    return np.sqrt(moments.square / np.maximum(moments.count, 1))


def _counts_at(
    extreme: np.ndarray, a: np.ndarray, count_a: np.ndarray, b: np.ndarray, count_b: np.ndarray
) -> np.ndarray:
    return np.where(a == extreme, count_a, 0) + np.where(b == extreme, count_b, 0)
