"""A cell over time, and its backward pass written by hand: back-propagation through time.

What JAX derives from a scan adds the gradient of the recurrent kernel up step by step, one
`[H, G·H]` product and one sum of that size each. Here the backward scan gives only the deltas
δₜ = ∂loss/∂qₜ of the recurrent products qₜ = hₜ₋₁ · R + b; one product over all steps follows:

    ∂loss/∂hₜ₋₁ = δₜ · Rᵀ + (the gates' share)      ∂loss/∂R = Σₜ hₜ₋₁ᵀ · δₜ      ∂loss/∂b = Σₜ δₜ

The gates' share comes from `jax.vjp` of the cell's `combine`, which holds no kernel, so that one
backward pass serves every cell.

Source: Appleyard et al. 2016, "Optimizing Performance of Recurrent Neural Networks on GPUs"
(arXiv:1604.01946), whose grouping of the weight gradients this is.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn import matmul
from vla_jax.nn.cells import Cell, gains
from vla_jax.nn.layers import dense
from vla_jax.types import Array, Params


class _How(NamedTuple):
    """What is known before any array is."""

    cell: Cell
    reverse: bool  # whether time runs backwards
    dtype: str  # of the factors of the products


def scan(
    cell: Cell,
    params: Params,
    carry: Any,
    projected: Array,
    *,
    mask: Array | None = None,
    reset: Array | None = None,
    reverse: bool = False,
    dtype: str = "float32",
) -> tuple[Any, jax.Array]:
    """Returns what `plain_scan` does, with the hand-written backward pass.

    Its derivative may be derived again by `jax.grad`; forward mode (`jax.jvp`, `jax.hessian`) is
    for `plain_scan`, since JAX refuses it for any hand-written backward pass.

    Args:
      cell: member of `cells.CELLS`.
      params: from its `init`.
      carry: before the first step, `[B, H]`.
      projected: the inputs' share of the gates, `[T, B, G·H]`, from the cell's `project`.
      mask: `[T, B]`, True where the step is real; None means everywhere.
      reset: `[T, B]`, True where a new episode starts; None means nowhere.
      reverse: whether time runs from the last step to the first.
      dtype: of the factors of the products, in the backward pass too.

    Returns:
      The carry after the last step, and outputs `[T, B, H]`, float32, zeros at masked steps.
    """
    if "recurrent_kernel" not in params:  # no product to take out of the scan: JAX's own is best
        return plain_scan(
            cell, params, carry, projected, mask=mask, reset=reset, reverse=reverse, dtype=dtype
        )
    # Inside shard_map the weights are the same on all devices and the data are not; the rule below
    # gives each device's share of their gradient. This zero, made of the data, tells JAX so, and
    # it adds the shares up. Elsewhere it is compiled away.
    zero = jnp.zeros_like(jnp.sum(projected))
    weights = jax.tree.map(lambda leaf: leaf + zero, _weights(params))
    return _scan(_How(cell, reverse, dtype), weights, carry, projected, mask, reset)


def plain_scan(
    cell: Cell,
    params: Params,
    carry: Any,
    projected: Array,
    *,
    mask: Array | None = None,
    reset: Array | None = None,
    reverse: bool = False,
    dtype: str = "float32",
) -> tuple[Any, jax.Array]:
    """Returns the same with the backward pass that JAX derives; arguments as those of `scan`."""
    how = _How(cell, reverse, dtype)
    return _run(how, _weights(params), carry, projected, mask, reset)[0]


def clear(carry: Any, reset: Array | None) -> Any:
    """Returns the carry with zeros where `reset` is True.

    Args:
      carry: leaves `[..., H]`.
      reset: `[...]`; None means nowhere.
    """
    if reset is None:
        return carry
    return jax.tree.map(lambda kept: jnp.where(reset[..., None], 0.0, kept), carry)


def _weights(params: Params) -> tuple[Array | None, Array | None, Params]:
    """What the scan uses of a cell's params: kernel and bias, where it has them, and gains."""
    return params.get("recurrent_kernel"), params.get("recurrent_bias"), gains(params)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(how, weights, carry, projected, mask, reset):
    return _run(how, weights, carry, projected, mask, reset)[0]


def _run(how, weights, carry, projected, mask, reset):
    """Returns `(carry, outputs)`, and of every step the carry it started from and its gates."""
    kernel, bias, gains = weights

    def body(carry: Any, step: Any) -> tuple[Any, Any]:
        projected, mask, reset = step
        carry = clear(carry, reset)
        gates = (projected,)
        if kernel is not None:
            recurrent = dense(carry.hidden, kernel, bias, dtype=how.dtype)
            gates = (projected + recurrent,) if how.cell.adds else (projected, recurrent)
        following, outputs = _combine(how, mask, gains, carry, gates)
        return following, (outputs, carry, gates)

    steps = (projected, mask, reset)
    carry, (outputs, *kept) = jax.lax.scan(body, carry, steps, reverse=how.reverse)
    return (carry, outputs), kept


def _scan_forward(how, weights, carry, projected, mask, reset):
    result, kept = _run(how, weights, carry, projected, mask, reset)
    return result, (weights, *kept, mask, reset)


def _scan_backward(how, saved, cotangents):
    (kernel, _, gains), started, gates, mask, reset = saved
    turned = matmul.transpose(kernel)

    def body(by_later: Any, step: Any) -> tuple[Any, Any]:
        by_carry, by_gains = by_later
        started, gates, mask, reset, by_outputs = step
        _, pull = jax.vjp(partial(_combine, how, mask), gains, started, gates)
        more, by_started, by_gates = pull((by_carry, by_outputs))
        by_hidden = by_started.hidden + matmul.times(by_gates[-1], turned, dtype=how.dtype)
        by_carry = clear(by_started._replace(hidden=by_hidden), reset)
        return (by_carry, jax.tree.map(jnp.add, by_gains, more)), by_gates

    by_carry, by_outputs = cotangents
    nothing = jax.tree.map(jnp.zeros_like, gains)
    steps = (started, gates, mask, reset, by_outputs)
    (by_carry, by_gains), by_gates = jax.lax.scan(
        body, (by_carry, nothing), steps, reverse=not how.reverse
    )
    deltas = by_gates[-1]
    hidden, factors = (jnp.asarray(factor, how.dtype) for factor in (started.hidden, deltas))
    by_kernel = jnp.einsum("tbh,tbg->hg", hidden, factors, preferred_element_type=jnp.float32)
    by_weights = by_kernel, jnp.sum(deltas, axis=(0, 1)), by_gains
    return by_weights, by_carry, by_gates[0], None, None


_scan.defvjp(_scan_forward, _scan_backward)


def _combine(how: _How, mask: Array | None, gains: Params, carry: Any, gates: tuple) -> Any:
    """The next carry and output where `mask` is True; elsewhere the carry stays, with zeros."""
    projected, recurrent = (*gates, 0.0)[:2]
    following, outputs = how.cell.combine(gains, carry, projected, recurrent)
    if mask is None:
        return following, outputs
    real = mask[:, None]
    following = jax.tree.map(partial(jnp.where, real), following, carry)
    return following, jnp.where(real, outputs, 0.0)
