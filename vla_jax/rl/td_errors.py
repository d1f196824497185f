"""Temporal-difference errors of SARSA(λ) and Expected SARSA.

The functions take one sequence `[T]`, which may hold several episodes; `vmap` them over a batch.
"""

import chex
import jax
import jax.numpy as jnp

from vla_jax.rl.returns import lambda_returns
from vla_jax.types import Array


def sarsa_error(
    q: Array,
    action: Array,
    reward: Array,
    discount: Array,
    next_q: Array,
    next_action: Array,
    lambda_: Array | float = 0.0,
) -> jax.Array:
    """Returns the SARSA(λ) errors: target minus estimated action value.

        δₜ = Gₜ − q(sₜ, aₜ)
        Gₜ = rₜ + γₜ [(1 − λₜ) q(s′ₜ, a′ₜ) + λₜ Gₜ₊₁]

    λ = 0 is plain SARSA, with the target r + γ q(s′, a′). The target is a stop-gradient, so that
    gradient descent on δ² / 2 is the semi-gradient update q(s, a) ← q(s, a) + α δ.

    Args:
      q: q(sₜ, ·) `[T, num_actions]`.
      action: aₜ `[T]` int, actions taken.
      reward: `[T]`.
      discount: `[T]`, 0 where an episode terminates.
      next_q: q(s′ₜ, ·) `[T, num_actions]`.
      next_action: a′ₜ `[T]` int, actions taken one step later.
      lambda_: `[]` or `[T]` in [0, 1]; 0 at a truncation.

    Returns:
      δ `[T]` float32.

    Raises:
      ValueError: there are no steps.

    Source: Rummery and Niranjan 1994, "On-Line Q-Learning Using Connectionist Systems"; the
    semi-gradient with a network Sutton and Barto 2018, equation 10.2; λ, section 12.7.
    """
    _check(q, action, next_q, next_action)
    target = lambda_returns(reward, discount, _of_action(next_q, next_action), lambda_)
    return jnp.asarray(jax.lax.stop_gradient(target) - _of_action(q, action))


def expected_sarsa_error(
    q: Array, action: Array, reward: Array, discount: Array, next_q: Array, probability: Array
) -> jax.Array:
    """Returns the Expected SARSA errors: the target averages over the next action.

        δₜ = rₜ + γₜ Σₐ π(a | s′ₜ) q(s′ₜ, a) − q(sₜ, aₜ)

    Args:
      q: q(sₜ, ·) `[T, num_actions]`.
      action: aₜ `[T]` int, actions taken.
      reward: `[T]`.
      discount: `[T]`, 0 where an episode terminates.
      next_q: q(s′ₜ, ·) `[T, num_actions]`.
      probability: π(· | s′ₜ) `[T, num_actions]`.

    Returns:
      δ `[T]` float32.

    Raises:
      ValueError: there are no steps.

    Source: van Seijen et al. 2009, "A Theoretical and Empirical Analysis of Expected Sarsa".
    """
    _check(q, action, next_q)
    chex.assert_equal_shape([next_q, probability])
    mean = jnp.sum(probability * next_q, axis=-1)
    target = lambda_returns(reward, discount, mean, 0.0)
    return jnp.asarray(jax.lax.stop_gradient(target) - _of_action(q, action))


def _of_action(q: Array, action: Array) -> jax.Array:
    return jnp.take_along_axis(jnp.asarray(q), action[:, None], axis=-1)[:, 0]


def _check(q: Array, action: Array, next_q: Array, *others: Array) -> None:
    chex.assert_rank([q, action], [2, 1])
    chex.assert_equal_shape([q, next_q])
    chex.assert_equal_shape_prefix([q, action, *others], 1)
