"""cuDNN's LSTM: a whole stack in one call on an NVIDIA GPU.

Computes the same as `recurrence` without resets, in float32, or in TF32 if JAX's matmul precision
allows it. The params have the layout of `cells`; they are packed at every call.

cuDNN itself skips padding on the right only. A masked step leaves the carry as it is, so the real
steps of a row may be moved to its front, in their order, and their outputs back to their places.

Source: `jax.experimental.rnn`; Appleyard et al. 2016 (arXiv:1604.01946).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from vla_jax.nn.bptt import keep_real, steps_within
from vla_jax.nn.cells import LSTMCarry
from vla_jax.nn.sharded_params import over_rows
from vla_jax.types import Array, Params


def lstm(
    cells: Sequence[Params],
    carries: Sequence[LSTMCarry],
    inputs: Array,
    *,
    mask: Array | None,
    lengths: Array | None,
    bidirectional: bool,
) -> tuple[list[LSTMCarry], jax.Array]:
    """Returns the carry of each cell after its last step, and the outputs of the last layer.

    Args:
      cells: params of each layer; with two directions the forward cell of a layer, then its
        backward cell.
      carries: of the same cells before the first step, `[B, H]`.
      inputs: `[B, T, D]`; masked steps may be NaN.
      mask: `[B, T]`, True where the step is real; None means everywhere.
      lengths: `[B]` int32, instead of the mask: the first so many steps of each row are real.
      bidirectional: True if each layer has two cells.

    Returns:
      The carries, and outputs `[B, T, H]` or `[B, T, 2·H]`, float32, zeros at masked steps.

    Raises:
      ValueError: JAX does not run on an NVIDIA GPU.
    """
    if jax.default_backend() != "gpu":
        raise ValueError(
            f"implementation 'cudnn' needs an NVIDIA GPU, got {jax.default_backend()}; choose "
            "'auto'."
        )
    batch_size, num_steps, input_size = inputs.shape
    order = None  # [B, T], the real steps of each row, then the others
    if mask is not None:
        order = jnp.argsort(~jnp.asarray(mask), axis=1, stable=True)
        lengths = jnp.sum(mask, axis=1)
    elif lengths is not None:
        mask = steps_within(lengths, num_steps)
    else:
        lengths = jnp.full(batch_size, num_steps)
    call = partial(
        rnn.lstm,
        input_size=input_size,
        hidden_size=carries[0].hidden.shape[-1],
        num_layers=len(cells) // (2 if bidirectional else 1),
        dropout=0.0,
        bidirectional=bidirectional,
    )
    # Rows are the first axis of inputs, outputs and lengths, and the second of carries.
    results: Any = over_rows(call, (0, 1, 1, None, 0), (0, 1, 1), batch_size)(
        _move(jnp.asarray(keep_real(inputs, mask), jnp.float32), order),
        jnp.stack([carry.hidden for carry in carries]),
        jnp.stack([carry.cell for carry in carries]),
        pack(cells),
        jnp.asarray(jnp.maximum(lengths, 1), jnp.int32),  # of a row without steps 1, undone below
    )
    outputs, hidden, cell = results
    has_steps = jnp.asarray(lengths > 0)[:, None]
    last = [
        LSTMCarry(*(jnp.where(has_steps, new, old) for new, old in zip(pair, carry, strict=True)))
        for *pair, carry in zip(hidden, cell, carries, strict=True)
    ]
    places = None if order is None else jnp.argsort(order, axis=1)
    return last, keep_real(_move(outputs, places), mask)


def check(fields: Mapping[str, Any]) -> None:
    """Raises a ValueError unless cuDNN can run a recurrence with these fields.

    Args:
      fields: of a `RecurrenceConfig`.
    """
    needed = {
        "cell": "lstm", "dropout": 0.0, "residual": False, "remat_chunk": 0, "dtype": "float32",
    }  # fmt: skip
    for name, value in needed.items():
        if fields[name] != value:
            raise ValueError(
                f"{name} must be {value!r} with implementation 'cudnn', got {fields[name]!r}; "
                "choose implementation 'auto'."
            )


def pack(cells: Sequence[Params]) -> jax.Array:
    """Returns all params in cuDNN's order: the kernels of all cells, then the biases of all cells.

    Args:
      cells: as for `lstm`.

    Returns:
      `[number of params]`.
    """
    names = ("input_kernel", "recurrent_kernel"), ("input_bias", "recurrent_bias")
    leaves = [cell[name] for group in names for cell in cells for name in group]
    return jnp.concatenate([jnp.ravel(jnp.transpose(leaf)) for leaf in leaves])


def _move(steps: jax.Array, order: jax.Array | None) -> jax.Array:
    """Returns the steps `[B, T, D]` in the order of their indices `[B, T]`; None leaves them."""
    return steps if order is None else jnp.take_along_axis(steps, order[..., None], axis=1)
