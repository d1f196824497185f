"""Policy-gradient losses: REINFORCE, its baseline and an entropy bonus.

The functions take one sequence `[T]`, which may hold several episodes; `vmap` them over a batch
and average. `weight` is 1 at real steps and 0 at masked ones, where all other arguments are
arbitrary, NaN too. The denominator is always T, so that every real step of a batch has the same
weight.
"""

import chex
import jax
import jax.numpy as jnp

from vla_jax.types import Array

_EPSILON = 1e-6  # prevents a division by zero if all advantages are equal


def reinforce_loss(logits: Array, action: Array, advantage: Array, weight: Array) -> jax.Array:
    """Returns the REINFORCE loss of a categorical policy; its gradient estimates −∇J.

        L = −1/T Σₜ wₜ Âₜ log π(aₜ | sₜ)

    Args:
      logits: `[T, num_actions]`, π = softmax(logits).
      action: `[T]` int, actions taken.
      advantage: Â `[T]`, return minus baseline (stop-gradient).
      weight: w `[T]`.

    Returns:
      `[]` float32.

    Source: Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist
    Reinforcement Learning", section 5; with a baseline Sutton and Barto 2018, section 13.4.
    """
    _check(logits, action, advantage, weight)
    logits = _keep_real(logits, weight)
    return score_loss(log_probability(logits, action), advantage, weight)


def log_probability(logits: Array, action: Array) -> jax.Array:
    """Returns log π(a | s) of a categorical policy.

    Args:
      logits: `[..., num_actions]`, π = softmax(logits).
      action: `[...]` int.
    """
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], axis=-1)
    return chosen[..., 0]


def score_loss(log_probability: Array, advantage: Array, weight: Array) -> jax.Array:
    """Returns the REINFORCE loss of any policy, from its log-probabilities.

        L = −1/T Σₜ wₜ Âₜ log π(aₜ | sₜ)

    Args:
      log_probability: log π(aₜ | sₜ) `[T]` of the actions taken.
      advantage: Â `[T]` (stop-gradient).
      weight: w `[T]`.

    Returns:
      `[]` float32.

    Source: as for `reinforce_loss`.
    """
    chex.assert_equal_shape([log_probability, advantage, weight])
    log_probability, advantage = _keep_real(log_probability, weight), _keep_real(advantage, weight)
    return -jnp.mean(weight * jax.lax.stop_gradient(advantage) * log_probability)


def scale(advantage: Array, weight: Array) -> jax.Array:
    """Returns the advantages divided by their root mean square over the real steps of a batch.

    They are 0 at masked steps.

    The weight of an entropy or KL term relative to them then stays the same over a training, in
    which advantages shrink as the baseline improves.

    Args:
      advantage: Â, any shape.
      weight: w, same shape.
    """
    chex.assert_equal_shape([advantage, weight])
    advantage = _keep_real(advantage, weight)
    square = jnp.sum(weight * jnp.square(advantage)) / jnp.maximum(jnp.sum(weight), _EPSILON)
    return advantage / (jnp.sqrt(square) + _EPSILON)


def entropy(logits: Array) -> jax.Array:
    """Returns the entropy of a categorical policy in nats.

        H = −Σₐ π(a) log π(a)

    Args:
      logits: `[..., num_actions]`.

    Returns:
      `[...]`, from 0 to log(num_actions).
    """
    log_probability = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_probability) * log_probability, axis=-1)


def entropy_loss(logits: Array, weight: Array) -> jax.Array:
    """Returns the negative mean entropy, a loss against premature convergence.

        L = −1/T Σₜ wₜ H(π(· | sₜ))

    Args:
      logits: `[T, num_actions]`.
      weight: w `[T]`.

    Source: Williams and Peng 1991, "Function Optimization Using Connectionist Reinforcement
    Learning Algorithms".
    """
    _check(logits, weight)
    return -jnp.mean(weight * entropy(_keep_real(logits, weight)))


def baseline_loss(value: Array, return_: Array, weight: Array) -> jax.Array:
    """Returns the mean squared error of a baseline.

        L = 1/T Σₜ wₜ (Gₜ − vₜ)²

    Args:
      value: v `[T]`.
      return_: G `[T]` (stop-gradient).
      weight: w `[T]`.

    Source: Sutton and Barto 2018, section 13.4.
    """
    chex.assert_equal_shape([value, return_, weight])
    value, return_ = _keep_real(value, weight), _keep_real(return_, weight)
    return jnp.mean(weight * jnp.square(jax.lax.stop_gradient(return_) - value))


def _keep_real(values: Array, weight: Array) -> jax.Array:
    """Returns values `[T, ...]` with zeros where the weight is 0, since 0 · NaN is NaN."""
    real = jnp.reshape(weight != 0, weight.shape + (1,) * (values.ndim - weight.ndim))
    return jnp.where(real, values, 0.0)


def _check(logits: Array, *others: Array) -> None:
    chex.assert_rank(logits, 2)
    chex.assert_equal_shape_prefix([logits, *others], 1)
    chex.assert_rank(others, 1)
