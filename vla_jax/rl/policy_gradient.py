"""REINFORCE: what went better than expected is made more probable.

Written for one episode, or one stretch of several: `vmap` them over a batch and take the mean.
`weight` is 1 where a step counts and 0 where it does not; all T steps are divided by, so that in
a batch every step counts alike.
"""

import chex
import jax
import jax.numpy as jnp

from vla_jax.types import Array

_SMALL = 1e-6  # keeps a batch without any difference from being divided by zero


def reinforce_loss(logits: Array, action: Array, advantage: Array, weight: Array) -> jax.Array:
    """Returns a loss whose gradient is REINFORCE's estimate of −∇J.

        L = −1/T Σₜ wₜ Âₜ log π(aₜ | sₜ)

    Args:
      logits: `[T, A]`, π = softmax of it.
      action: `[T]` int, that were taken.
      advantage: Â `[T]`, return less baseline; no gradient flows into it.
      weight: w `[T]`.

    Returns:
      `[]` float32.

    Source: Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist
    Reinforcement Learning", section 5; with a baseline Sutton and Barto 2018, section 13.4.
    """
    _check(logits, action, advantage, weight)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=-1)[:, 0]
    return score_loss(chosen, advantage, weight)


def score_loss(log_probability: Array, advantage: Array, weight: Array) -> jax.Array:
    """Returns REINFORCE's loss of a policy of any kind.

        L = −1/T Σₜ wₜ Âₜ log π(aₜ | sₜ)

    Args:
      log_probability: log π(aₜ | sₜ) `[T]`, of the actions that were taken.
      advantage: Â `[T]`; no gradient flows into it.
      weight: w `[T]`.

    Returns:
      `[]` float32.

    Source: as for `reinforce_loss`.
    """
    chex.assert_equal_shape([log_probability, advantage, weight])
    return -jnp.mean(weight * jax.lax.stop_gradient(advantage) * log_probability)


def scale(advantage: Array, weight: Array) -> jax.Array:
    """Returns advantages whose mean square is 1 over the steps that count, in a whole batch.

    Then an entropy or a divergence beside them weighs as much at the end of a training, when all
    goes as foretold, as at its start.

    Args:
      advantage: Â, of any shape.
      weight: w, of the same.
    """
    chex.assert_equal_shape([advantage, weight])
    square = jnp.sum(weight * jnp.square(advantage)) / jnp.maximum(jnp.sum(weight), _SMALL)
    return jnp.asarray(advantage) / (jnp.sqrt(square) + _SMALL)


def entropy(logits: Array) -> jax.Array:
    """Returns how undecided a policy is, in nats.

        H = −Σₐ π(a) log π(a)

    Args:
      logits: `[..., A]`.

    Returns:
      `[...]`, from 0 to log A.
    """
    log_probability = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_probability) * log_probability, axis=-1)


def entropy_loss(logits: Array, weight: Array) -> jax.Array:
    """Returns a loss that keeps a policy from deciding too early.

        L = −1/T Σₜ wₜ H(π(· | sₜ))

    Args:
      logits: `[T, A]`.
      weight: w `[T]`.

    Source: Williams and Peng 1991, "Function Optimization Using Connectionist Reinforcement
    Learning Algorithms".
    """
    _check(logits, weight)
    return -jnp.mean(weight * entropy(logits))


def baseline_loss(value: Array, return_: Array, weight: Array) -> jax.Array:
    """Returns the squared error of a baseline.

        L = 1/T Σₜ wₜ (Gₜ − vₜ)²

    Args:
      value: v `[T]`.
      return_: G `[T]`; no gradient flows into it.
      weight: w `[T]`.

    Source: Sutton and Barto 2018, section 13.4.
    """
    chex.assert_equal_shape([value, return_, weight])
    return jnp.mean(weight * jnp.square(jax.lax.stop_gradient(return_) - value))


def _check(logits: Array, *others: Array) -> None:
    chex.assert_rank(logits, 2)
    chex.assert_equal_shape_prefix([logits, *others], 1)
    chex.assert_rank(others, 1)
