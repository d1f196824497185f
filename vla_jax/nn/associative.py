"""A linear cell over time without a loop: all steps at once, by an associative scan.

Two steps of hₜ = aₜ hₜ₋₁ + bₜ one after the other are again such a step,

    (a, b) then (a′, b′)  =  (a′ a, a′ b + b′),

and it does not matter which neighbours are joined first: log₂ T rounds do what a loop does in T.
That is more arithmetic in fewer steps. A GPU gains by it on long sequences; on a CPU a loop over a
cell that has no recurrent product is faster.

Source: Blelloch 1990, "Prefix Sums and Their Applications"; Martin & Cundy 2018, "Parallelizing
Linear Recurrent Neural Nets Over Sequence Length" (arXiv:1709.04057).
"""

from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.nn.cells import Cell
from vla_jax.types import Array, Params

Step = tuple[jax.Array, jax.Array]  # a, b


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
    """Returns what `bptt.plain_scan` does, for a cell that is linear in its carry.

    Args:
      cell: member of `cells.CELLS` with `coefficients`.
      params: from its `init`; the scan itself uses none of them.
      carry: before the first step, `[B, H]`.
      projected: the inputs' share of the gates, `[T, B, G·H]`, from the cell's `project`.
      mask: `[T, B]`, True where the step is real; None means everywhere.
      reset: `[T, B]`, True where a new episode starts; None means nowhere.
      reverse: whether time runs from the last step to the first.
      dtype: of the factors of products, of which there are none here.

    Returns:
      The carry after the last step, and outputs `[T, B, H]`, float32, zeros at masked steps.

    Raises:
      ValueError: the cell is not linear in its carry.
    """
    del params, dtype
    check(cell)
    decay, added = cell.coefficients(projected)  # pyright: ignore[reportOptionalCall]
    if mask is not None:  # h stays as it is
        decay = jnp.where(mask[..., None], decay, 1.0)
        added = jnp.where(mask[..., None], added, 0.0)
    if reset is not None:
        decay = jnp.where(reset[..., None], 0.0, decay)
    first, last = (-1, 0) if reverse else (0, -1)
    added = added.at[first].add(decay[first] * carry.hidden)
    _, hidden = jax.lax.associative_scan(_join, (decay, added), reverse=reverse)
    outputs = hidden if mask is None else jnp.where(mask[..., None], hidden, 0.0)
    return type(carry)(hidden[last]), outputs


def check(cell: Cell) -> None:
    """Raises a ValueError unless the cell is linear in its carry."""
    if cell.coefficients is None:
        raise ValueError(
            "implementation='associative' needs a cell that is linear in its carry, such as "
            "'min_gru', got one with gates that see the carry; choose 'auto'."
        )


def _join(one: Step, other: Step) -> Step:
    """Two steps as one, `one` first."""
    (decay, added), (next_decay, next_added) = one, other
    return next_decay * decay, next_decay * added + next_added
