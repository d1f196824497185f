"""Every cell and decoder in `train.benchmark`: training passes over sequences, streamed steps."""

from collections.abc import Iterator
from dataclasses import replace

import jax

from train.benchmark import baselines, jax_runs
from train.benchmark.timing import Comparison, Implementation
from vla_jax.nn import recurrence
from vla_jax.nn.cells import CELLS, CellName
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.nn.recurrence_config import Implementation as TimeLoop
from vla_jax.policies import decoders, trunks
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.decoder_fields import Dtype
from vla_jax.types import Array, Params

_NUM_FRAMES = 5  # different frames of a stream
_SEGMENT_SIZE = 15  # steps, of memory_gpt


def cells(
    hidden_size: int, batch_size: int, num_steps: int, *, dtype: Dtype
) -> Iterator[Comparison]:
    """Yields one layer of every cell, alone: outputs and gradients, and a step at batch size 1.

    The FLOP count is that of the products with weights.

    Args:
      hidden_size: H, also D.
      batch_size: B of the sequence.
      num_steps: T.
      dtype: of the factors of the products.
    """
    for cell in CELLS:
        config = RecurrenceConfig(cell, hidden_size=hidden_size, dtype=dtype)
        params, inputs, cotangent = draw(config, batch_size, num_steps)
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


def parallel_forms(
    hidden_size: int, batch_size: int, num_steps: int, *, dtype: Dtype
) -> Iterator[Comparison]:
    """Yields the parallel or chunkwise form of a layer and its steps: outputs and gradients.

    Args:
      hidden_size: H, also D.
      batch_size: B.
      num_steps: T.
      dtype: of the factors of the products.
    """
    for cell, loops in parallel_loops().items():
        configs = {
            loop: RecurrenceConfig(cell, 1, hidden_size, dtype=dtype, implementation=loop)
            for loop in loops
        }
        drawn = draw(configs["scan"], batch_size, num_steps)
        yield Comparison(
            "parallel",
            f"{cell} {hidden_size}, B {batch_size}, T {num_steps}, forward and backward",
            jax_runs.recurrence_flop(drawn[0], batch_size * num_steps),
            [jax_runs.run_recurrence(loop, each, *drawn) for loop, each in configs.items()],
        )


def streams(config: DecoderConfig, num_robots: tuple[int, ...]) -> Iterator[Comparison]:
    """Yields an acting step of every kind of decoder, in the last of its modes.

    That is "persistent" where it exists. The FLOP count is that of the products with weights.

    Args:
      config: sizes of the decoder; its kind is replaced.
      num_robots: every B, robots that act together.
    """
    for kind in trunks.names():
        # Every second step is timed: with an odd number of them some begin a segment.
        member = replace(config, kind=kind, segment_size=_SEGMENT_SIZE)
        mode = trunks.get(kind).modes[-1]
        for batch_size in num_robots:
            shape = (_NUM_FRAMES, batch_size, config.num_tokens, config.token_dim)
            frames = jax.random.normal(jax.random.key(1), shape)
            params = decoders.init(jax.random.key(0), member)
            weights = jax_runs.num_weights(params)
            yield Comparison(
                "decoders",
                f"{kind} {config.num_layers} × {config.hidden_size}, {mode}, B {batch_size}",
                2 * batch_size * weights,
                [jax_runs.run_stream(member, params, frames, mode=mode)],
            )


def parallel_loops() -> dict[CellName, tuple[TimeLoop, ...]]:
    """Returns the parallel time loop and the loops over steps of each cell that has both."""
    loops: dict[CellName, tuple[TimeLoop, ...]] = {}
    for cell, member in CELLS.items():
        if member.chunk is not None:
            loops[cell] = ("chunkwise", "bptt", "scan")
        elif member.coefficients is not None:
            loops[cell] = ("associative", "bptt", "scan")
    return loops


def draw(
    config: RecurrenceConfig, batch_size: int, num_steps: int
) -> tuple[Params, jax.Array, jax.Array]:
    """Returns params of a layer with D = H, inputs and a cotangent `[B, T, H]`."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = recurrence.init(keys[0], config, config.hidden_size)
    shape = (batch_size, num_steps, config.hidden_size)
    inputs, cotangent = (jax.random.normal(key, shape) for key in keys[1:])
    return params, inputs, cotangent


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
