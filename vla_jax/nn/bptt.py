"""A cell over time with a hand-written backward pass: back-propagation through time.

The backward pass that JAX derives for a scan accumulates the gradient of the recurrent kernel step
by step: one `[H, G·H]` product and one sum of that size per step. Here the backward scan computes
only the deltas δₜ = ∂loss/∂qₜ of the recurrent products qₜ = hₜ₋₁ · R + b, and one product over
all steps follows:

    ∂loss/∂hₜ₋₁ = δₜ · Rᵀ + (gradient through the gates)
    ∂loss/∂R = Σₜ hₜ₋₁ᵀ · δₜ        ∂loss/∂b = Σₜ δₜ

The gradient through the gates is `jax.vjp` of the cell's `combine`, which contains neither of the
two products, so one backward pass serves every cell.

Source: Appleyard et al. 2016, "Optimizing Performance of Recurrent Neural Networks on GPUs"
(arXiv:1604.01946), for the grouping of the weight gradients.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from vla_jax.nn import matmul
from vla_jax.nn.cells import Cell, extra_params
from vla_jax.nn.layers import dense
from vla_jax.types import Array, Params


class Scan(Protocol):
    """Runs a cell over time: `scan` and `plain_scan` here, `associative.scan`, `chunkwise.scan`."""

    def __call__(
        self,
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
        """Returns the carry after the last step and the outputs of all steps.

            hₜ = cell(0 if resetₜ else hₜ₋₁, pₜ)  where maskₜ;   hₜ = hₜ₋₁, outputₜ = 0 elsewhere

        Args:
          cell: member of `cells.CELLS`.
          params: from its `init`.
          carry: before the first step, leaves `[B, ...]`.
          projected: p `[T, B, ...]`, from `cells.project`; masked steps may be NaN.
          mask: `[T, B]`, True where the step is real; None means everywhere.
          reset: `[T, B]`, True where a new episode starts; None means nowhere.
          reverse: run from the last step to the first.
          dtype: of the factors of the products, in the backward pass too.

        Returns:
          The carry, and outputs `[T, B, H]`, float32, zeros at masked steps.
        """
        ...


class _Static(NamedTuple):
    """Static arguments."""

    cell: Cell
    reverse: bool
    dtype: str


class _Weights(NamedTuple):
    """Params that a step inside the scan uses."""

    kernel: Any  # [H, G·H]; None without a recurrent product
    bias: Any  # [G·H]; None without a recurrent product
    extra: Params


class _Saved(NamedTuple):
    """Values of every step that the backward pass needs."""

    carry: Any  # leaves [T, B, ...], before the step, after its reset
    gates: Any  # (projected + recurrent,) or (projected, recurrent), each [T, B, G·H]


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
    """Runs a cell over time with the hand-written backward pass; see `Scan`.

    Supports second derivatives by reverse mode (`jax.grad` of `jax.grad`). Forward mode (`jax.jvp`,
    `jax.hessian`) needs `plain_scan`: JAX does not support it for custom backward passes.
    """
    projected = keep_real(projected, mask)
    if "recurrent_kernel" not in params:  # no kernel gradient to group
        return plain_scan(
            cell, params, carry, projected, mask=mask, reset=reset, reverse=reverse, dtype=dtype
        )
    # Inside shard_map the weights are replicated and the data are not; `_scan_backward` returns the
    # contribution of one device to the weight gradient. Adding a zero that depends on the data
    # makes JAX sum the contributions; outside shard_map it is compiled away.
    zero = jnp.zeros_like(jnp.sum(projected))
    weights = jax.tree.map(lambda leaf: leaf + zero, _weights(params))
    return _scan(_Static(cell, reverse, dtype), weights, carry, projected, mask, reset)


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
    """Runs a cell over time with the backward pass that JAX derives; see `Scan`."""
    static = _Static(cell, reverse, dtype)
    return _run(static, _weights(params), carry, keep_real(projected, mask), mask, reset)[0]


def keep_real(steps: Array, mask: Array | None) -> Any:
    """Returns the steps with zeros where `mask` is False.

    The selection comes before the arithmetic, whose gradient would be NaN at a masked NaN: the
    gradient of a product with a zero cotangent is 0 · NaN.

    Args:
      steps: `[..., D]`, or with more axes after those of `mask`.
      mask: `[...]`; None means True everywhere.
    """
    return steps if mask is None else jnp.where(expand(mask, steps), steps, 0)


def steps_within(lengths: Array, num_steps: int) -> jax.Array:
    """Returns the mask `[B, T]` of rows that are padded on the right.

    Args:
      lengths: `[B]`, real steps of each row.
      num_steps: T.
    """
    return jnp.arange(num_steps)[None] < jnp.asarray(lengths)[:, None]


def clear(carry: Any, reset: Array | None) -> Any:
    """Returns the carry with zeros where `reset` is True.

    Args:
      carry: leaves `[..., H]`, or with more axes after those of `reset`.
      reset: `[...]`; None means nowhere.
    """
    if reset is None:
        return carry
    return jax.tree.map(lambda leaf: jnp.where(expand(reset, leaf), 0.0, leaf), carry)


def expand(flags: Array, leaf: Array) -> Array:
    """Returns the flags with trailing axes of size 1, to broadcast with the leaf."""
    return flags[(..., *(None,) * (leaf.ndim - flags.ndim))]


def _weights(params: Params) -> _Weights:
    kernel, bias = params.get("recurrent_kernel"), params.get("recurrent_bias")
    return _Weights(kernel, bias, extra_params(params))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    static: _Static,
    weights: _Weights,
    carry: Any,
    projected: Array,
    mask: Array | None,
    reset: Array | None,
) -> tuple[Any, jax.Array]:
    return _run(static, weights, carry, projected, mask, reset)[0]


def _run(
    static: _Static,
    weights: _Weights,
    carry: Any,
    projected: Array,
    mask: Array | None,
    reset: Array | None,
) -> tuple[tuple[Any, jax.Array], _Saved]:
    """Returns `(carry, outputs)`, and the values that the backward pass needs."""

    def body(carry: Any, step: Any) -> tuple[Any, Any]:
        projected, mask, reset = step
        carry = clear(carry, reset)
        gates = (projected,)
        if weights.kernel is not None:
            recurrent = dense(carry.hidden, weights.kernel, weights.bias, dtype=static.dtype)
            summed = static.cell.sums_gates
            gates = (projected + recurrent,) if summed else (projected, recurrent)
        next_carry, outputs = _combine(static, mask, weights.extra, carry, gates)
        return next_carry, (outputs, carry, gates)

    steps = (projected, mask, reset)
    carry, (outputs, *saved) = jax.lax.scan(body, carry, steps, reverse=static.reverse)
    return (carry, outputs), _Saved(*saved)


def _scan_forward(
    static: _Static,
    weights: _Weights,
    carry: Any,
    projected: Array,
    mask: Array | None,
    reset: Array | None,
) -> tuple[tuple[Any, jax.Array], Any]:
    result, saved = _run(static, weights, carry, projected, mask, reset)
    return result, (weights, saved, mask, reset)


def _scan_backward(
    static: _Static, residuals: Any, cotangents: tuple[Any, jax.Array]
) -> tuple[_Weights, Any, jax.Array, None, None]:
    """Returns the gradients with respect to weights, carry and projected."""
    weights, saved, mask, reset = residuals
    transposed = matmul.transpose(weights.kernel)

    def body(gradients: Any, step: Any) -> tuple[Any, Any]:
        d_carry, d_extra = gradients
        carry, gates, mask, reset, d_outputs = step
        _, pull_back = jax.vjp(partial(_combine, static, mask), weights.extra, carry, gates)
        d_extra_step, d_before, d_gates = pull_back((d_carry, d_outputs))
        product = matmul.product(d_gates[-1], transposed, dtype=static.dtype)
        d_before = clear(d_before._replace(hidden=d_before.hidden + product), reset)
        return (d_before, jax.tree.map(jnp.add, d_extra, d_extra_step)), d_gates

    d_carry, d_outputs = cotangents
    zeros = jax.tree.map(jnp.zeros_like, weights.extra)
    steps = (*saved, mask, reset, d_outputs)
    (d_carry, d_extra), d_gates = jax.lax.scan(
        body, (d_carry, zeros), steps, reverse=not static.reverse
    )
    deltas = d_gates[-1]
    hidden, factors = (jnp.asarray(each, static.dtype) for each in (saved.carry.hidden, deltas))
    d_kernel = jnp.einsum("tbh,tbg->hg", hidden, factors, preferred_element_type=jnp.float32)
    d_weights = _Weights(d_kernel, jnp.sum(deltas, axis=(0, 1)), d_extra)
    return d_weights, d_carry, d_gates[0], None, None


_scan.defvjp(_scan_forward, _scan_backward)


def _combine(
    static: _Static, mask: Array | None, extra: Params, carry: Any, gates: tuple[Array, ...]
) -> tuple[Any, jax.Array]:
    """Returns the next carry and output; masked rows keep their carry and give zeros."""
    projected, recurrent = (*gates, 0.0)[:2]
    next_carry, outputs = static.cell.combine(extra, carry, projected, recurrent)
    if mask is None:
        return next_carry, outputs
    next_carry = jax.tree.map(
        lambda new, old: jnp.where(expand(mask, new), new, old), next_carry, carry
    )
    return next_carry, jnp.where(mask[:, None], outputs, 0.0)
