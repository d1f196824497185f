"""SARSA: the value of an action moves towards its reward and the value of the next one taken.

Written for one episode, or one stretch of several: `vmap` them over a batch.
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
    """Returns how far each value is from what it should move to.

        δₜ = Gₜ − q(sₜ, aₜ)
        Gₜ = rₜ + γₜ [(1 − λₜ) q(s′ₜ, a′ₜ) + λₜ Gₜ₊₁]

    With λ = 0, which is SARSA itself, q(s, a) ← r + γ q(s′, a′). The target gives no gradient, so
    that descending δ² / 2 is the semi-gradient update q(s, a) ← q(s, a) + α δ.

    Args:
      q: q(sₜ, ·) `[T, A]`.
      action: aₜ `[T]` int, that were taken.
      reward: `[T]`.
      discount: `[T]`, 0 at a true end.
      next_q: q(s′ₜ, ·) `[T, A]`.
      next_action: a′ₜ `[T]` int, taken next.
      lambda_: `[]` or `[T]` in [0, 1]; 0 where time ran out.

    Returns:
      δ `[T]` float32.

    Raises:
      ValueError: there are no steps.

    Source: Rummery and Niranjan 1994, "On-Line Q-Learning Using Connectionist Systems"; the
    semi-gradient with a network Sutton and Barto 2018, equation 10.2; λ, section 12.7.
    """
    _check(q, action, next_q, next_action)
    target = lambda_returns(reward, discount, _taken(next_q, next_action), lambda_)
    return jnp.asarray(jax.lax.stop_gradient(target) - _taken(q, action))


def expected_sarsa_error(
    q: Array, action: Array, reward: Array, discount: Array, next_q: Array, probability: Array
) -> jax.Array:
    """Returns the error towards the mean over the next action, in place of the one taken.

        δₜ = rₜ + γₜ Σₐ π(a | s′ₜ) q(s′ₜ, a) − q(sₜ, aₜ)

    Args:
      q: q(sₜ, ·) `[T, A]`.
      action: aₜ `[T]` int, that were taken.
      reward: `[T]`.
      discount: `[T]`, 0 at a true end.
      next_q: q(s′ₜ, ·) `[T, A]`.
      probability: π(· | s′ₜ) `[T, A]`.

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
    return jnp.asarray(jax.lax.stop_gradient(target) - _taken(q, action))


def _taken(q: Array, action: Array) -> jax.Array:
    return jnp.take_along_axis(jnp.asarray(q), action[:, None], axis=-1)[:, 0]


def _check(q: Array, action: Array, next_q: Array, *others: Array) -> None:
    chex.assert_rank([q, action], [2, 1])
    chex.assert_equal_shape([q, next_q])
    chex.assert_equal_shape_prefix([q, action, *others], 1)
