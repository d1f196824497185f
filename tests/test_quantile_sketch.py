"""Mergeable sketch of quantiles: exact for small sets, within its stated bound for large ones."""

import functools

import numpy as np
import pytest

from vla_jax.data import quantile_sketch
from vla_jax.data.quantile_sketch import add, empty, merge, quantiles

FRACTIONS = (0.0, 0.01, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0)


def sketch_of(pieces, capacity=64):
    return functools.reduce(add, pieces, empty(pieces[0].shape[1], capacity))


def rank_errors(sketch, values):
    """Largest distance of the wanted rank to the ranks of the returned value, in rows."""
    found = quantiles(sketch, FRACTIONS)
    errors = []
    for d in range(values.shape[1]):
        ordered = np.sort(values[:, d])
        low = np.searchsorted(ordered, found[:, d], side="left") - 1  # interpolated: one below
        high = np.searchsorted(ordered, found[:, d], side="right")
        wanted = np.array(FRACTIONS) * (len(ordered) - 1)
        errors.append(np.maximum(0, np.maximum(low - wanted, wanted - high)).max())
    return max(errors)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_small_sets_have_the_quantiles_of_numpy(count):
    values = np.random.default_rng(count).normal(size=(count, 3)) * [1, 1e6, 1e-9]
    sketch = sketch_of(np.array_split(values, 3))
    assert sketch.error == 0
    np.testing.assert_array_equal(
        quantiles(sketch, FRACTIONS), np.quantile(values, FRACTIONS, axis=0)
    )


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_large_sets_are_within_the_bound(order):
    values = np.random.default_rng(0).exponential(size=(20_000, 2))
    if order != "random":
        values = np.sort(values, axis=0)[:: 1 if order == "ascending" else -1]
    sketch = sketch_of(np.array_split(values, 77))
    assert sum(len(level) for level in sketch.levels) < 10 * 64
    assert sketch.error / len(values) <= np.ceil(np.log2(len(values) / 64)) / 64
    assert rank_errors(sketch, values) <= sketch.error


def test_the_order_of_merges_matters_only_within_the_bound():
    rng = np.random.default_rng(1)
    pieces = [rng.normal(size=(n, 2)) for n in (1, 700, 64, 3, 5000, 129, 128)]
    values = np.concatenate(pieces)
    parts = [sketch_of([piece]) for piece in pieces]
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(parts))
        merged = functools.reduce(merge, [parts[i] for i in order])
        tree = merge(
            merge(parts[order[0]], parts[order[1]]), sketch_of([pieces[i] for i in order[2:]])
        )
        for sketch in (merged, tree):
            np.testing.assert_array_equal(sketch.count, [len(values)] * 2)
            weights = [2**h * len(level) for h, level in enumerate(sketch.levels)]
            assert sum(weights) == len(values)
            assert rank_errors(sketch, values) <= sketch.error < 0.2 * len(values)


def test_nan_and_infinity_are_left_out_by_dimension():
    values = np.arange(30.0).reshape(10, 3)
    values[2, 0], values[4, 1], values[:, 2] = np.nan, np.inf, -np.inf
    sketch = add(empty(3, capacity=64), values)
    np.testing.assert_array_equal(sketch.count, [9, 9, 0])
    found = quantiles(sketch, FRACTIONS)
    np.testing.assert_array_equal(found[:, 0], np.nanquantile(values[:, 0], FRACTIONS))
    np.testing.assert_array_equal(found[:, 1], np.quantile(np.delete(values[:, 1], 4), FRACTIONS))
    assert np.isnan(found[:, 2]).all()
    many = add(empty(3, capacity=16), np.tile(values, (20, 1)))
    assert (
        rank_errors(
            many._replace(count=np.array([180, 180, 0])),
            np.tile(values, (20, 1))[np.tile(np.isfinite(values[:, 0]), 20)][:, :1],
        )
        <= many.error
    )


def test_no_rows_change_nothing():
    sketch = add(empty(2), np.ones((3, 2)))
    same = add(sketch, np.ones((0, 2)))
    np.testing.assert_array_equal(same.levels[0], sketch.levels[0])
    assert np.isnan(quantiles(empty(2), [0.5])).all()


def test_sketches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one \(capacity, D\), got \(64, 2\) and \(64, 3\)"):
        merge(empty(2, 64), empty(3, 64))
    with pytest.raises(ValueError, match="capacity must be at least 2 rows, got 1"):
        quantile_sketch.empty(2, 1)
