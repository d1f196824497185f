"""Chrono initialisation: gate biases that give the units of a cell a range of time constants."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vla_jax.types import Key, Params


def draw_log_odds(key: Key, num_units: int, span: int) -> jax.Array:
    """Returns log(p / (1 − p)) `[num_units]`, with 1 / (1 − p) uniform between 2 and `span` steps.

    A gate that keeps with probability p forgets in about 1 / (1 − p) steps.

    Args:
      key: consumed.
      num_units: of the cell.
      span: steps, above 2.

    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?" (arXiv:1804.11188),
    whose forget bias is log U(1, span − 1).
    """
    return jnp.log(jax.random.uniform(key, (num_units,), minval=1.0, maxval=span - 1.0))


def spread_biases(
    key: Key,
    params: Params,
    span: int,
    *,
    num_gates: int,
    gates: Sequence[tuple[int, int]],
    bias: str = "input_bias",
) -> Params:
    """Returns params whose gates start with time constants between 2 and `span` steps.

    Args:
      key: consumed.
      params: of the cell.
      span: steps, above 2.
      num_gates: G, parts of the bias.
      gates: (gate, sign) with sign 1 if the gate keeps the carry and −1 if it admits the input.
      bias: name of the param `[G·H]` with the biases of the gates.
    """
    biases = params[bias]
    size = biases.shape[0] // num_gates
    log_odds = draw_log_odds(key, size, span)
    for gate, sign in gates:
        biases = biases.at[gate * size : (gate + 1) * size].set(sign * log_odds)
    return {**params, bias: biases}


def head_log_odds(num_heads: int, span: int) -> jax.Array:
    """Returns log(p / (1 − p)) `[M]` with 1 / (1 − p) log-spaced from 2 to `span` steps.

    Not drawn: a cell has few heads, and a sample of four would often miss short or long times.

    Args:
      num_heads: M; a single head gets `span`.
      span: steps, above 2.
    """
    return jnp.log(jnp.geomspace(2.0, float(span), num_heads + 1)[1:] - 1.0)
