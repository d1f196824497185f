"""Cache of decoded images: bounded in bytes, least recently used evicted first, thread-safe."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vla_jax.data.frame_cache import FrameCache


def piece(num_frames, value=0):
    return np.full((num_frames, 2, 5, 3), value, np.uint8)  # 30 bytes per frame


def test_the_least_recently_used_piece_is_evicted_first():
    cache = FrameCache(90)
    for key in "abc":
        cache.put(key, piece(1))
    assert cache.get("a") is not None  # used again, so "b" is the least recently used
    cache.put("d", piece(1))
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "c", "d"]
    cache.put("e", piece(2))
    assert [key for key in "abcde" if cache.get(key) is not None] == ["d", "e"]
    assert cache.num_bytes == 90


def test_a_piece_larger_than_the_capacity_is_not_stored_and_evicts_nothing():
    cache = FrameCache(60)
    cache.put("small", piece(1))
    cache.put("large", piece(3))
    assert cache.get("large") is None
    assert cache.get("small") is not None
    assert cache.num_bytes == 30


def test_a_piece_that_is_stored_twice_counts_once():
    cache = FrameCache(60)
    for value in (1, 2):
        cache.put("a", piece(2, value))
    assert cache.num_bytes == 60
    np.testing.assert_array_equal(cache.get("a"), piece(2, 2))


def test_a_pickled_cache_is_empty_and_has_the_same_capacity():
    cache = FrameCache(60)
    cache.put("a", piece(2))
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.capacity, copy.num_bytes, copy.get("a")) == (60, 0, None)


def test_threads_never_exceed_the_capacity():
    cache = FrameCache(200)

    def work(seed):
        rng, largest = np.random.default_rng(seed), 0
        for _ in range(300):
            key = int(rng.integers(12))
            images = cache.get(key)
            assert images is None or (images == key).all()
            cache.put(key, piece(1 + key % 4, key))
            largest = max(largest, cache.num_bytes)
        return largest

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) <= 200
    assert cache.num_bytes == sum(x.nbytes for x in map(cache.get, range(12)) if x is not None)
