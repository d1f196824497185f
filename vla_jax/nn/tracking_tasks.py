"""Draws of state-tracking tasks: words of permutations, and counting.

The target at every step depends on all earlier inputs, in their order (permutations) or not
(counting).
"""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.types import Array, Key

MAX_COUNT = 8  # largest count of the counting task


@cache
def symmetric_group(degree: int) -> np.ndarray:
    """Returns the multiplication table of S_n, all permutations of n items, identity first.

    Args:
      degree: n.

    Returns:
      `[n!, n!]` int32; entry [p, q] is the index of "p, then q". Indices follow the
      lexicographic order of the permutations.
    """
    return _table(list(itertools.permutations(range(degree))))


@cache
def alternating_group(degree: int) -> np.ndarray:
    """Returns the multiplication table of A_n, the even permutations of n items, identity first.

    Args:
      degree: n.

    Returns:
      `[n!/2, n!/2]` int32, as of `symmetric_group`.
    """
    return _table([each for each in itertools.permutations(range(degree)) if _is_even(each)])


def draw_word(
    key: Key, table: np.ndarray, batch_size: int, length: int
) -> tuple[jax.Array, jax.Array]:
    """Returns random words over a group, and the product of each prefix.

    S₃ words are about three cups of which two or three change places at every step. By a
    conjecture of circuit complexity, no recurrence whose steps are diagonal and linear in the carry
    tracks S₅ or A₅ for words of any length. With decays in (0, 1) that depend on the input alone,
    no number of layers in finite precision computes even the parity of words of any length, and so
    none tracks S₃ or S₄.

    Args:
      key: consumed.
      table: multiplication table of the group.
      batch_size: B.
      length: T.

    Returns:
      One-hot elements `[B, T, V]`, V of the group, and indices of the products `[B, T]` int32.

    Source: Merrill et al. 2024, "The Illusion of State in State-Space Models" (arXiv:2404.08819);
    parity: Grazzi et al. 2024 (arXiv:2411.12537).
    """
    order = len(table)
    word = jax.random.randint(key, (batch_size, length), 0, order)
    products = jnp.asarray(table)

    def then(first: Array, second: Array) -> jax.Array:
        return products[first, second]

    prefix = jax.lax.associative_scan(then, word, axis=1)
    return jax.nn.one_hot(word, order), prefix


def draw_counting(key: Key, batch_size: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns sequences with 0 to `MAX_COUNT` events, and the number of events so far.

    The number of events is uniform, and they lie at random steps; a second input, at half of the
    steps, is a distractor.

    Args:
      key: consumed.
      batch_size: B.
      length: T, at least `MAX_COUNT` for a uniform number of events.

    Returns:
      Inputs `[B, T, 2]`: event, distractor; counts `[B, T]` int32.
    """
    number_key, place_key, noise_key = jax.random.split(key, 3)
    number = jax.random.randint(number_key, (batch_size, 1), 0, MAX_COUNT + 1)
    ranks = jnp.argsort(jax.random.uniform(place_key, (batch_size, length)), axis=1)
    events = ranks < number
    noise = jax.random.bernoulli(noise_key, 0.5, events.shape)
    inputs = jnp.stack([events, noise], axis=-1).astype(jnp.float32)
    return inputs, jnp.cumsum(events, axis=1, dtype=jnp.int32)


def _table(elements: list[tuple[int, ...]]) -> np.ndarray:
    index = {element: number for number, element in enumerate(elements)}
    rows = [
        [index[tuple(second[first[place]] for place in range(len(first)))] for second in elements]
        for first in elements
    ]
    return np.array(rows, np.int32)


def _is_even(permutation: tuple[int, ...]) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(first > second for first, second in pairs) % 2 == 0
