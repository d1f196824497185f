"""Mergeable statistics of columns."""

import functools

import numpy as np

from vla_jax.data.moments import merge_moments, moments_of, std


def check(moments, values):
    """Compares with NumPy's functions that leave NaN out."""
    values = np.where(np.isfinite(values), values, np.nan)
    np.testing.assert_array_equal(moments.low, np.nanmin(values, 0))
    np.testing.assert_array_equal(moments.high, np.nanmax(values, 0))
    np.testing.assert_array_equal(moments.num_low, (values == np.nanmin(values, 0)).sum(0))
    np.testing.assert_array_equal(moments.num_high, (values == np.nanmax(values, 0)).sum(0))
    np.testing.assert_array_equal(moments.num_bad, np.isnan(values).sum(0))
    np.testing.assert_allclose(moments.mean, np.nanmean(values, 0), rtol=1e-12)
    np.testing.assert_allclose(std(moments), np.nanstd(values, 0), rtol=1e-9, atol=1e-12)


def test_parts_merged_in_any_order_have_the_statistics_of_numpy():
    rng = np.random.default_rng(0)
    values = np.clip(rng.normal(size=(300, 4)) * [1, 1e-6, 1e5, 0] + [0, 1e3, 0, 7], -1e5, 1e5)
    values[5, 0], values[9, 1], values[11, 2] = np.nan, np.inf, -np.inf
    parts = [moments_of(part) for part in np.split(values, [0, 1, 17, 200])]
    check(functools.reduce(merge_moments, parts), values)
    check(functools.reduce(merge_moments, parts[::-1]), values)


def test_booleans_and_empty_columns_are_accepted():
    moments = moments_of(np.array([[True], [False], [True]]))
    assert (moments.low[0], moments.high[0], moments.num_high[0]) == (0, 1, 2)
    nothing = moments_of(np.full((3, 1), np.nan))
    assert (nothing.count[0], nothing.num_bad[0], std(nothing)[0]) == (0, 3, 0)
