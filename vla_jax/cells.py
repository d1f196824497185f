"""Recurrent cells as pure functions: RNN, LSTM, GRU, LSTM with layer normalisation, minGRU.

A cell is one step, `step(params, carry, inputs) -> (carry, outputs)`: bind `params` and it is the
body of `jax.lax.scan`. It comes in three parts: two products, of which that with the inputs does
not wait for the carry and can be taken for all steps at once before the scan, and the gates:

    p, q = project(params, inputs), recur(params, carry)
    step(params, carry, inputs) = combine(gains(params), carry, p, q)

All kernels are in the products, none in `combine`; `bptt` builds its backward pass on that. The
`gains` are vectors at most, such as the scales of a normalisation; most cells have none.

Every cell has the same four params, in PyTorch's and cuDNN's layout transposed: `input_kernel`
`[D, G·H]`, `recurrent_kernel` `[H, G·H]`, `input_bias` and `recurrent_bias` `[G·H]`. Gates lie on
the last axis: LSTM `i f g o`; GRU `r z n`, with the reset after the recurrent product. The two
biases of a gate are kept apart as they are there: Adam moves them twice as fast as one would.
A minGRU, gates `z n`, has no recurrent product; it is linear in its carry (see `associative`).

Carries and gates are float32; `dtype` is that of the factors of the products alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.types import Array, Key, Params

PRODUCTS = ("input_kernel", "recurrent_kernel", "input_bias", "recurrent_bias")
EPSILON = 1e-5  # added to a variance before its root
CellName = Literal["rnn", "lstm", "gru", "layer_norm_lstm", "min_gru"]  # keys of `CELLS`


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


class Cell(NamedTuple):
    """A family member: what `recurrence` needs to know of a cell."""

    num_gates: int  # G
    init: Callable[[Key, int, int], Params]  # (key, input_size, hidden_size) -> params
    zero_carry: Callable[[Array, int], Any]  # (like [B, ...], hidden_size) -> carry [B, H]
    project: Callable[..., jax.Array]  # (params, inputs [..., D], *, dtype) -> [..., G·H]
    recur: Callable[..., jax.Array | None]  # (params, carry, *, dtype) -> [..., G·H]; None: none
    combine: Callable[..., tuple[Any, jax.Array]]  # (gains, carry, projected, recurrent)
    step: Callable[..., tuple[Any, jax.Array]]  # (params, carry, inputs [..., D], *, dtype)
    # projected -> (a, b) with hₜ = aₜ hₜ₋₁ + bₜ, where the cell is linear in its carry
    coefficients: Callable[[Array], tuple[jax.Array, jax.Array]] | None = None


def affine(inputs: Array, kernel: Array, bias: Array, *, dtype: str = "float32") -> jax.Array:
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
    product = jnp.matmul(
        jnp.asarray(inputs, dtype), jnp.asarray(kernel, dtype), preferred_element_type=jnp.float32
    )
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
    gains: Params, carry: MinGRUCarry, projected: Array, recurrent: None
) -> tuple[MinGRUCarry, jax.Array]:
    """Returns the next carry and output of a minGRU, whose gates do not see the carry.

        z = σ(pₜ)       n = pₜ
        hₜ = (1 − z) hₜ₋₁ + z n

    Args:
      gains: none.
      carry: `[..., H]`.
      projected: p, `[..., 2·H]` from `project`, in the order z, n.
      recurrent: none.

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
        init=init or partial(_init, num_gates=num_gates),
        zero_carry=partial(_zero_carry, carry_type=carry_type),
        project=project,
        recur=recur,
        combine=combine,
        step=step,
        coefficients=coefficients,
    )


RNN = _make_cell(1, RNNCarry, rnn_combine)
LSTM = _make_cell(4, LSTMCarry, lstm_combine)
GRU = _make_cell(3, GRUCarry, gru_combine)
LAYER_NORM_LSTM = _make_cell(4, LSTMCarry, layer_norm_lstm_combine, init=_init_layer_norm_lstm)
MIN_GRU = _make_cell(
    2, MinGRUCarry, min_gru_combine, init=_init_min_gru, coefficients=min_gru_coefficients
)
CELLS = {
    "rnn": RNN,
    "lstm": LSTM,
    "gru": GRU,
    "layer_norm_lstm": LAYER_NORM_LSTM,
    "min_gru": MIN_GRU,
}
