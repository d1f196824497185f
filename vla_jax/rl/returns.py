"""What a step was worth in the end: discounted and λ-returns, advantages.

Written for one episode, or one stretch of several: `vmap` them over a batch. Step t has its
reward rₜ, and the discount γₜ of all that follows it: 0 at a true end, so that nothing leaks from
one episode into the next, and γ where time merely ran out, for the world would have gone on.
Where it ran out, λₜ must be 0: the return then ends in the value of the last thing seen.
"""

import chex
import jax
import jax.numpy as jnp

from vla_jax.types import Array


def discounted_returns(reward: Array, discount: Array, last_value: Array | float = 0.0) -> Array:
    """Returns the discounted sum of what was rewarded from each step on.

        Gₜ = rₜ + γₜ Gₜ₊₁,    G_T = v_T

    Args:
      reward: `[T]`.
      discount: `[T]` in [0, 1].
      last_value: v_T `[]`, what is expected after the last step.

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
    """Returns the mixture of n-step returns, from one step (λ = 0) to all of them (λ = 1).

        Gₜ = rₜ + γₜ [(1 − λₜ) vₜ₊₁ + λₜ Gₜ₊₁],    G_T = v_T

    Args:
      reward: `[T]`.
      discount: `[T]` in [0, 1].
      next_value: vₜ₊₁ `[T]`, the value of what each step led to.
      lambda_: `[]` or `[T]` in [0, 1]; 0 where time ran out.

    Returns:
      `[T]` float32.

    Raises:
      ValueError: there are no steps.

    Source: Sutton and Barto 2018, equation 12.18.
    """
    _check(reward, discount, next_value)
    lambda_ = jnp.broadcast_to(lambda_, reward.shape)
    return _accumulate(
        reward + discount * (1.0 - lambda_) * next_value, discount * lambda_, next_value[-1]
    )


def advantages(
    reward: Array, discount: Array, value: Array, next_value: Array, lambda_: Array | float = 1.0
) -> Array:
    """Returns how much better each step went than its baseline foretold.

        δₜ = rₜ + γₜ vₜ₊₁ − vₜ        Âₜ = δₜ + γₜ λₜ Âₜ₊₁,    Â_T = 0

    With λ = 1 it is the return less the baseline, Gₜ − vₜ.

    Args:
      reward: `[T]`.
      discount: `[T]` in [0, 1].
      value: vₜ `[T]`, the baseline.
      next_value: vₜ₊₁ `[T]`, the value of what each step led to.
      lambda_: `[]` or `[T]` in [0, 1]; 0 where time ran out.

    Returns:
      `[T]` float32.

    Raises:
      ValueError: there are no steps.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation" (arXiv:1506.02438), equation 16.
    """
    _check(reward, discount, value, next_value)
    error = reward + discount * next_value - value
    return _accumulate(error, discount * jnp.broadcast_to(lambda_, reward.shape), 0.0)


def _accumulate(terms: Array, factors: Array, last: Array | float) -> jax.Array:
    """Returns xₜ = termₜ + factorₜ xₜ₊₁ for all t, with x_T = last."""

    def step(following: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        term, factor = at
        total = term + factor * following
        return total, total

    start = jnp.asarray(last, jnp.float32) + 0.0 * terms[0]  # sharded as the terms are
    _, totals = jax.lax.scan(step, start, (terms, factors), reverse=True)
    return jnp.asarray(totals)


def _check(reward: Array, *others: Array) -> None:
    chex.assert_rank(reward, 1)
    chex.assert_equal_shape([reward, *others])
    if reward.shape[0] == 0:
        raise ValueError("reward must hold at least one step, got 0; drop empty episodes.")
