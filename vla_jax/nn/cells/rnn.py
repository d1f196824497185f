"""A plain recurrent network (Elman network)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.cells.contract import Cell, init_uniform, zeros
from vla_jax.types import Array, Params


class RNNCarry(NamedTuple):
    """Carry of an RNN."""

    hidden: Array  # [..., H] float32, also the output


def combine(
    extra_params: Params, carry: RNNCarry, projected: Array, recurrent: Array
) -> tuple[RNNCarry, jax.Array]:
    """Returns the next carry and output of a plain RNN.

        hₜ = tanh(pₜ + qₜ)

    Args:
      extra_params: empty.
      carry: `[..., H]`; used through `recurrent` only.
      projected: p `[..., H]`.
      recurrent: q `[..., H]`.

    Source: Elman 1990, as in `torch.nn.RNN`.
    """
    del extra_params, carry
    hidden = jnp.tanh(projected + recurrent)
    return RNNCarry(hidden), hidden


RNN = Cell(
    num_gates=1,
    init=partial(init_uniform, num_gates=1),
    zero_carry=partial(zeros, carry_type=RNNCarry),
    combine=combine,
    sums_gates=True,
)
