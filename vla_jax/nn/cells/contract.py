"""The contract of a recurrent cell, and the functions that are the same for every cell.

One step of a cell is two matrix products and the gate equations:

    p = x · W + b         `project`: needs no carry, so it is computed for all steps before the scan
    q = h · R + b         `recur`: absent in cells without a recurrent kernel
    carry, output = combine(extra_params, carry, p, q)

A `Cell` holds what differs between cells. Its params are `input_kernel` `[D, G·H]` and `input_bias`
`[G·H]`; with a recurrent product also `recurrent_kernel` `[H, G·H]` and `recurrent_bias` `[G·H]`;
and any number of extra params, which only `combine` reads. The layout is that of PyTorch and cuDNN
with the kernels transposed. The two biases are kept separate, because with Adam their sum moves
twice as far per update as a single bias would.

Carries and gates are float32; `dtype` applies to the factors of the matrix products only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.layers import dense
from vla_jax.types import Array, Key, Params

PRODUCT_PARAMS = ("input_kernel", "recurrent_kernel", "input_bias", "recurrent_bias")


class Cell(NamedTuple):
    """Member of the family `cells.CELLS`."""

    num_gates: int  # G; 0 if the product with the inputs is not a number of gates of H units each
    init: Callable[[Key, int, int], Params]  # (key, input_size, hidden_size) -> params
    # (like [B, ...], hidden_size) -> carry before the first step: a NamedTuple of float32 arrays
    # [B, ...], such as [B, H] or [B, M, E, E]; a cell with a recurrent kernel has a field `hidden`
    # [B, H], which it multiplies.
    zero_carry: Callable[[Array, int], Any]
    # (extra_params, carry, projected [..., G·H], recurrent [..., G·H]) -> (carry, outputs [..., H])
    combine: Callable[[Params, Any, Any, Any], tuple[Any, jax.Array]]
    # True if `combine` depends on the sum projected + recurrent alone: `bptt` then stores one array
    # per step for the backward pass instead of two.
    sums_gates: bool = False
    # (extra_params, projected) -> (a, b) with hₜ = aₜ hₜ₋₁ + bₜ, if the cell is linear in its
    # carry, whose only field is `hidden`
    coefficients: Callable[[Params, Any], tuple[jax.Array, jax.Array]] | None = None
    # (extra_params, carry, projected [B, C, ...], chunks.Chunk, *, dtype) -> (carry, outputs
    # [B, C, H]): C steps at once, for `chunkwise`; outputs of masked steps are undefined
    chunk: Callable[..., tuple[Any, jax.Array]] | None = None
    # (num_heads M, conv_size S) -> the cell with these sizes; None if it has neither
    configure: Callable[[int, int], "Cell"] | None = None
    has_vector_carry: bool = True  # False if a field of the carry is not [B, H]
    # (key, params, span) -> params whose units have time constants between 2 and `span` steps, see
    # `time_constants`; None if no gate sets a time constant
    spread: Callable[[Key, Params, int], Params] | None = None


def project(params: Params, inputs: Array, *, dtype: str = "float32") -> jax.Array:
    """Returns the product with the inputs, the part of a step that does not need the carry.

        p = x · W + b

    Args:
      params: of any cell.
      inputs: `[..., D]`, usually all steps of a sequence at once.
      dtype: of the factors of the product.

    Returns:
      `[..., G·H]` float32.
    """
    return dense(inputs, params["input_kernel"], params["input_bias"], dtype=dtype)


def recur(params: Params, carry: Any, *, dtype: str = "float32") -> jax.Array | None:
    """Returns the product with the carry, or None for a cell without a recurrent kernel.

        q = h · R + b

    Args:
      params: of any cell.
      carry: of the same cell; its field `hidden` is h `[..., H]`.
      dtype: of the factors of the product.

    Returns:
      `[..., G·H]` float32.
    """
    if "recurrent_kernel" not in params:
        return None
    kernel, bias = params["recurrent_kernel"], params["recurrent_bias"]
    return dense(carry.hidden, kernel, bias, dtype=dtype)


def extra_params(params: Params) -> Params:
    """Returns the params of a cell that are in neither of the two products."""
    return {name: leaf for name, leaf in params.items() if name not in PRODUCT_PARAMS}


def step(
    cell: Cell, params: Params, carry: Any, inputs: Array, *, dtype: str = "float32"
) -> tuple[Any, jax.Array]:
    """Returns the next carry and the output of one step.

    `partial(step, cell, params)` is the body of a `jax.lax.scan`.

    Args:
      cell: member of `cells.CELLS`.
      params: from its `init`.
      carry: leaves `[..., H]`.
      inputs: `[..., D]`.
      dtype: of the factors of the products.

    Returns:
      The carry, and the output `[..., H]`, float32.
    """
    projected = project(params, inputs, dtype=dtype)
    return cell.combine(extra_params(params), carry, projected, recur(params, carry, dtype=dtype))


def combine_linear(
    extra_params: Params,
    carry: Any,
    projected: Array,
    recurrent: Array | None,
    *,
    coefficients: Callable[[Params, Any], tuple[jax.Array, jax.Array]],
) -> tuple[Any, jax.Array]:
    """Returns the next carry and output of a cell that is linear in its carry.

        hₜ = aₜ hₜ₋₁ + bₜ

    `partial(combine_linear, coefficients=coefficients)` is the `combine` of such a cell.

    Args:
      extra_params: of the cell.
      carry: with `hidden` `[..., H]` as its only field.
      projected: `[..., G·H]`.
      recurrent: ignored; such a cell has no recurrent product.
      coefficients: of the cell, see `Cell`.
    """
    del recurrent
    decay, added = coefficients(extra_params, projected)
    hidden = decay * carry.hidden + added
    return type(carry)(hidden), hidden


def init_uniform(key: Key, input_size: int, hidden_size: int, *, num_gates: int) -> Params:
    """Returns the four product params drawn from U(−1/√H, 1/√H), biases included.

    Args:
      key: consumed.
      input_size: D.
      hidden_size: H.
      num_gates: G.

    Source: the initialisation of `torch.nn.RNN`, `LSTM` and `GRU`.
    """
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


def init_projection(key: Key, input_size: int, hidden_size: int, width: int) -> Params:
    """Returns `{"input_kernel" [D, width], "input_bias" [width]}` from U(−1/√H, 1/√H).

    Args:
      key: consumed.
      input_size: D.
      hidden_size: H.
      width: features of the product.
    """
    bound = hidden_size**-0.5
    kernel_key, bias_key = jax.random.split(key)
    return {
        "input_kernel": jax.random.uniform(
            kernel_key, (input_size, width), minval=-bound, maxval=bound
        ),
        "input_bias": jax.random.uniform(bias_key, (width,), minval=-bound, maxval=bound),
    }


def zeros(like: Array, hidden_size: int, *, carry_type: Any) -> Any:
    """Returns a carry whose fields are all zeros `[B, H]`.

    Args:
      like: any array `[B, ...]` of the data; the carry is sharded like it.
      hidden_size: H.
      carry_type: NamedTuple of the cell's carry.
    """
    # One buffer per field, so that a carry can be donated.
    return carry_type(*(zero_array(like, hidden_size) for _ in carry_type._fields))


def zero_array(like: Array, *shape: int) -> jax.Array:
    """Returns zeros `[B, *shape]`, sharded like an array `[B, ...]`."""
    # Derived from the data to have its sharding, which a scan on an explicit mesh requires.
    column = jnp.zeros_like(like[(slice(None), *(0,) * (like.ndim - 1))], jnp.float32)
    column = column[(slice(None), *(None,) * len(shape))]
    return jnp.broadcast_to(column, (like.shape[0], *shape))
