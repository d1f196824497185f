"""Scalar LSTM of xLSTM (sLSTM): exponential input gate, normaliser and stabiliser."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.cells.contract import Cell, init_uniform, zeros
from vla_jax.nn.cells.time_constants import spread_biases
from vla_jax.types import Array, Params


class SLSTMCarry(NamedTuple):
    """Carry of an sLSTM; all zeros before the first step, at least 1 in `normaliser` after it."""

    hidden: Array  # [..., H] float32, also the output
    cell: Array  # [..., H] float32, scaled by exp(−stabiliser)
    normaliser: Array  # [..., H] float32, scaled by exp(−stabiliser)
    stabiliser: Array  # [..., H] float32, logarithm of the scale


def combine(
    extra_params: Params, carry: SLSTMCarry, projected: Array, recurrent: Array
) -> tuple[SLSTMCarry, jax.Array]:
    """Returns the next carry and output of an sLSTM.

        i, f, g, o = pₜ + qₜ
        mₜ = max(log σ(f) + mₜ₋₁, i)
        i′ = exp(i − mₜ)       f′ = exp(log σ(f) + mₜ₋₁ − mₜ)
        cₜ = f′ cₜ₋₁ + i′ tanh(g)
        nₜ = f′ nₜ₋₁ + i′
        hₜ = σ(o) cₜ / nₜ

    The stabiliser m cancels out in h. As one of i′ and f′ is 1, n is at least 1.

    Args:
      extra_params: empty.
      carry: `[..., H]`.
      projected: p `[..., 4·H]`, in the order i, f, g, o (g is the paper's z).
      recurrent: q `[..., 4·H]`.

    Source: Beck et al. 2024, "xLSTM" (arXiv:2405.04517), section 2.2 and appendix A.2, with the
    sigmoid forget gate that NX-AI/xlstm uses.
    """
    del extra_params
    i, f, g, o = jnp.split(projected + recurrent, 4, axis=-1)
    kept = jax.nn.log_sigmoid(f) + carry.stabiliser
    # An empty memory has no scale; with m = 0 as its scale, a first i below −100 would underflow.
    kept = jnp.where(carry.normaliser == 0.0, i, kept)
    stabiliser = jnp.maximum(kept, i)
    admit, keep = jnp.exp(i - stabiliser), jnp.exp(kept - stabiliser)
    cell = keep * carry.cell + admit * jnp.tanh(g)
    normaliser = keep * carry.normaliser + admit
    hidden = jax.nn.sigmoid(o) * cell / normaliser
    return SLSTMCarry(hidden, cell, normaliser, stabiliser), hidden


S_LSTM = Cell(
    num_gates=4,
    init=partial(init_uniform, num_gates=4),
    zero_carry=partial(zeros, carry_type=SLSTMCarry),
    combine=combine,
    sums_gates=True,
    # Of steady inputs, n keeps the fraction σ(f) per step; the input gate does not matter.
    spread=partial(spread_biases, num_gates=4, gates=((1, 1),)),
)
