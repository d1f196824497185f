"""A cell over time, and its backward pass written by hand: back-propagation through time.

What JAX derives from a scan adds the gradient of the recurrent kernel up step by step, one
`[H, G·H]` product and one sum of that size each. Here the backward scan gives only the deltas
δₜ = ∂loss/∂qₜ of the recurrent products qₜ = hₜ₋₁ · R + b; one product over all steps follows:

    ∂loss/∂hₜ₋₁ = δₜ · Rᵀ + (the gates' share)      ∂loss/∂R = Σₜ hₜ₋₁ᵀ · δₜ      ∂loss/∂b = Σₜ δₜ

The gates' share comes from `jax.vjp` of the cell's `combine`, which holds no kernel, so that one
backward pass serves every cell.

Inside the scan the arrays of a step lie in "rows" `[B, H]` or in "columns" `[H, B]`: on a CPU, XLA
multiplies some shapes faster as `[G·H, H] · [H, B]` (see `faster_layout`). Either way the kernel is
turned over once, before one of the two scans: inside, that would be slow.

Source: Appleyard et al. 2016, "Optimizing Performance of Recurrent Neural Networks on GPUs"
(arXiv:1604.01946), whose grouping of the weight gradients this is.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.cells import Cell, gains
from vla_jax.types import Array, Params

Layout = Literal["rows", "columns"]


class _How(NamedTuple):
    """What is known before any array is."""

    cell: Cell
    reverse: bool  # whether time runs backwards
    dtype: str  # of the factors of the products
    layout: Layout  # of a step's arrays inside the scan

    @property
    def batch_axis(self) -> int:
        """Of a step's arrays inside the scan."""
        return 0 if self.layout == "rows" else 1


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
    layout: Layout | None = None,
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
      layout: inside the scan; None means the faster one.

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
    layout = layout or faster_layout(*jnp.shape(carry.hidden))
    how = _How(cell, reverse, dtype, layout)
    return _scan(how, weights, carry, projected, mask, reset)


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
    how = _How(cell, reverse, dtype, layout="rows")
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


def faster_layout(batch_size: int, hidden_size: int) -> Layout:
    """Returns what `python -m train.benchmark --works layout` measures to be faster.

    Args:
      batch_size: B.
      hidden_size: H.
    """
    known = isinstance(batch_size, int)  # not the symbol of an export
    whole = known and batch_size % 8 == 0 and batch_size <= 64 and hidden_size >= 1024
    return "columns" if whole and jax.default_backend() == "cpu" else "rows"


def _weights(params: Params) -> tuple[Array | None, Array | None, Params]:
    """What the scan uses of a cell's params: kernel and bias, where it has them, and gains."""
    return params.get("recurrent_kernel"), params.get("recurrent_bias"), gains(params)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(how, weights, carry, projected, mask, reset):
    return _run(how, weights, carry, projected, mask, reset)[0]


def _run(how, weights, carry, projected, mask, reset):
    """Returns `(carry, outputs)`, and of every step the carry it started from and its gates."""
    kernel, bias, gains = weights
    if kernel is not None:
        kernel = jnp.asarray(kernel, how.dtype)
        if how.layout == "columns":
            kernel, bias = kernel.T, bias[:, None]

    def body(carry: Any, step: Any) -> tuple[Any, Any]:
        projected, mask, reset = step
        carry = _clear(how, carry, reset)
        gates = (projected,)
        if kernel is not None:
            recurrent = _times(how, carry.hidden, kernel)
            recurrent += jnp.broadcast_to(bias, recurrent.shape)
            gates = (projected + recurrent,) if how.cell.adds else (projected, recurrent)
        following, outputs = _combine(how, mask, gains, carry, gates)
        return following, (outputs, carry, gates)

    steps = (_turn(how, projected), mask, reset)
    carry, (outputs, *kept) = jax.lax.scan(body, _turn(how, carry), steps, reverse=how.reverse)
    return _turn(how, (carry, outputs)), kept


def _scan_forward(how, weights, carry, projected, mask, reset):
    result, kept = _run(how, weights, carry, projected, mask, reset)
    return result, (weights, *kept, mask, reset)


def _scan_backward(how, saved, cotangents):
    (kernel, _, gains), started, gates, mask, reset = saved
    turned = jnp.asarray(kernel, how.dtype)
    if how.layout == "rows":
        turned = turned.T

    def body(by_later: Any, step: Any) -> tuple[Any, Any]:
        by_carry, by_gains = by_later
        started, gates, mask, reset, by_outputs = step
        _, pull = jax.vjp(partial(_combine, how, mask), gains, started, gates)
        more, by_started, by_gates = pull((by_carry, by_outputs))
        by_hidden = by_started.hidden + _times(how, by_gates[-1], turned)
        by_carry = _clear(how, by_started._replace(hidden=by_hidden), reset)
        return (by_carry, jax.tree.map(jnp.add, by_gains, more)), by_gates

    by_carry, by_outputs = _turn(how, cotangents)
    nothing = jax.tree.map(jnp.zeros_like, gains)
    steps = (started, gates, mask, reset, by_outputs)
    (by_carry, by_gains), by_gates = jax.lax.scan(
        body, (by_carry, nothing), steps, reverse=not how.reverse
    )
    by_carry, by_gates, hidden = _turn(how, (by_carry, by_gates, started.hidden))
    deltas = by_gates[-1]
    by_kernel = _einsum(how, "tbh,tbg->hg", hidden, deltas)
    by_weights = by_kernel, jnp.sum(deltas, axis=(0, 1)), by_gains
    return by_weights, by_carry, by_gates[0], None, None


_scan.defvjp(_scan_forward, _scan_backward)


def _turn(how: _How, arrays: Any) -> Any:
    """Takes arrays `[..., B, H]` to their layout inside the scan, or back."""
    if how.layout == "rows":
        return arrays
    return jax.tree.map(lambda array: jnp.swapaxes(array, -1, -2), arrays)


def _clear(how: _How, carry: Any, reset: Array | None) -> Any:
    if reset is None:
        return carry
    return jax.vmap(clear, (how.batch_axis, 0), how.batch_axis)(carry, reset)


def _combine(how: _How, mask: Array | None, gains: Params, carry: Any, gates: tuple) -> Any:
    """The next carry and output where `mask` is True; elsewhere the carry stays, with zeros."""

    def one(mask, carry, gates):
        projected, recurrent = (*gates, 0.0)[:2]
        following, outputs = how.cell.combine(gains, carry, projected, recurrent)
        if mask is None:
            return following, outputs
        following = jax.tree.map(partial(jnp.where, mask), following, carry)
        return following, jnp.where(mask, outputs, 0.0)

    return jax.vmap(one, (0, how.batch_axis, how.batch_axis), how.batch_axis)(mask, carry, gates)


def _times(how: _How, values: Array, kernel: Array) -> jax.Array:
    axes = "bi,io->bo" if how.layout == "rows" else "ib,oi->ob"
    return _einsum(how, axes, values, kernel)


def _einsum(how: _How, axes: str, one: Array, other: Array) -> jax.Array:
    one, other = (jnp.asarray(factor, how.dtype) for factor in (one, other))
    return jnp.einsum(axes, one, other, preferred_element_type=jnp.float32)
