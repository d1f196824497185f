"""The equations of the recurrent cells: what the gates make of a carry and two products.

`combine(gains, carry, projected, recurrent) -> (carry, outputs)`, where `projected` is the inputs'
share of the gates, `recurrent` the carry's, and `gains` what a cell has beside its kernels and
their biases. No kernel stands here; `cells` has the products.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.types import Array, Params

EPSILON = 1e-5  # added to a variance before its root


class RNNCarry(NamedTuple):
    """What an RNN hands to its next step."""

    hidden: Array  # [..., H] float32, also the output


class LSTMCarry(NamedTuple):
    """What an LSTM hands to its next step."""

    hidden: Array  # [..., H] float32, also the output
    cell: Array  # [..., H] float32


class GRUCarry(NamedTuple):
    """What a GRU hands to its next step."""

    hidden: Array  # [..., H] float32, also the output


class MinGRUCarry(NamedTuple):
    """What a minGRU hands to its next step."""

    hidden: Array  # [..., H] float32, also the output


def rnn_combine(
    gains: Params, carry: RNNCarry, projected: Array, recurrent: Array
) -> tuple[RNNCarry, jax.Array]:
    """Returns the next carry and output of a plain RNN.

        hₜ = tanh(pₜ + qₜ)

    Args:
      gains: none.
      carry: `[..., H]`; only its share `recurrent` matters.
      projected: p, `[..., H]` from `project`.
      recurrent: q, `[..., H]` from `recur`.

    Source: Elman 1990, as `torch.nn.RNN` has it.
    """
    hidden = jnp.tanh(projected + recurrent)
    return RNNCarry(hidden), hidden


def lstm_combine(
    gains: Params, carry: LSTMCarry, projected: Array, recurrent: Array
) -> tuple[LSTMCarry, jax.Array]:
    """Returns the next carry and output of an LSTM.

        i, f, g, o = pₜ + qₜ
        cₜ = σ(f) cₜ₋₁ + σ(i) tanh(g)
        hₜ = σ(o) tanh(cₜ)

    Args:
      gains: none.
      carry: `[..., H]`.
      projected: p, `[..., 4·H]` from `project`.
      recurrent: q, `[..., 4·H]` from `recur`.

    Source: Gers et al. 2000, as `torch.nn.LSTM` has it.
    """
    i, f, g, o = jnp.split(projected + recurrent, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * carry.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return LSTMCarry(hidden, cell), hidden


def gru_combine(
    gains: Params, carry: GRUCarry, projected: Array, recurrent: Array
) -> tuple[GRUCarry, jax.Array]:
    """Returns the next carry and output of a GRU.

        r, z = σ(pₜ + qₜ)       n = tanh(pₜ + r qₜ)
        hₜ = (1 − z) n + z hₜ₋₁

    Args:
      gains: none.
      carry: `[..., H]`.
      projected: p, `[..., 3·H]` from `project`.
      recurrent: q, `[..., 3·H]` from `recur`.

    Source: Cho et al. 2014 (arXiv:1406.1078v1), as `torch.nn.GRU` and cuDNN have it: `r` scales
    the recurrent product with its bias, not the carry.
    """
    input_r, input_z, input_n = jnp.split(projected, 3, axis=-1)
    hidden_r, hidden_z, hidden_n = jnp.split(recurrent, 3, axis=-1)
    r = jax.nn.sigmoid(input_r + hidden_r)
    z = jax.nn.sigmoid(input_z + hidden_z)
    n = jnp.tanh(input_n + r * hidden_n)
    hidden = (1.0 - z) * n + z * carry.hidden
    return GRUCarry(hidden), hidden


def layer_norm_lstm_combine(
    gains: Params, carry: LSTMCarry, projected: Array, recurrent: Array
) -> tuple[LSTMCarry, jax.Array]:
    """Returns the next carry and output of an LSTM whose gates and cell are normalised.

        LN(x) = (x − mean(x)) / √(var(x) + 1e-5)
        i, f, g, o = α LN(pₜ) + β LN(qₜ) + b
        cₜ = σ(f) cₜ₋₁ + σ(i) tanh(g)
        hₜ = σ(o) tanh(γ LN(cₜ) + d)

    Each of the two products is normalised over all 4·H numbers of a row; what is handed on is cₜ
    itself, not its normalised form. The paper has a bias in each LN and one more beside, which
    act as their sum alone: here they are one, b. The products keep their own biases, as that of
    the inputs does in the authors' code: without one the first step would normalise q = 0, where
    LN is steepest.

    Args:
      gains: α `input_scale`, β `recurrent_scale`, b `gate_bias`, `[4·H]`; γ `cell_scale`,
        d `cell_bias`, `[H]`.
      carry: `[..., H]`.
      projected: p, `[..., 4·H]` from `project`.
      recurrent: q, `[..., 4·H]` from `recur`.

    Source: Ba et al. 2016, "Layer Normalization" (arXiv:1607.06450), equations 20–22, with ε and
    scales of 1 to begin with as in github.com/ryankiros/layer-norm.
    """
    inputs = _normalise(projected, gains["input_scale"], gains["gate_bias"])
    gates = inputs + _normalise(recurrent, gains["recurrent_scale"])
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * carry.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    shown = _normalise(cell, gains["cell_scale"], gains["cell_bias"])
    hidden = jax.nn.sigmoid(o) * jnp.tanh(shown)
    return LSTMCarry(hidden, cell), hidden


def min_gru_combine(
    gains: Params, carry: MinGRUCarry, projected: Array, recurrent: Any
) -> tuple[MinGRUCarry, jax.Array]:
    """Returns the next carry and output of a minGRU, whose gates do not see the carry.

        z = σ(pₜ)       n = pₜ
        hₜ = (1 − z) hₜ₋₁ + z n

    Args:
      gains: none.
      carry: `[..., H]`.
      projected: p, `[..., 2·H]` from `project`, in the order z, n.
      recurrent: whatever stands for nothing.

    Source: Feng et al. 2024, "Were RNNs All We Needed?" (arXiv:2410.01201), section 3.1, the form
    without logarithms, in which n has no activation.
    """
    decay, added = min_gru_coefficients(projected)
    hidden = decay * carry.hidden + added
    return MinGRUCarry(hidden), hidden


def min_gru_coefficients(projected: Array) -> tuple[jax.Array, jax.Array]:
    """Returns a and b of hₜ = aₜ hₜ₋₁ + bₜ, each `[..., H]`, of `projected [..., 2·H]`."""
    update, candidate = jnp.split(projected, 2, axis=-1)
    z = jax.nn.sigmoid(update)
    return 1.0 - z, z * candidate


def _normalise(inputs: Any, scale: Array, bias: Array | None = None) -> jax.Array:
    """Returns `inputs [..., E]` with mean 0 and variance 1 along E, scaled and shifted by `[E]`."""
    centred = inputs - jnp.mean(inputs, axis=-1, keepdims=True)
    root = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPSILON)
    scaled = centred * root * jnp.broadcast_to(scale, centred.shape)
    return scaled if bias is None else scaled + jnp.broadcast_to(bias, scaled.shape)
