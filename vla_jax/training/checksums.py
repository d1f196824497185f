"""Checksums of arrays: equal on the host and on any devices, however an array is sharded.

    C(x) = Σᵢ m(wᵢ + i · g)  mod 2³²        wᵢ: the i-th word of the array, as an unsigned integer
    m(h) = s₁₅(c · s₁₆(h)),  s_k(h) = h ⊕ ⌊h / 2ᵏ⌋

m permutes the 32-bit integers, so that one changed word always changes the sum, and several do so
with probability 1 - 2⁻³². A sum needs no order: each device adds up the words that it holds. A word
has the size of an element, 8-byte elements are two words.

No device waits for another one: collectives of a program that still runs, such as an update, could
be taken for those of this one.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vla_jax import trees

_GOLDEN, _FACTOR = 0x9E3779B9, 0x85EBCA6B  # g, c: odd
_CHUNK = 2**16  # words, whose intermediate results fit into a CPU's cache
_WORDS = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u4")}


def of_tree(tree: Any) -> dict[str, int]:
    """Returns path -> checksum of every array, without a copy of it on the host.

    With arrays that are sharded over several processes all of them must call it.

    Args:
      tree: NumPy or JAX arrays.
    """
    leaves = trees.leaves_by_path(tree)
    parts = jax.device_get({path: _parts(leaf) for path, leaf in leaves.items()})
    sums = {path: sum(map(int, part)) % 2**32 for path, part in parts.items()}
    spread = [path for path, leaf in leaves.items() if _is_spread(leaf)]
    if spread:
        own = np.array([sums[path] for path in spread], np.uint32)
        total = multihost_utils.process_allgather(own).sum(0, dtype=np.uint32)
        sums |= {path: int(value) for path, value in zip(spread, total, strict=True)}
    return sums


def first_difference(tree: Any, expected: dict[str, int]) -> str:
    """Returns the path of the first array whose checksum is another one; "" if there is none.

    Args:
      tree: NumPy or JAX arrays.
      expected: from `of_tree`, at least for the paths of `tree`.
    """
    found = of_tree(tree)
    return next((path for path, value in found.items() if value != expected.get(path)), "")


def _is_spread(leaf: Any) -> bool:
    """Returns True if this process holds only a part of the array."""
    is_array = isinstance(leaf, jax.Array)
    return is_array and not leaf.is_fully_replicated and not leaf.is_fully_addressable


def _parts(leaf: Any) -> list[Any]:
    """Returns the sums of the parts that this process holds; devices may still compute them."""
    if not isinstance(leaf, jax.Array):
        return [_on_host(np.asarray(leaf))]
    if leaf.is_fully_replicated:
        whole = leaf.addressable_data(0)
        if {device.platform for device in whole.devices()} == {"cpu"}:
            return [_on_host(np.asarray(whole))]  # compiles nothing
        return [_on_device(whole, *_places((0,) * leaf.ndim, leaf))]
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    starts = [[part.start or 0 for part in shard.index] for shard in shards]
    return [
        _on_device(shard.data, *_places(start, leaf))
        for shard, start in zip(shards, starts, strict=True)
    ]


def _places(start: Sequence[int], leaf: jax.Array) -> tuple[np.uint32, np.ndarray]:
    """Returns the index of a part's first word, and the distances along its axes, mod 2³²."""
    words = -(-leaf.dtype.itemsize // 4)  # of an element
    strides = [words * math.prod(leaf.shape[axis + 1 :]) for axis in range(leaf.ndim)]
    first = sum(place * stride for place, stride in zip(start, strides, strict=True))
    wrapped = [number % 2**32 for number in (first, *strides)]
    return np.uint32(wrapped[0]), np.array(wrapped[1:], np.uint32)


def _on_host(array: np.ndarray) -> int:
    words = np.ascontiguousarray(array).reshape(-1).view(_WORDS[array.dtype.itemsize])
    steps = np.arange(_CHUNK, dtype=np.uint32) * np.uint32(_GOLDEN)
    total = 0
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        mixed = steps[: len(part)] + part
        mixed += np.uint32(start * _GOLDEN % 2**32)
        mixed ^= mixed >> 16
        mixed *= np.uint32(_FACTOR)
        mixed ^= mixed >> 15
        total += int(mixed.sum(dtype=np.uint32))
    return total % 2**32


@jax.jit
def _on_device(array: jax.Array, first: Any, strides: Any) -> jax.Array:
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize])
    distances = [*strides] if words.ndim == array.ndim else [*strides, jnp.uint32(1)]
    index = jnp.full(words.shape, first, jnp.uint32)
    for axis, distance in enumerate(distances):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * distance
    mixed = words.astype(jnp.uint32) + index * jnp.uint32(_GOLDEN)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(_FACTOR)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)
