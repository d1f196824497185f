"""What head "autoregressive" looks back at, one step at a time; `streaming` is the door to it.

The features of the last steps lie in a ring: attention does not ask for their order. It has room
for as many as the head was trained to look back at, or for the window, where that is shorter. The
ring is cleared with the carry; in mode "refresh" each of the W carries has features of its own, and
the ring holds those of all of them: W times as much.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.recurrence import Carry
from vla_jax.policies import autoregressive_head
from vla_jax.policies.decoder_config import DecoderConfig, writer_config
from vla_jax.types import ActionChunk, Params


class SeenState(NamedTuple):
    """What the recurrence remembers, and the steps that the head can look at."""

    memory: Any  # state of the recurrence, whose type is the mode
    seen: jax.Array  # features [B, S, H], of mode "refresh" [B, S, W, H], of each carry
    age: jax.Array  # [B] int32, frames of this episode so far


def init(config: DecoderConfig, memory: Any, window_size: int) -> SeenState:
    """Returns the state before the first frame.

    Args:
      config: of the decoder.
      memory: state of the recurrence.
      window_size: W, or for a carry that is never zeroed as many as there can be.
    """
    outputs = _outputs(config, memory.carry)
    shape = (outputs.shape[0], min(window_size, config.window_size), *outputs.shape[1:])
    return SeenState(memory, jnp.zeros(shape), jnp.zeros(shape[:1], jnp.int32))


def step(
    params: Params,
    config: DecoderConfig,
    state: SeenState,
    memory: Any,
    *,
    life: jax.Array,
    slot: jax.Array | None,
) -> tuple[SeenState, ActionChunk]:
    """Returns the state after one frame, and the chunk that is written there; the age is as it was.

    Args:
      params: of the decoder.
      config: of the decoder.
      state: from `init` or the step before.
      memory: state of the recurrence after this frame.
      life: `[B]` int32, frames that the carry had lived before this one.
      slot: `[B]` int32, which carry of mode "refresh" acts; None where there is one alone.
    """
    rows, room = jnp.arange(life.shape[0]), state.seen.shape[1]
    outputs = _outputs(config, memory.carry)
    ring = seen = state.seen.at[rows, life % room].set(outputs)
    if slot is not None:
        seen = jnp.take_along_axis(ring, slot[:, None, None, None], axis=2)[:, :, 0]
    visible = jnp.arange(room)[None] <= life[:, None]
    chunk, _ = autoregressive_head.apply(
        params["heads"],
        writer_config(config),
        seen[rows, life % room][:, None],
        seen,
        visible[:, None],
        config.action_horizon,
    )
    return SeenState(memory, ring, state.age), jax.tree.map(lambda leaf: leaf[:, 0], chunk)


def _outputs(config: DecoderConfig, carry: Carry) -> jax.Array:
    """Returns the features that the last layer gave when it left this carry, `[B, (W,) H]`."""
    return carry[f"layers_{config.num_layers - 1}"]["forward"].hidden
