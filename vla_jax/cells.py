"""Recurrent cells as pure functions: RNN, LSTM, GRU.

A cell is one step, `step(params, carry, inputs) -> (carry, outputs)`: bind `params` and it is the
body of `jax.lax.scan`. It comes in three parts: two products, of which that with the inputs does
not wait for the carry and can be taken for all steps at once before the scan, and the gates:

    p, q = project(params, inputs), recur(params, carry)
    step(params, carry, inputs) = combine(gains(params), carry, p, q)

All kernels are in the products, none in `combine`; `bptt` builds its backward pass on that. The
`gains` are vectors at most, such as the scales of a normalisation; these three cells have none.

Every cell has the same four params, in PyTorch's and cuDNN's layout transposed: `input_kernel`
`[D, G·H]`, `recurrent_kernel` `[H, G·H]`, `input_bias` and `recurrent_bias` `[G·H]`. Gates lie on
the last axis: LSTM `i f g o`; GRU `r z n`, with the reset after the recurrent product. The two
biases of a gate are kept apart as they are there: Adam moves them twice as fast as one would.

Carries and gates are float32; `dtype` is that of the factors of the products alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.types import Array, Key, Params

PRODUCTS = ("input_kernel", "recurrent_kernel", "input_bias", "recurrent_bias")


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


class Cell(NamedTuple):
    """A family member: what `recurrence` needs to know of a cell."""

    num_gates: int  # G
    adds: bool  # whether `combine` sees the sum of projected and recurrent only
    init: Callable[[Key, int, int], Params]  # (key, input_size, hidden_size) -> params
    zero_carry: Callable[[Array, int], Any]  # (like [B, ...], hidden_size) -> carry [B, H]
    project: Callable[..., jax.Array]  # (params, inputs [..., D], *, dtype) -> [..., G·H]
    recur: Callable[..., jax.Array]  # (params, carry, *, dtype) -> [..., G·H]
    combine: Callable[..., tuple[Any, jax.Array]]  # (gains, carry, projected, recurrent)
    step: Callable[..., tuple[Any, jax.Array]]  # (params, carry, inputs [..., D], *, dtype)


class Turned(NamedTuple):
    """A kernel turned over, for steps whose rows lie in columns; see `streaming.lay_out`."""

    kernel: Array  # [E, D]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel it was, `[D, E]`."""
        return self.kernel.shape[::-1]


def affine(
    inputs: Array, kernel: Array | Turned, bias: Array, *, dtype: str = "float32"
) -> jax.Array:
    """Returns `inputs · kernel + bias` in float32.

    Args:
      inputs: `[..., D]`.
      kernel: `[D, E]`.
      bias: `[E]`.
      dtype: of the two factors of the product; it is summed in float32 all the same.

    Returns:
      `[..., E]` float32.
    """
    # The cast stands here, inside the scan, so that the gradients of the steps are summed in
    # float32; outside of it they would be summed in `dtype`.
    inputs = jnp.asarray(inputs, dtype)
    if isinstance(kernel, Turned):
        turned = jnp.asarray(kernel.kernel, dtype)
        product = jnp.einsum("ed,...d->...e", turned, inputs, preferred_element_type=jnp.float32)
    else:
        kernel = jnp.asarray(kernel, dtype)
        product = jnp.matmul(inputs, kernel, preferred_element_type=jnp.float32)
    return product + jnp.broadcast_to(bias, product.shape)


def drop(key: Key | None, inputs: jax.Array, rate: float) -> jax.Array:
    """Returns the inputs with some set to zero, and the others scaled up to the same mean.

    Args:
      key: consumed; None means that none is dropped.
      inputs: any shape.
      rate: probability of being dropped, in [0, 1).

    Source: Srivastava et al. 2014, dropout, as `torch.nn.Dropout` has it.
    """
    if key is None or rate == 0.0:
        return inputs
    kept = jax.random.bernoulli(key, 1.0 - rate, inputs.shape)
    return jnp.where(kept, inputs / (1.0 - rate), 0.0)


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
    return affine(inputs, params["input_kernel"], params["input_bias"], dtype=dtype)


def recur(params: Params, carry: Any, *, dtype: str = "float32") -> jax.Array:
    """Returns the carry's share of the gates.

        q = h · R + b

    Args:
      params: of any cell.
      carry: of the same cell, `[..., H]`.
      dtype: of the factors of the product.

    Returns:
      `[..., G·H]` float32.
    """
    kernel, bias = params["recurrent_kernel"], params["recurrent_bias"]
    return affine(carry.hidden, kernel, bias, dtype=dtype)


def gains(params: Params) -> Params:
    """Returns those params of a cell that are in neither of the two products."""
    return {name: leaf for name, leaf in params.items() if name not in PRODUCTS}


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


def _zero_carry(like: Array, hidden_size: int, *, carry_type: Any) -> Any:
    def zeros() -> jax.Array:
        # Made of the data, they share its sharding, which a scan on an explicit mesh insists on.
        column = jnp.zeros_like(like[(slice(None), *(0,) * (like.ndim - 1))], jnp.float32)
        return jnp.broadcast_to(column[:, None], (like.shape[0], hidden_size))

    return carry_type(*(zeros() for _ in carry_type._fields))  # apart, so that both can be donated


def _make_cell(num_gates: int, adds: bool, carry_type: Any, combine: Callable[..., Any]) -> Cell:
    def step(
        params: Params, carry: Any, inputs: Array, *, dtype: str = "float32"
    ) -> tuple[Any, jax.Array]:
        projected = project(params, inputs, dtype=dtype)
        return combine(gains(params), carry, projected, recur(params, carry, dtype=dtype))

    return Cell(
        num_gates=num_gates,
        adds=adds,
        init=partial(_init, num_gates=num_gates),
        zero_carry=partial(_zero_carry, carry_type=carry_type),
        project=project,
        recur=recur,
        combine=combine,
        step=step,
    )


RNN = _make_cell(1, True, RNNCarry, rnn_combine)
LSTM = _make_cell(4, True, LSTMCarry, lstm_combine)
GRU = _make_cell(3, False, GRUCarry, gru_combine)
CELLS = {"rnn": RNN, "lstm": LSTM, "gru": GRU}
