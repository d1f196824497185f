"""Long short-term memory (LSTM)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.cells.contract import Cell, init_uniform, zeros
from vla_jax.nn.cells.time_constants import spread_biases
from vla_jax.types import Array, Params


class LSTMCarry(NamedTuple):
    """Carry of an LSTM."""

    hidden: Array  # [..., H] float32, also the output
    cell: Array  # [..., H] float32


def combine(
    extra_params: Params, carry: LSTMCarry, projected: Array, recurrent: Array
) -> tuple[LSTMCarry, jax.Array]:
    """Returns the next carry and output of an LSTM.

        i, f, g, o = pₜ + qₜ
        cₜ = σ(f) cₜ₋₁ + σ(i) tanh(g)
        hₜ = σ(o) tanh(cₜ)

    Args:
      extra_params: empty.
      carry: `[..., H]`.
      projected: p `[..., 4·H]`.
      recurrent: q `[..., 4·H]`.

    Source: Gers et al. 2000, as in `torch.nn.LSTM`.
    """
    del extra_params
    i, f, g, o = jnp.split(projected + recurrent, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * carry.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return LSTMCarry(hidden, cell), hidden


LSTM = Cell(
    num_gates=4,
    init=partial(init_uniform, num_gates=4),
    zero_carry=partial(zeros, carry_type=LSTMCarry),
    combine=combine,
    sums_gates=True,
    spread=partial(spread_biases, num_gates=4, gates=((0, -1), (1, 1))),  # input, forget gate
)
