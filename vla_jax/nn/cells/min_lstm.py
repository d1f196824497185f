"""Minimal LSTM (minLSTM): linear in its carry, without a recurrent product."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.cells.contract import Cell, combine_linear, init_uniform, zeros
from vla_jax.nn.cells.time_constants import spread_biases
from vla_jax.types import Array, Key, Params


class MinLSTMCarry(NamedTuple):
    """Carry of a minLSTM."""

    hidden: Array  # [..., H] float32, also the output


def init(key: Key, input_size: int, hidden_size: int) -> Params:
    """Returns `{"input_kernel" [D, 3·H], "input_bias" [3·H]}` from U(−1/√H, 1/√H).

    Args:
      key: consumed.
      input_size: D.
      hidden_size: H.
    """
    params = init_uniform(key, input_size, hidden_size, num_gates=3)
    return {name: params[name] for name in ("input_kernel", "input_bias")}


def coefficients(extra_params: Params, projected: Array) -> tuple[jax.Array, jax.Array]:
    """Returns a and b of hₜ = aₜ hₜ₋₁ + bₜ, each `[..., H]`; the gates do not depend on the carry.

        i, f = σ(pₜ)       g = pₜ
        hₜ = f/(f + i) hₜ₋₁ + i/(f + i) g

    Args:
      extra_params: empty.
      projected: p `[..., 3·H]`, in the order i, f, g.

    Source: Feng et al. 2024, "Were RNNs All We Needed?" (arXiv:2410.01201), section 3.2, the form
    without logarithms, in which g has no activation.
    """
    del extra_params
    i, f, g = jnp.split(projected, 3, axis=-1)
    # f/(f + i) = σ(log f − log i), which is finite where both gates underflow.
    log_odds = jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)
    return jax.nn.sigmoid(log_odds), jax.nn.sigmoid(-log_odds) * g


MIN_LSTM = Cell(
    num_gates=3,
    init=init,
    zero_carry=partial(zeros, carry_type=MinLSTMCarry),
    combine=partial(combine_linear, coefficients=coefficients),
    sums_gates=True,
    coefficients=coefficients,
    # With biases −b and b, f/(f + i) = σ(b), as f + i = 1.
    spread=partial(spread_biases, num_gates=3, gates=((0, -1), (1, 1))),
)
