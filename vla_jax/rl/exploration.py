"""From values to an action that is sometimes a trial: sampling, ε-greedy, its decay."""

import jax
import jax.numpy as jnp

from vla_jax.types import Array, Key


def sample(key: Key, probability: Array) -> jax.Array:
    """Returns an action drawn with the given probabilities.

        a = min {a : P(0) + … + P(a) > u},    u ~ U(0, 1)

    One random number per action, where the Gumbel trick of `jax.random.categorical` takes as many
    as there are actions to choose from.

    Args:
      key: consumed.
      probability: `[..., A]`, which sums to 1.

    Returns:
      `[...]` int32 in 0 … A − 1.
    """
    below = jnp.cumsum(probability, axis=-1)[..., :-1]  # without the last, so that rounding is safe
    draw = jax.random.uniform(key, below.shape[:-1])
    return jnp.sum(below <= draw[..., None], axis=-1, dtype=jnp.int32)


def epsilon_greedy_probability(q: Array, epsilon: Array | float) -> jax.Array:
    """Returns the probability of each action of an ε-greedy policy; the best ones share.

        π(a) = ε / A + (1 − ε) [a ∈ argmax q] / |argmax q|

    Args:
      q: `[..., A]`.
      epsilon: `[]` in [0, 1], share of trials.

    Returns:
      `[..., A]` float32.

    Source: Sutton and Barto 2018, section 2.2.
    """
    best = jnp.asarray(q == jnp.max(q, axis=-1, keepdims=True), jnp.float32)
    greedy = best / jnp.sum(best, axis=-1, keepdims=True)
    return jnp.asarray(epsilon / q.shape[-1] + (1.0 - epsilon) * greedy)


def decayed_epsilon(num_updates: Array, start: float, end: float, decay_updates: int) -> jax.Array:
    """Returns ε after `num_updates` updates: down a straight line, then level.

        ε(n) = start + (end − start) · min(n / N, 1)

    Args:
      num_updates: n `[]`.
      start: ε at first.
      end: ε from N updates on.
      decay_updates: N, at least 1.
    """
    return start + (end - start) * jnp.minimum(num_updates / decay_updates, 1.0)
