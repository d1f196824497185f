"""LSTM with layer normalisation of its gates and of its cell state."""

from functools import partial

import jax
import jax.numpy as jnp

from vla_jax.nn.cells.contract import Cell, init_uniform, zeros
from vla_jax.nn.cells.lstm import LSTMCarry
from vla_jax.nn.cells.time_constants import spread_biases
from vla_jax.nn.layers import layer_norm
from vla_jax.types import Array, Key, Params


def init(key: Key, input_size: int, hidden_size: int) -> Params:
    """Returns the params of an LSTM, scales of 1 and biases of 0 for the normalisations.

    Args:
      key: consumed.
      input_size: D.
      hidden_size: H.
    """
    gates, units = jnp.zeros(4 * hidden_size), jnp.zeros(hidden_size)
    return {
        **init_uniform(key, input_size, hidden_size, num_gates=4),
        "input_scale": gates + 1.0,
        "recurrent_scale": gates + 1.0,
        "gate_bias": gates,
        "cell_scale": units + 1.0,
        "cell_bias": units,
    }


def combine(
    extra_params: Params, carry: LSTMCarry, projected: Array, recurrent: Array
) -> tuple[LSTMCarry, jax.Array]:
    """Returns the next carry and output of an LSTM with layer normalisation.

        LN(x) = (x − mean(x)) / √(var(x) + 1e-5)
        i, f, g, o = α LN(pₜ) + β LN(qₜ) + b
        cₜ = σ(f) cₜ₋₁ + σ(i) tanh(g)
        hₜ = σ(o) tanh(γ LN(cₜ) + d)

    Each product is normalised over all 4·H features; the carry is cₜ itself, not its normalised
    form. The paper has one bias per LN and a gate bias; only their sum matters, so there is one, b.
    The products keep their own biases: without them the first step would normalise q = 0, where the
    gradient of LN is largest.

    Args:
      extra_params: α `input_scale`, β `recurrent_scale`, b `gate_bias` `[4·H]`; γ `cell_scale`,
        d `cell_bias` `[H]`.
      carry: `[..., H]`.
      projected: p `[..., 4·H]`.
      recurrent: q `[..., 4·H]`.

    Source: Ba et al. 2016, "Layer Normalization" (arXiv:1607.06450), equations 20–22; ε and the
    initial scales of 1 from github.com/ryankiros/layer-norm.
    """
    inputs = layer_norm(projected, extra_params["input_scale"], extra_params["gate_bias"])
    gates = inputs + layer_norm(recurrent, extra_params["recurrent_scale"])
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * carry.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    normalised = layer_norm(cell, extra_params["cell_scale"], extra_params["cell_bias"])
    hidden = jax.nn.sigmoid(o) * jnp.tanh(normalised)
    return LSTMCarry(hidden, cell), hidden


LAYER_NORM_LSTM = Cell(
    num_gates=4,
    init=init,
    zero_carry=partial(zeros, carry_type=LSTMCarry),
    combine=combine,
    spread=partial(  # input gate, forget gate
        spread_biases, num_gates=4, gates=((0, -1), (1, 1)), bias="gate_bias"
    ),
)
