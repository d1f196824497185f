"""Every cell in `train.benchmark`: a training pass over a sequence, and one streamed step."""

from collections.abc import Iterator

import jax

from train.benchmark import baselines, jax_runs
from train.benchmark.timing import Comparison, Implementation
from vla_jax.nn import recurrence
from vla_jax.nn.cells import CELLS
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.types import Array, Params


def cells(hidden_size: int, batch_size: int, num_steps: int) -> Iterator[Comparison]:
    """Yields one layer of every cell, alone: outputs and gradients, and a step at batch size 1.

    The FLOP count is that of the products with weights.

    Args:
      hidden_size: H, also D.
      batch_size: B of the sequence.
      num_steps: T.
    """
    for cell in CELLS:
        config = RecurrenceConfig(cell, hidden_size=hidden_size)
        keys = jax.random.split(jax.random.key(0), 3)
        params = recurrence.init(keys[0], config, hidden_size)
        shape = (batch_size, num_steps, hidden_size)
        inputs, cotangent = (jax.random.normal(key, shape) for key in keys[1:])
        yield Comparison(
            "cells",
            f"{cell} {hidden_size}, B {batch_size}, T {num_steps}, forward and backward",
            jax_runs.recurrence_flop(params, batch_size * num_steps),
            [jax_runs.run_recurrence(cell, config, params, inputs, cotangent)],
        )
        yield Comparison(
            "cells",
            f"{cell} {hidden_size}, B 1, one step",
            2 * jax_runs.num_weights(params),
            [_run_step(cell, config, params, inputs[:1, 0])],
        )


def _run_step(name: str, config: RecurrenceConfig, params: Params, inputs: Array) -> Implementation:
    """Returns one step; its carry is donated, as when acting."""
    step = jax.jit(recurrence.step, static_argnums=1, donate_argnums=2)
    carry = recurrence.zero_carry(config, inputs)

    def run() -> jax.Array:
        nonlocal carry
        carry, outputs = step(params, config, carry, inputs)
        return outputs

    return Implementation(
        name, run, lambda outputs: {"outputs": outputs}, baselines.recurrent_bytes(params, 1)
    )
