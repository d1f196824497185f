"""Discounted returns, λ-returns and generalised advantage estimates.

The functions take one sequence `[T]`, which may hold several episodes; `vmap` them over a batch.
Step t has the reward rₜ and the discount γₜ of everything after it. γₜ is 0 where an episode
terminates, so that nothing leaks into the next episode, and γ where it is truncated, because the
episode could have continued. At a truncation λₜ must be 0: the return then bootstraps from the
value of the last observation.
"""

import chex
import jax
import jax.numpy as jnp

from vla_jax.types import Array


def discounted_returns(reward: Array, discount: Array, last_value: Array | float = 0.0) -> Array:
    """Returns the discounted return from each step on.

        Gₜ = rₜ + γₜ Gₜ₊₁,    G_T = v_T

    Args:
      reward: `[T]`.
      discount: `[T]` in [0, 1].
      last_value: v_T `[]`, expected return after the last step.

    Returns:
      `[T]` float32.

    Raises:
      ValueError: there are no steps.

    Source: Sutton and Barto 2018, "Reinforcement Learning", equation 3.9.
    """
    _check(reward, discount)
    return _accumulate(reward, discount, last_value)


def lambda_returns(
    reward: Array, discount: Array, next_value: Array, lambda_: Array | float = 1.0
) -> Array:
    """Returns the λ-return: a mixture of n-step returns, one-step for λ = 0, Monte Carlo for λ = 1.

        Gₜ = rₜ + γₜ [(1 − λₜ) vₜ₊₁ + λₜ Gₜ₊₁],    G_T = v_T

    Args:
      reward: `[T]`.
      discount: `[T]` in [0, 1].
      next_value: vₜ₊₁ `[T]`, value of the state after each step.
      lambda_: `[]` or `[T]` in [0, 1]; 0 at a truncation.

    Returns:
      `[T]` float32.

    Raises:
      ValueError: there are no steps.

    Source: Sutton and Barto 2018, equation 12.18.
    """
    _check(reward, discount, next_value)
    next_value = _before_end(next_value, discount)
    lambda_ = jnp.broadcast_to(lambda_, reward.shape)
    return _accumulate(
        reward + discount * (1.0 - lambda_) * next_value, discount * lambda_, next_value[-1]
    )


def advantages(
    reward: Array, discount: Array, value: Array, next_value: Array, lambda_: Array | float = 1.0
) -> Array:
    """Returns generalised advantage estimates.

        δₜ = rₜ + γₜ vₜ₊₁ − vₜ        Âₜ = δₜ + γₜ λₜ Âₜ₊₁,    Â_T = 0

    With λ = 1 the estimate is the return minus the baseline, Gₜ − vₜ.

    Args:
      reward: `[T]`.
      discount: `[T]` in [0, 1].
      value: vₜ `[T]`, the baseline.
      next_value: vₜ₊₁ `[T]`, value of the state after each step.
      lambda_: `[]` or `[T]` in [0, 1]; 0 at a truncation.

    Returns:
      `[T]` float32.

    Raises:
      ValueError: there are no steps.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation" (arXiv:1506.02438), equation 16.
    """
    _check(reward, discount, value, next_value)
    error = reward + discount * _before_end(next_value, discount) - value
    return _accumulate(error, discount * jnp.broadcast_to(lambda_, reward.shape), 0.0)


def _before_end(next_value: Array, discount: Array) -> jax.Array:
    """Returns the values with 0 after an end, where they may be anything: 0 · NaN is NaN."""
    return jnp.where(discount == 0.0, 0.0, next_value)


def _accumulate(terms: Array, factors: Array, last: Array | float) -> jax.Array:
    """Returns xₜ = termₜ + factorₜ xₜ₊₁ for all t, with x_T = last."""

    def step(next_total: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        term, factor = inputs
        total = term + factor * _before_end(next_total, factor)
        return total, total

    start = jnp.asarray(last, jnp.float32) + 0.0 * terms[0]  # takes the sharding of the terms
    _, totals = jax.lax.scan(step, start, (terms, factors), reverse=True)
    return jnp.asarray(totals)


def _check(reward: Array, *others: Array) -> None:
    chex.assert_rank(reward, 1)
    chex.assert_equal_shape([reward, *others])
    if reward.shape[0] == 0:
        raise ValueError("reward must hold at least one step, got 0; drop empty episodes.")
