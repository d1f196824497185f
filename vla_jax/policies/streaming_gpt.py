"""The decoder of kind "gpt" one step at a time; `streaming` is the door to it.

A cache holds the keys and values of the steps so far, so that one step takes one token through
the transformer. But its positions are learned and end at W: where the last W frames move on by
one, each of them gets another position, so that every key and value of theirs changes.

- `refresh`: while every robot of the batch is in its first W frames, the cache serves. Once one is
  past them, its last W frames run again at every step, and with them those of the whole batch
  (their caches stay whole by it); the caches serve again when no such robot is left.
- `periodic`: the cache is emptied every W frames, and always serves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn import transformer
from vla_jax.nn.transformer import Cache
from vla_jax.policies.decoder_config import DecoderConfig, transformer_config
from vla_jax.policies.decoders import project
from vla_jax.types import Array, Params


class GPTRefreshState(NamedTuple):
    """The last W frames as the transformer gets them, and what it made of them."""

    inputs: jax.Array  # [B, W, H] float32, oldest first; what lies past `age` is of no meaning
    cache: Cache  # leaves [B, W, M, E]
    age: jax.Array  # [B] int32, frames of this episode so far


class GPTPeriodicState(NamedTuple):
    """A cache that is emptied every W frames."""

    cache: Cache  # leaves [B, W, M, E]
    age: jax.Array  # [B] int32, frames of this episode so far


def init_refresh(config: DecoderConfig, batch_size: int, window_size: int) -> GPTRefreshState:
    """Returns the state before the first frame, for a window of W frames."""
    inputs = jnp.zeros((batch_size, window_size, config.hidden_size))
    return GPTRefreshState(inputs, *init_periodic(config, batch_size, window_size))


def init_periodic(config: DecoderConfig, batch_size: int, window_size: int) -> GPTPeriodicState:
    """Returns the state before the first frame, for memories of 1 … W frames."""
    cache = transformer.init_cache(transformer_config(config), batch_size, window_size)
    return GPTPeriodicState(cache, jnp.zeros((batch_size,), jnp.int32))


def refresh(
    params: Params, config: DecoderConfig, state: GPTRefreshState, pooled: Array, reset: Array
) -> tuple[GPTRefreshState, jax.Array]:
    """Returns the state after one frame `pooled [B, D']`, and features `[B, H]` of the last W."""
    trunk, trunk_config = params["transformer"], transformer_config(config)
    window_size = state.inputs.shape[1]
    age = jnp.where(reset, 0, state.age)
    is_past = age >= window_size
    position = jnp.minimum(age, window_size - 1)
    newest = project(params, config, pooled)
    moved = jnp.roll(state.inputs, -1, axis=1)
    inputs = jnp.where(is_past[:, None, None], moved, state.inputs)
    inputs = inputs.at[jnp.arange(age.shape[0]), position].set(newest)

    def run_again() -> tuple[Cache, jax.Array]:
        real = jnp.arange(window_size)[None] <= position[:, None]
        cache, outputs = transformer.apply(trunk, trunk_config, inputs, mask=real)
        return cache, jnp.take_along_axis(outputs, position[:, None, None], axis=1)[:, 0]

    def go_on() -> tuple[Cache, jax.Array]:
        return transformer.step(trunk, trunk_config, state.cache, newest, position)

    cache, features = jax.lax.cond(jnp.any(is_past), run_again, go_on)
    return GPTRefreshState(inputs, cache, age + 1), features


def periodic(
    params: Params, config: DecoderConfig, state: GPTPeriodicState, pooled: Array, reset: Array
) -> tuple[GPTPeriodicState, jax.Array]:
    """Returns the state after one frame `pooled [B, D']`, and features `[B, H]` since W·n."""
    age = jnp.where(reset, 0, state.age)
    window_size = state.cache["layers_0"].keys.shape[1]
    cache, features = transformer.step(
        params["transformer"],
        transformer_config(config),
        state.cache,
        project(params, config, pooled),
        age % window_size,
    )
    return GPTPeriodicState(cache, age + 1), features
