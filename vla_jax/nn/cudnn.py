"""NVIDIA's own LSTM: a whole stack in one call, where there is one of its GPUs.

It computes what `recurrence` does without masks and resets, in float32 or, where JAX's matmul
precision lets it, in TF32. The params stay those of `cells`; they are packed at every call.

Source: `jax.experimental.rnn`; Appleyard et al. 2016 (arXiv:1604.01946).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from vla_jax.nn.cells import LSTMCarry
from vla_jax.types import Array, Params


def lstm(
    cells: Sequence[Params], carries: Sequence[LSTMCarry], inputs: Array, *, bidirectional: bool
) -> tuple[list[LSTMCarry], jax.Array]:
    """Returns the carry of each cell after its last step, and the outputs of the last layer.

    Args:
      cells: params of each layer, in both directions each one's forward and then its backward.
      carries: before the first step, of the same cells, `[B, H]`.
      inputs: `[B, T, D]`.
      bidirectional: whether each layer has two cells.

    Returns:
      The carries, and outputs `[B, T, H]` or `[B, T, 2·H]`, float32.

    Raises:
      ValueError: JAX does not run on an NVIDIA GPU.
    """
    if jax.default_backend() != "gpu":
        raise ValueError(
            f"implementation 'cudnn' needs an NVIDIA GPU, got {jax.default_backend()}; choose "
            "'auto'."
        )
    batch_size, num_steps, input_size = inputs.shape
    results: Any = rnn.lstm(
        jnp.asarray(inputs, jnp.float32),
        jnp.stack([carry.hidden for carry in carries]),
        jnp.stack([carry.cell for carry in carries]),
        pack(cells),
        jnp.full((batch_size,), num_steps, jnp.int32),
        input_size=input_size,
        hidden_size=carries[0].hidden.shape[-1],
        num_layers=len(cells) // (2 if bidirectional else 1),
        dropout=0.0,
        bidirectional=bidirectional,
    )
    outputs, hidden, cell = results
    return [LSTMCarry(hidden[place], cell[place]) for place in range(len(cells))], outputs


def pack(cells: Sequence[Params]) -> jax.Array:
    """Returns all params in cuDNN's order: the kernels of every cell, then the biases of every one.

    Args:
      cells: as for `lstm`.

    Returns:
      `[number of params]`.
    """
    names = ("input_kernel", "recurrent_kernel"), ("input_bias", "recurrent_bias")
    leaves = [cell[name] for group in names for cell in cells for name in group]
    return jnp.concatenate([jnp.ravel(jnp.transpose(leaf)) for leaf in leaves])
