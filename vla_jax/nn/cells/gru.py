"""Gated recurrent unit (GRU)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.cells.contract import Cell, init_uniform, zeros
from vla_jax.nn.cells.time_constants import spread_biases
from vla_jax.types import Array, Params


class GRUCarry(NamedTuple):
    """Carry of a GRU."""

    hidden: Array  # [..., H] float32, also the output


def combine(
    extra_params: Params, carry: GRUCarry, projected: Array, recurrent: Array
) -> tuple[GRUCarry, jax.Array]:
    """Returns the next carry and output of a GRU.

        r, z = σ(pₜ + qₜ)       n = tanh(pₜ + r qₜ)
        hₜ = (1 − z) n + z hₜ₋₁

    Args:
      extra_params: empty.
      carry: `[..., H]`.
      projected: p `[..., 3·H]`.
      recurrent: q `[..., 3·H]`.

    Source: Cho et al. 2014 (arXiv:1406.1078v1), as in `torch.nn.GRU` and cuDNN: `r` scales the
    recurrent product including its bias, not the carry.
    """
    del extra_params
    input_r, input_z, input_n = jnp.split(projected, 3, axis=-1)
    hidden_r, hidden_z, hidden_n = jnp.split(recurrent, 3, axis=-1)
    r = jax.nn.sigmoid(input_r + hidden_r)
    z = jax.nn.sigmoid(input_z + hidden_z)
    n = jnp.tanh(input_n + r * hidden_n)
    hidden = (1.0 - z) * n + z * carry.hidden
    return GRUCarry(hidden), hidden


GRU = Cell(
    num_gates=3,
    init=partial(init_uniform, num_gates=3),
    zero_carry=partial(zeros, carry_type=GRUCarry),
    combine=combine,
    spread=partial(spread_biases, num_gates=3, gates=((1, 1),)),  # update gate
)
