"""Truncated back-propagation through time: long episodes in chunks, the carry handed on.

    chunks = truncated.chunks(steps, 50, burn_in=10)     # each [B, 10 + 50, ...]
    for every chunk, with an update of the params after each:
        carry, outputs = truncated.apply(model, params, carry, chunk, burn_in=10)

The loss of a chunk reaches back to its first step and no further: what came before is remembered,
in the carry, but nothing before learns to write better into it. A carry is as old as the params
that made it. Burn-in mends it: the last steps before a chunk are run again with the params of
today, without gradient and without outputs.

Every step is counted in just one chunk. A `reset` among the steps starts an episode anywhere.

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
    """Returns the steps of episodes cut into C chunks, in the order of time.

    Each begins with the `burn_in` steps before it. What is missing before the first step and
    after the last is zeros and False, so let a mask be among the steps.

    Args:
      steps: tree with leaves `[B, T, ...]`, such as inputs, mask, reset and targets.
      chunk_size: S, steps that a chunk counts.
      burn_in: steps before them, fewer than S.

    Returns:
      The tree with leaves `[C, B, burn_in + S, ...]`, for `jax.lax.scan` or a loop.

    Raises:
      ValueError: a chunk has no steps, or not more than its burn-in.
    """
    if chunk_size < 1 or not 0 <= burn_in < chunk_size:
        raise ValueError(
            f"burn_in must be at least 0 and below the chunk's size, got burn_in {burn_in} and "
            f"chunk size {chunk_size}; choose longer chunks."
        )
    return jax.tree.map(partial(_cut, chunk_size=chunk_size, burn_in=burn_in), steps)


def apply(
    model: Model, params: Params, carry: Any, chunk: Any, *, burn_in: int = 0
) -> tuple[Any, Any]:
    """Returns the carry for the next chunk, and the outputs of the steps that this one counts.

    No gradient passes through either carry, nor through the burn-in.

    Args:
      model: what is run.
      params: of the model.
      carry: before the chunk's first step, that of its burn-in; from the chunk before.
      chunk: one of `chunks`, leaves `[B, burn_in + S, ...]`.
      burn_in: as `chunks` was given it.

    Returns:
      The carry before the next chunk's burn-in, and outputs `[B, S, ...]`.
    """
    carry = jax.lax.stop_gradient(carry)
    if not burn_in:
        carry, outputs = model(params, carry, chunk)
        return jax.lax.stop_gradient(carry), outputs
    # The next chunk begins before this one ends, by the burn-in.
    num_steps = jax.tree.leaves(chunk)[0].shape[1]
    before, own, shared = (
        jax.tree.map(lambda leaf, part=part: leaf[:, part], chunk)
        for part in (
            slice(burn_in),
            slice(burn_in, num_steps - burn_in),
            slice(num_steps - burn_in, None),
        )
    )
    carry, _ = jax.lax.stop_gradient(model(params, carry, before))
    handed_on, first = model(params, carry, own)
    _, last = model(params, handed_on, shared)
    outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), first, last)
    return jax.lax.stop_gradient(handed_on), outputs


def _cut(steps: Array, *, chunk_size: int, burn_in: int) -> jax.Array:
    batch_size, num_steps, *rest = steps.shape
    missing = -num_steps % chunk_size
    filled = jnp.pad(steps, [(0, 0), (0, missing)] + [(0, 0)] * len(rest))
    own = jnp.moveaxis(filled.reshape(batch_size, -1, chunk_size, *rest), 1, 0)
    if not burn_in:
        return own
    ends = own[:, :, chunk_size - burn_in :]
    before = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    return jnp.concatenate([before, own], axis=2)
