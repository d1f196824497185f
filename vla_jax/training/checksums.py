"""Checksums of arrays: equal on the host and on any devices, however an array is sharded.

    C(x) = Σᵢ m(wᵢ + i · g)  mod 2³²        wᵢ: the i-th word of the array, as an unsigned integer
    m(h) = s₁₅(c · s₁₆(h)),  s_k(h) = h ⊕ ⌊h / 2ᵏ⌋

m permutes the 32-bit integers, so that one changed word always changes the sum, and several do so
with probability 1 - 2⁻³². A sum needs no order: each device adds up the words that it holds. A word
has the size of an element, 8-byte elements are two words.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    sums = {path: _start(leaf) for path, leaf in trees.leaves_by_path(tree).items()}
    return {path: int(value) for path, value in jax.device_get(sums).items()}


def first_difference(tree: Any, expected: dict[str, int]) -> str:
    """Returns the path of the first array whose checksum is another one; "" if there is none.

    Args:
      tree: NumPy or JAX arrays.
      expected: from `of_tree`, at least for the paths of `tree`.
    """
    found = of_tree(tree)
    return next((path for path, value in found.items() if value != expected.get(path)), "")


def _start(leaf: Any) -> Any:
    """Returns the checksum of an array, which its devices may still compute."""
    if not isinstance(leaf, jax.Array):
        return _on_host(np.asarray(leaf))
    is_on_cpu = {device.platform for device in leaf.sharding.device_set} == {"cpu"}
    if is_on_cpu and leaf.is_fully_replicated:
        return _on_host(np.asarray(leaf.addressable_data(0)))  # compiles nothing
    return _on_devices(leaf)


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
def _on_devices(array: jax.Array) -> jax.Array:
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize])
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index, stride = index + along * jnp.uint32(stride % 2**32), stride * words.shape[axis]
    mixed = words.astype(jnp.uint32) + index * jnp.uint32(_GOLDEN)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(_FACTOR)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)
