"""Exploration for discrete actions: sampling, ε-greedy probabilities, a linear ε schedule."""

import jax
import jax.numpy as jnp

from vla_jax.types import Array, Key


def sample(probability: Array, *, key: Key) -> jax.Array:
    """Returns actions sampled from categorical distributions.

        a = min {a : P(0) + … + P(a) > u},    u ~ U(0, 1)

    This takes one random number per sample; the Gumbel trick of `jax.random.categorical` takes one
    per action.

    Args:
      probability: `[..., num_actions]`, sums to 1.
      key: consumed.

    Returns:
      `[...]` int32 in 0 … num_actions − 1.
    """
    cumulative = jnp.cumsum(probability, axis=-1)[..., :-1]  # the last may round to less than 1
    uniform = jax.random.uniform(key, cumulative.shape[:-1])
    return jnp.sum(cumulative <= uniform[..., None], axis=-1, dtype=jnp.int32)


def epsilon_greedy_probability(q: Array, epsilon: Array | float) -> jax.Array:
    """Returns the action probabilities of an ε-greedy policy; ties are broken uniformly.

        π(a) = ε / A + (1 − ε) [a ∈ argmax q] / |argmax q|,    A = num_actions

    Args:
      q: `[..., num_actions]`.
      epsilon: `[]` in [0, 1], probability of a uniformly random action.

    Returns:
      `[..., num_actions]` float32.

    Source: Sutton and Barto 2018, section 2.2.
    """
    best = jnp.asarray(q == jnp.max(q, axis=-1, keepdims=True), jnp.float32)
    greedy = best / jnp.sum(best, axis=-1, keepdims=True)
    return jnp.asarray(epsilon / q.shape[-1] + (1.0 - epsilon) * greedy)


def refuse_non_finite(action: Array, scores: Array) -> jax.Array:
    """Returns the actions, with −1 where a score is not finite: no action follows from NaN.

    The actors give a step with action −1 the reward NaN, which ends the training.

    Args:
      action: `[...]` int32.
      scores: `[..., num_actions]`, logits or values.
    """
    return jnp.where(jnp.all(jnp.isfinite(scores), axis=-1), action, -1)


def decayed_epsilon(num_updates: Array, start: float, end: float, decay_updates: int) -> jax.Array:
    """Returns ε after `num_updates` updates: linear decay, then constant.

        ε(n) = start + (end − start) · min(n / decay_updates, 1)

    Args:
      num_updates: n `[]`.
      start: ε before the first update.
      end: ε after `decay_updates` updates.
      decay_updates: length of the decay, at least 1.
    """
    return start + (end - start) * jnp.minimum(num_updates / decay_updates, 1.0)
