"""Rematerialisation over time: saves activation memory by a second forward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.types import Array

Run = Callable[[Any, tuple[Any, ...]], tuple[Any, jax.Array]]  # (carry, steps) -> carry, outputs


def run_in_chunks(
    run: Run, chunk_size: int, carry: Any, steps: tuple[Any, ...], *, reverse: bool = False
) -> tuple[Any, jax.Array]:
    """Same result as `run(carry, steps)`, but stores only the carries between chunks.

    Each chunk is run again in the backward pass. The last chunk is padded with masked steps.

    Args:
      run: runs some steps in sequence; a masked step keeps the carry.
      chunk_size: steps per chunk.
      carry: before the first step.
      steps: inputs `[T, B, D]`, mask `[T, B]` or None, and further arrays `[T, ...]`.
      reverse: run from the last chunk to the first.

    Returns:
      The carry after the last step, and outputs `[T, ...]`.
    """
    inputs, mask, *others = steps
    num_steps = inputs.shape[0]
    chunk_size = min(chunk_size, max(num_steps, 1))  # no padding of a single chunk
    mask = jnp.ones(inputs.shape[:2], bool) if mask is None else mask
    chunks = jax.tree.map(partial(_split, chunk_size=chunk_size), (inputs, mask, *others))
    run_chunk = jax.checkpoint(run, prevent_cse=False)
    carry, outputs = jax.lax.scan(run_chunk, carry, chunks, reverse=reverse)
    return carry, outputs.reshape(-1, *outputs.shape[2:])[:num_steps]


def _split(steps: Array, *, chunk_size: int) -> jax.Array:
    """Returns `[T, ...]` as `[ceil(T / chunk_size), chunk_size, ...]`, padded with zeros."""
    missing = -steps.shape[0] % chunk_size
    padded = jnp.pad(steps, [(0, missing)] + [(0, 0)] * (steps.ndim - 1))
    return padded.reshape(-1, chunk_size, *steps.shape[1:])
