"""Lengths that are read when they are needed: equal to an array, one alone or all at once."""

import pickle

import numpy as np
import pytest

from vla_jax.data.lazy_lengths import LazyLengths

LENGTHS = np.array([3, 1, 4, 1, 5])


class Reading:
    """Reads lengths and remembers which."""

    def __init__(self):
        self.calls = []

    def __call__(self, episodes):
        self.calls.append(list(episodes))
        return LENGTHS[list(episodes)]


def test_they_are_an_array():
    lengths = LazyLengths(5, Reading())
    assert (len(lengths), lengths.shape, lengths.size, lengths.dtype) == (5, (5,), 5, np.int64)
    np.testing.assert_array_equal(lengths, LENGTHS)
    np.testing.assert_array_equal(lengths + 1, LENGTHS + 1)
    np.testing.assert_array_equal(lengths[[0, -1]], [3, 5])
    np.testing.assert_array_equal(lengths[1:3], [1, 4])
    assert (lengths == LENGTHS).all()
    assert (lengths.sum(), lengths.tolist(), np.max(lengths), sum(lengths)) == (
        14, [3, 1, 4, 1, 5], 5, 14,
    )  # fmt: skip


def test_one_is_read_alone_and_all_are_read_once():
    read = Reading()
    lengths = LazyLengths(5, read)
    assert read.calls == []
    assert (lengths[2], lengths[np.int64(-1)]) == (4, 5)
    assert read.calls == [[2], [4]]
    with pytest.raises(IndexError):
        lengths[5]
    np.testing.assert_array_equal(np.cumsum(lengths[:2]), [3, 4])
    assert (lengths[4], lengths.sum()) == (5, 14)
    assert read.calls[2:] == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(lengths)[0] = 7
    copy = pickle.loads(pickle.dumps(lengths))
    np.testing.assert_array_equal(copy, LENGTHS)
