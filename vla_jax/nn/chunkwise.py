"""A cell with a matrix as its carry over time, several steps at once.

A sequence is split into chunks of C steps. A cell with a `chunk` computes the steps of a chunk with
matrix products instead of a loop, and stores T / C carries of H · H / M numbers per row for the
backward pass instead of T. The results are those of single steps up to rounding.

Source: Hua et al. 2022, "Transformer Quality in Linear Time" (arXiv:2202.10447), section 3.2, for
the form with chunks; the equations of each cell are at its `chunk`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.nn import bptt
from vla_jax.nn.cells import CELLS, Cell, extra_params
from vla_jax.nn.cells.chunks import Chunk
from vla_jax.types import Array, Params

CHUNK_SIZE = 64  # C, steps


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
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Any, jax.Array]:
    """Runs a cell over time in chunks; see `bptt.Scan`.

    A step that is not finite makes the rest of its episode NaN, as in a loop, but no step before it
    and no other episode. The gradients of such an episode are zeros.

    Raises:
      ValueError: the cell has no `chunk`.
    """
    check(cell)
    num_steps = projected.shape[0]
    # Without the barrier XLA computes at compile time, slowly, that a carry of zeros is finite.
    carry = jax.lax.optimization_barrier(carry)
    flags = jnp.zeros_like(projected[..., 0], bool)  # derived from the data to be sharded alike
    steps = (
        bptt.keep_real(projected, mask),
        ~flags if mask is None else jnp.asarray(mask),
        flags if reset is None else jnp.asarray(reset),
    )
    if reverse:
        steps = jax.tree.map(partial(jnp.flip, axis=0), steps)
    size = min(chunk_size, num_steps)
    run = partial(_run_chunk, cell, extra_params(params), dtype)
    carry, outputs = jax.lax.scan(run, carry, jax.tree.map(partial(_split, size=size), steps))
    outputs = jnp.moveaxis(outputs, 1, 2)  # [T / C, C, B, H]
    outputs = outputs.reshape(-1, *outputs.shape[2:])[:num_steps]
    return carry, jnp.flip(outputs, axis=0) if reverse else outputs


def check(cell: Cell) -> None:
    """Raises a ValueError unless the cell has a chunkwise form."""
    if cell.chunk is None:
        chunkwise = [f"'{name}'" for name, other in CELLS.items() if other.chunk is not None]
        raise ValueError(
            "implementation='chunkwise' needs a cell with a chunkwise form, such as "
            f"{', '.join(chunkwise)}, got one without; choose 'auto'."
        )


def _run_chunk(
    cell: Cell, extra: Params, dtype: str, carry: Any, steps: tuple[jax.Array, ...]
) -> tuple[Any, jax.Array]:
    """Runs the steps of one chunk, `[B, C, ...]`; returns the carry and outputs `[B, C, H]`."""
    projected, real, reset = steps
    segment = jnp.cumsum(reset, axis=1, dtype=jnp.int32)
    # In a product over all steps, 0 · NaN would spread a NaN to every step of the chunk. So steps
    # and carries that are not finite count as zeros, and what depends on them is NaN afterwards.
    broken = ~jnp.all(jnp.isfinite(projected), axis=-1)
    leaves = jax.tree.leaves(carry)
    is_broken = ~jnp.all(
        jnp.stack([jnp.all(jnp.isfinite(leaf), axis=range(1, leaf.ndim)) for leaf in leaves]),
        axis=0,
    )
    chunk = Chunk(real, segment)
    reached = jnp.any(chunk.same[:, 0] & broken[:, None], axis=-1)
    reached |= is_broken[:, None] & chunk.continues[:, 0]
    finite = bptt.keep_real(projected, ~broken)
    assert cell.chunk is not None
    carry, outputs = cell.chunk(extra, bptt.clear(carry, is_broken), finite, chunk, dtype=dtype)
    outputs = jnp.where(reached[..., None], jnp.nan, outputs)
    carry = jax.tree.map(
        lambda leaf: jnp.where(bptt.expand(reached[:, -1], leaf), jnp.nan, leaf), carry
    )
    return carry, bptt.keep_real(outputs, real)


def _split(steps: jax.Array, *, size: int) -> jax.Array:
    """Returns `[T, B, ...]` as `[T / C, B, C, ...]`, padded with masked steps."""
    padded = jnp.pad(steps, [(0, -steps.shape[0] % size)] + [(0, 0)] * (steps.ndim - 1))
    return jnp.moveaxis(padded.reshape(-1, size, *padded.shape[1:]), 1, 2)
