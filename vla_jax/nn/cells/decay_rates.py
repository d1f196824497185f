"""Decays exp(−rate · softplus(step size)) of the heads of a state-space cell, at the start."""

import jax
import jax.numpy as jnp

from vla_jax.nn.cells.time_constants import head_log_odds
from vla_jax.types import Array, Key, Params

SLOWEST, FASTEST = 1e-3, 1e-1  # range of the step sizes
LEAST, MOST = 1.0, 16.0  # range of the rates


def draw_rates(key: Key, num_heads: int) -> tuple[jax.Array, jax.Array]:
    """Returns the logarithm of the rates and the biases of the step sizes, each `[M]`.

    Rates are uniform between 1 and 16. Step sizes are log-spaced between 0.001 and 0.1, from the
    first head to the last, so that even few heads cover short and long times. Time constants
    1 / (1 − exp(−rate · step size)) are between 1.25 and 1,000 steps.

    Args:
      key: consumed.
      num_heads: M.

    Source: Gu & Dao 2023, "Mamba" (arXiv:2312.00752), section 3.6, and Mamba-2, where step sizes
    are drawn log-uniformly.
    """
    rates = jax.random.uniform(key, (num_heads,), minval=LEAST, maxval=MOST)
    step_sizes = jnp.geomspace(SLOWEST, FASTEST, num_heads)
    return jnp.log(rates), step_sizes + jnp.log(-jnp.expm1(-step_sizes))  # softplus⁻¹


def spread_rates(key: Key, params: Params, span: int) -> Params:
    """Returns params whose heads have time constants between 2 and `span` steps.

    Args:
      key: not used.
      params: with `log_rate` `[M]`; the last M of `input_bias` are those of the step sizes.
      span: steps, above 2.
    """
    del key
    num_heads = params["log_rate"].shape[0]
    step_sizes = jax.nn.softplus(params["input_bias"][-num_heads:])
    log_kept = jax.nn.log_sigmoid(head_log_odds(num_heads, span))
    return {**params, "log_rate": jnp.log(-log_kept / step_sizes)}


def log_decay(log_rate: Array, step_size: jax.Array) -> jax.Array:
    """Returns −exp(log_rate) Δ `[..., M]`, for rates `[M]` and positive step sizes Δ `[..., M]`."""
    return -jnp.broadcast_to(jnp.exp(log_rate), step_size.shape) * step_size
