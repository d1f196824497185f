"""A linear cell over all time steps at once, by an associative scan.

The composition of two steps of hₜ = aₜ hₜ₋₁ + bₜ has the same form,

    (a, b) then (a′, b′)  =  (a′ a, a′ b + b′),

and this operation is associative: log₂ T rounds replace a loop of T steps, with more arithmetic.
It is faster on a GPU for long sequences; on a CPU a loop is faster, as its steps are elementwise.

Source: Blelloch 1990, "Prefix Sums and Their Applications"; Martin & Cundy 2018, "Parallelizing
Linear Recurrent Neural Nets Over Sequence Length" (arXiv:1709.04057).
"""

from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.nn import bptt
from vla_jax.nn.cells import CELLS, Cell, extra_params
from vla_jax.types import Array, Params

Step = tuple[jax.Array, jax.Array]  # a, b
ResetStep = tuple[jax.Array, jax.Array, jax.Array]  # a, b, and True where an episode starts


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
    """Runs a linear cell over time; see `bptt.Scan`. `dtype` is not used.

    Raises:
      ValueError: the cell is not linear in its carry.
    """
    del dtype
    check(cell)
    decay, added = cell.coefficients(  # pyright: ignore[reportOptionalCall]
        extra_params(params), bptt.keep_real(projected, mask)
    )
    if mask is not None:  # a masked step keeps h
        decay = jnp.where(mask[..., None], decay, 1.0)
        added = jnp.where(mask[..., None], added, 0.0)
    first, last = (-1, 0) if reverse else (0, -1)
    before = bptt.clear(carry, None if reset is None else reset[first])
    added = added.at[first].add(decay[first] * before.hidden)
    if reset is None:
        hidden = jax.lax.associative_scan(_compose, (decay, added), reverse=reverse)[1]
    else:
        steps = (decay, added, jnp.asarray(reset)[..., None])
        hidden = jax.lax.associative_scan(_compose_episodes, steps, reverse=reverse)[1]
    outputs = hidden if mask is None else jnp.where(mask[..., None], hidden, 0.0)
    return type(carry)(hidden[last]), outputs


def check(cell: Cell) -> None:
    """Raises a ValueError unless the cell is linear in its carry."""
    if cell.coefficients is None:
        linear = [f"'{name}'" for name, other in CELLS.items() if other.coefficients is not None]
        raise ValueError(
            "implementation='associative' needs a cell that is linear in its carry, such as "
            f"{', '.join(linear)}, got one whose gates depend on the carry; choose 'auto'."
        )


def _compose(first: Step, second: Step) -> Step:
    """Returns the composition of two steps."""
    (decay, added), (next_decay, next_added) = first, second
    return next_decay * decay, next_decay * added + next_added


def _compose_episodes(first: ResetStep, second: ResetStep) -> ResetStep:
    """Returns the composition of two steps; nothing of the first passes a reset in the second.

    A factor 0 would not suppress a NaN or an infinity of the episode before, in values or in
    gradients.
    """
    *earlier, was_reset = first
    *later, is_reset = second
    decay, added = (jnp.where(is_reset, 0.0, leaf) for leaf in earlier)
    return (*_compose((decay, added), (later[0], later[1])), was_reset | is_reset)
