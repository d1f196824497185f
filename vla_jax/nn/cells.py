"""Recurrent cells as pure functions: RNN, LSTM, GRU, LSTM with layer normalisation, minGRU.

A cell is one step, `step(params, carry, inputs) -> (carry, outputs)`: bind `params` and it is the
body of `jax.lax.scan`. It comes in three parts: two products, of which that with the inputs does
not wait for the carry and can be taken for all steps at once before the scan, and the gates, whose
equations stand in `gates`:

    p, q = project(params, inputs), recur(params, carry)
    step(params, carry, inputs) = combine(gains(params), carry, p, q)

All kernels are in the products, none in `combine`; `bptt` builds its backward pass on that. The
`gains` are vectors at most, such as the scales of a normalisation; most cells have none.

Every cell but the minGRU has these four params, in PyTorch's and cuDNN's layout transposed:
`input_kernel` `[D, G·H]`, `recurrent_kernel` `[H, G·H]`, `input_bias` and `recurrent_bias` `[G·H]`;
the LayerNorm-LSTM has gains beside them. Gates lie on the last axis: LSTM `i f g o`; GRU `r z n`,
with the reset after the recurrent product. The two biases of a gate are kept apart as they are
there: Adam moves them twice as fast as one would.
A minGRU, gates `z n`, has no recurrent product; it is linear in its carry (see `associative`).

Carries and gates are float32; `dtype` is that of the factors of the products alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.gates import (
    GRUCarry,
    LSTMCarry,
    MinGRUCarry,
    RNNCarry,
    gru_combine,
    layer_norm_lstm_combine,
    lstm_combine,
    min_gru_coefficients,
    min_gru_combine,
    rnn_combine,
)
from vla_jax.nn.layers import dense
from vla_jax.types import Array, Key, Params

PRODUCTS = ("input_kernel", "recurrent_kernel", "input_bias", "recurrent_bias")
CellName = Literal["rnn", "lstm", "gru", "layer_norm_lstm", "min_gru"]  # keys of `CELLS`


class Cell(NamedTuple):
    """A family member: what `recurrence` needs to know of a cell."""

    num_gates: int  # G
    adds: bool  # whether `combine` sees the sum of projected and recurrent only
    init: Callable[[Key, int, int], Params]  # (key, input_size, hidden_size) -> params
    zero_carry: Callable[[Array, int], Any]  # (like [B, ...], hidden_size) -> carry [B, H]
    project: Callable[..., jax.Array]  # (params, inputs [..., D], *, dtype) -> [..., G·H]
    recur: Callable[..., jax.Array | None]  # (params, carry, *, dtype) -> [..., G·H]; None: none
    combine: Callable[..., tuple[Any, jax.Array]]  # (gains, carry, projected, recurrent)
    step: Callable[..., tuple[Any, jax.Array]]  # (params, carry, inputs [..., D], *, dtype)
    # projected -> (a, b) with hₜ = aₜ hₜ₋₁ + bₜ, where the cell is linear in its carry
    coefficients: Callable[[Array], tuple[jax.Array, jax.Array]] | None = None


def project(params: Params, inputs: Array, *, dtype: str = "float32") -> jax.Array:
    """Returns the inputs' share of the gates, the half of a step that does not need the carry.

        p = x · W + b

    Args:
      params: of any cell.
      inputs: `[..., D]`; all steps of a sequence at once is the point of it.
      dtype: of the factors of the product.

    Returns:
      `[..., G·H]` float32.
    """
    return dense(inputs, params["input_kernel"], params["input_bias"], dtype=dtype)


def recur(params: Params, carry: Any, *, dtype: str = "float32") -> jax.Array | None:
    """Returns the carry's share of the gates, or None of a cell without a recurrent kernel.

        q = h · R + b

    Args:
      params: of any cell.
      carry: of the same cell, `[..., H]`.
      dtype: of the factors of the product.

    Returns:
      `[..., G·H]` float32.
    """
    if "recurrent_kernel" not in params:
        return None
    kernel, bias = params["recurrent_kernel"], params["recurrent_bias"]
    return dense(carry.hidden, kernel, bias, dtype=dtype)


def gains(params: Params) -> Params:
    """Returns those params of a cell that are in neither of the two products."""
    return {name: leaf for name, leaf in params.items() if name not in PRODUCTS}


def _init(key: Key, input_size: int, hidden_size: int, *, num_gates: int) -> Params:
    """Returns params drawn from U(−1/√H, 1/√H), biases included, as PyTorch draws them."""
    width = num_gates * hidden_size
    shapes = {
        "input_kernel": (input_size, width),
        "recurrent_kernel": (hidden_size, width),
        "input_bias": (width,),
        "recurrent_bias": (width,),
    }
    bound = hidden_size**-0.5
    return {
        name: jax.random.uniform(part, shape, jnp.float32, -bound, bound)
        for part, (name, shape) in zip(jax.random.split(key, 4), shapes.items(), strict=True)
    }


def _init_layer_norm_lstm(key: Key, input_size: int, hidden_size: int) -> Params:
    gates, units = jnp.zeros(4 * hidden_size), jnp.zeros(hidden_size)
    return {
        **_init(key, input_size, hidden_size, num_gates=4),
        "input_scale": gates + 1.0,
        "recurrent_scale": gates + 1.0,
        "gate_bias": gates,
        "cell_scale": units + 1.0,
        "cell_bias": units,
    }


def _init_min_gru(key: Key, input_size: int, hidden_size: int) -> Params:
    params = _init(key, input_size, hidden_size, num_gates=2)
    return {name: params[name] for name in ("input_kernel", "input_bias")}


def _zero_carry(like: Array, hidden_size: int, *, carry_type: Any) -> Any:
    def zeros() -> jax.Array:
        # Made of the data, they share its sharding, which a scan on an explicit mesh insists on.
        column = jnp.zeros_like(like[(slice(None), *(0,) * (like.ndim - 1))], jnp.float32)
        return jnp.broadcast_to(column[:, None], (like.shape[0], hidden_size))

    return carry_type(*(zeros() for _ in carry_type._fields))  # apart, so that both can be donated


def _make_cell(
    num_gates: int,
    adds: bool,
    carry_type: Any,
    combine: Callable[..., Any],
    *,
    init: Callable[[Key, int, int], Params] | None = None,
    coefficients: Callable[[Array], tuple[jax.Array, jax.Array]] | None = None,
) -> Cell:
    def step(
        params: Params, carry: Any, inputs: Array, *, dtype: str = "float32"
    ) -> tuple[Any, jax.Array]:
        projected = project(params, inputs, dtype=dtype)
        return combine(gains(params), carry, projected, recur(params, carry, dtype=dtype))

    return Cell(
        num_gates=num_gates,
        adds=adds,
        init=init or partial(_init, num_gates=num_gates),
        zero_carry=partial(_zero_carry, carry_type=carry_type),
        project=project,
        recur=recur,
        combine=combine,
        step=step,
        coefficients=coefficients,
    )


RNN = _make_cell(1, True, RNNCarry, rnn_combine)
LSTM = _make_cell(4, True, LSTMCarry, lstm_combine)
GRU = _make_cell(3, False, GRUCarry, gru_combine)
LAYER_NORM_LSTM = _make_cell(
    4, False, LSTMCarry, layer_norm_lstm_combine, init=_init_layer_norm_lstm
)
MIN_GRU = _make_cell(
    2, True, MinGRUCarry, min_gru_combine, init=_init_min_gru, coefficients=min_gru_coefficients
)
CELLS = {
    "rnn": RNN,
    "lstm": LSTM,
    "gru": GRU,
    "layer_norm_lstm": LAYER_NORM_LSTM,
    "min_gru": MIN_GRU,
}
