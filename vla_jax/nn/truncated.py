"""Truncated back-propagation through time: long episodes in chunks that pass on their carry.

    chunks = truncated.chunks(steps, 50, burn_in=10)     # each [B, 10 + 50, ...]
    for every chunk, with an update of the params after each:
        carry, outputs = truncated.apply(model, params, carry, chunk, burn_in=10)

Gradients stop at the first step of a chunk; earlier steps influence it through the carry only. The
carry was computed with the params of an earlier update. Burn-in corrects this: the last steps
before a chunk are run again with the current params, without gradient and without outputs.

The outputs of every step are in exactly one chunk. A `reset` may start an episode at any step.

Source: Williams & Peng 1990, "An Efficient Gradient-Based Algorithm for On-Line Training of
Recurrent Network Trajectories"; burn-in: Kapturowski et al. 2019, R2D2.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.types import Array, Params

# (params, carry, steps [B, t, ...]) -> (carry, outputs [B, t, ...]), such as
#   lambda params, carry, steps: recurrence.apply(params, config, **steps, carry=carry)
Model = Callable[[Params, Any, Any], tuple[Any, Any]]


def chunks(steps: Any, chunk_size: int, *, burn_in: int = 0) -> Any:
    """Returns the steps of episodes split into chunks, in temporal order.

    Each chunk starts with the `burn_in` steps before it. Before the first and after the last step
    it is padded with zeros (False), so the steps should contain a mask.

    Args:
      steps: tree with leaves `[B, T, ...]`, such as inputs, mask, reset and targets.
      chunk_size: steps per chunk, without burn-in.
      burn_in: steps of burn-in before each chunk, fewer than `chunk_size`.

    Returns:
      The tree with leaves `[num_chunks, B, burn_in + chunk_size, ...]`, for a scan or a loop.

    Raises:
      ValueError: `chunk_size` is below 1, or not above `burn_in`.
    """
    if chunk_size < 1 or not 0 <= burn_in < chunk_size:
        raise ValueError(
            f"burn_in must be at least 0 and below chunk_size, got burn_in {burn_in} and "
            f"chunk_size {chunk_size}; choose longer chunks."
        )
    return jax.tree.map(partial(_split, chunk_size=chunk_size, burn_in=burn_in), steps)


def apply(
    model: Model, params: Params, carry: Any, chunk: Any, *, burn_in: int = 0
) -> tuple[Any, Any]:
    """Returns the carry for the next chunk, and the outputs of this one without its burn-in.

    No gradient passes through the two carries or the burn-in.

    Args:
      model: runs params and a carry over steps.
      params: of the model.
      carry: before the first step of the chunk (of its burn-in), from the previous chunk.
      chunk: one of `chunks`, leaves `[B, burn_in + chunk_size, ...]`.
      burn_in: as given to `chunks`.

    Returns:
      The carry before the next chunk's burn-in, and outputs `[B, chunk_size, ...]`.
    """
    carry = jax.lax.stop_gradient(carry)
    if not burn_in:
        carry, outputs = model(params, carry, chunk)
        return jax.lax.stop_gradient(carry), outputs
    # The last `burn_in` steps of this chunk are the burn-in of the next one.
    num_steps = jax.tree.leaves(chunk)[0].shape[1]
    before, middle, shared = (
        jax.tree.map(lambda leaf, part=part: leaf[:, part], chunk)
        for part in (
            slice(burn_in),
            slice(burn_in, num_steps - burn_in),
            slice(num_steps - burn_in, None),
        )
    )
    carry, _ = jax.lax.stop_gradient(model(params, carry, before))
    next_carry, first = model(params, carry, middle)
    _, last = model(params, next_carry, shared)
    outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), first, last)
    return jax.lax.stop_gradient(next_carry), outputs


def _split(steps: Array, *, chunk_size: int, burn_in: int) -> jax.Array:
    batch_size, num_steps, *rest = steps.shape
    missing = -num_steps % chunk_size
    padded = jnp.pad(steps, [(0, 0), (0, missing)] + [(0, 0)] * len(rest))
    counted = jnp.moveaxis(padded.reshape(batch_size, -1, chunk_size, *rest), 1, 0)
    if not burn_in:
        return counted
    ends = counted[:, :, chunk_size - burn_in :]
    before = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    return jnp.concatenate([before, counted], axis=2)
