"""Losses of proximal policy optimisation (PPO) and the two numbers by which it is watched.

The functions take one sequence `[T]`; `vmap` them over a batch and average. `weight` is 1 at real
steps and 0 at masked ones, where all other arguments are arbitrary, NaN too. The denominator of the
losses is always T, so that every real step of a batch has the same weight.
"""

import chex
import jax
import jax.numpy as jnp

from vla_jax.types import Array

_EPSILON = 1e-6  # prevents a division by zero if all advantages are equal


def clipped_loss(
    log_probability: Array, old: Array, advantage: Array, weight: Array, clip_range: Array | float
) -> jax.Array:
    """Returns the clipped surrogate loss.

        L = −1/T Σₜ wₜ min(ρₜ Âₜ, clip(ρₜ, 1 − ε, 1 + ε) Âₜ),    ρₜ = π(aₜ | sₜ) / π₀(aₜ | sₜ)

    At π = π₀ its gradient is that of REINFORCE; a step whose ratio has left the interval in the
    direction of its advantage has no gradient.

    Args:
      log_probability: log π(aₜ | sₜ) `[T]`.
      old: log π₀(aₜ | sₜ) `[T]` of the policy that acted.
      advantage: Â `[T]` (stop-gradient).
      weight: w `[T]`.
      clip_range: ε `[]`, above 0.

    Returns:
      `[]` float32.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv:1707.06347),
    equation 7.
    """
    chex.assert_equal_shape([log_probability, old, advantage, weight])
    ratio = jnp.exp(_log_ratio(log_probability, old, weight))
    advantage = jax.lax.stop_gradient(_keep_real(advantage, weight))
    clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return -jnp.mean(weight * jnp.minimum(ratio * advantage, clipped * advantage))


def clipped_value_loss(
    value: Array, old: Array, return_: Array, weight: Array, clip_range: Array | float
) -> jax.Array:
    """Returns the mean squared error of a baseline that may move by ε from its old values.

        L = 1/T Σₜ wₜ max((Gₜ − vₜ)², (Gₜ − v₀ₜ − clip(vₜ − v₀ₜ, −ε, ε))²)

    Args:
      value: v `[T]`.
      old: v₀ `[T]`, values before the first pass.
      return_: G `[T]` (stop-gradient).
      weight: w `[T]`.
      clip_range: ε `[]`, above 0, in units of the returns.

    Returns:
      `[]` float32.

    Source: the published implementation of Schulman et al. 2017; Andrychowicz et al. 2021, "What
    Matters for On-Policy Deep Actor-Critic Methods?", section 3.2, found no gain from it.
    """
    chex.assert_equal_shape([value, old, return_, weight])
    value, old, return_ = (_keep_real(array, weight) for array in (value, old, return_))
    old, return_ = jax.lax.stop_gradient((old, return_))
    clipped = old + jnp.clip(value - old, -clip_range, clip_range)
    error = jnp.maximum(jnp.square(return_ - value), jnp.square(return_ - clipped))
    return jnp.mean(weight * error)


def normalise(advantage: Array, weight: Array) -> jax.Array:
    """Returns advantages with mean 0 and standard deviation 1 over the real steps of a batch.

    They are 0 at masked steps.

    Args:
      advantage: Â, any shape.
      weight: w, same shape.

    Source: Andrychowicz et al. 2021, choice C67 (per minibatch).
    """
    chex.assert_equal_shape([advantage, weight])
    advantage, count = _keep_real(advantage, weight), jnp.maximum(jnp.sum(weight), _EPSILON)
    centred = weight * (advantage - jnp.sum(weight * advantage) / count)
    deviation = jnp.sqrt(jnp.sum(jnp.square(centred)) / count)
    return jnp.asarray(centred / (deviation + _EPSILON))


def divergence(log_probability: Array, old: Array, weight: Array) -> jax.Array:
    """Returns an estimate of KL(π₀ ‖ π), at least 0, and 0 where both policies agree.

        1/T Σₜ wₜ (ρₜ − 1 − log ρₜ)

    Args:
      log_probability: log π(aₜ | sₜ) `[T]`.
      old: log π₀(aₜ | sₜ) `[T]` of the policy that acted.
      weight: w `[T]`.

    Source: Schulman 2020, "Approximating KL Divergence", estimator k₃.
    """
    log_ratio = _log_ratio(log_probability, old, weight)
    return jnp.mean(weight * (jnp.expm1(log_ratio) - log_ratio))


def clipped_fraction(
    log_probability: Array, old: Array, weight: Array, clip_range: Array | float
) -> jax.Array:
    """Returns the fraction of all steps, masked ones included, whose ratio is not within 1 ± ε.

    Args:
      log_probability: log π(aₜ | sₜ) `[T]`.
      old: log π₀(aₜ | sₜ) `[T]` of the policy that acted.
      weight: w `[T]`.
      clip_range: ε `[]`, above 0.
    """
    ratio = jnp.exp(_log_ratio(log_probability, old, weight))
    return jnp.mean(weight * (jnp.abs(ratio - 1.0) > clip_range))


def _log_ratio(log_probability: Array, old: Array, weight: Array) -> jax.Array:
    old = jax.lax.stop_gradient(_keep_real(old, weight))
    return _keep_real(log_probability, weight) - old


def _keep_real(values: Array, weight: Array) -> jax.Array:
    """Returns values with zeros where the weight is 0, since 0 · NaN is NaN."""
    return jnp.where(weight != 0, values, 0.0)
