"""The transformer trunk with rotary positions: sliding windows, and memory of a whole episode.

Each layer attends to the last S = `attention_span` steps of an episode (0: S = `window_size`), over
a sequence of any length and one step at a time. With L layers a step is affected by the last
L · (S − 1) + 1 steps.

- "persistent": a ring buffer of S steps per layer, which gives the same results as the whole
  episode in one sequence. With S = the longest episode the memory is that of full attention.
- "periodic": the same buffer, at most W steps long, and cleared every W steps.
- "refresh": the last W steps are recomputed at every step. With one layer the ring buffer gives
  these results, since keys and values do not depend on earlier steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn import rotary_transformer
from vla_jax.nn.recurrence import Carry
from vla_jax.nn.rotary_transformer import RotaryTransformerConfig
from vla_jax.nn.transformer import Cache
from vla_jax.policies.decoder_fields import DecoderFields
from vla_jax.policies.gpt_trunk import PROJECTION, init_projection, project, refuse_carry
from vla_jax.policies.trunk import Mode, StepFeatures, Trunk, no_preparation, one_memory
from vla_jax.trees import under
from vla_jax.types import Array, Key, Params

INFINITE = jnp.iinfo(jnp.int32).max  # steps; longer than any episode


class RotaryGPTState(NamedTuple):
    """Ring buffer of keys and values, or the inputs from which mode "refresh" recomputes."""

    inputs: jax.Array | None  # [B, W, H] float32, newest last
    cache: Cache | None  # leaves [B, S, M', E]; one of the two is None
    age: jax.Array  # [B] int32, steps of this episode so far
    period: jax.Array  # [B] int32, steps after which the memory is cleared


def rotary_config(config: DecoderFields) -> RotaryTransformerConfig:
    """Returns the config of the transformer."""
    return RotaryTransformerConfig(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads or config.num_heads,
        hidden_size=config.hidden_size,
        span=config.attention_span or config.window_size,
        dropout=config.dropout,
        dtype=config.dtype,
    )


def _check(config: DecoderFields) -> None:
    rotary_config(config)  # raises


def _init(key: Key, config: DecoderFields) -> Params:
    projection_key, transformer_key = jax.random.split(key)
    return {
        "rotary_transformer": rotary_transformer.init(transformer_key, rotary_config(config)),
        **init_projection(projection_key, config),
    }


def _apply(
    params: Params,
    config: DecoderFields,
    pooled: jax.Array,
    *,
    mask: Array | None,
    reset: Array | None,
    carry: Carry | None,
    key: Key | None,
) -> tuple[Carry, jax.Array]:
    refuse_carry(config, carry)
    inputs = project(params, config, pooled)
    return {}, rotary_transformer.apply(
        params["rotary_transformer"], rotary_config(config), inputs, mask=mask, reset=reset, key=key
    )


def _init_stream(
    config: DecoderFields, batch_size: int, mode: Mode, window_size: int
) -> RotaryGPTState:
    trunk_config = rotary_config(config)
    inputs, cache = None, None
    if mode == "refresh" and config.num_layers > 1:
        inputs = jnp.zeros((batch_size, window_size, config.hidden_size))
    else:
        span = trunk_config.span
        capacity = span if mode == "persistent" else min(span, window_size)
        cache = rotary_transformer.init_cache(trunk_config, batch_size, capacity)
    period = window_size if mode == "periodic" else INFINITE
    return RotaryGPTState(
        inputs,
        cache,
        age=jnp.zeros(batch_size, jnp.int32),
        period=jnp.full(batch_size, period, jnp.int32),
    )


def _step(
    params: Params, config: DecoderFields, state: RotaryGPTState, pooled: Array, reset: Array
) -> tuple[RotaryGPTState, StepFeatures]:
    trunk, trunk_config = params["rotary_transformer"], rotary_config(config)
    age, newest = jnp.where(reset, 0, state.age), project(params, config, pooled)
    inputs, cache, position = None, None, age % state.period
    if state.inputs is None:
        assert state.cache is not None
        cache, features = rotary_transformer.step(
            trunk, trunk_config, state.cache, newest, position
        )
    else:
        inputs, real = slide(state.inputs, newest, age)
        features = rotary_transformer.apply(trunk, trunk_config, inputs, mask=real)[:, -1]
    state = RotaryGPTState(inputs, cache, age + 1, state.period)
    return state, StepFeatures(features[:, None], jnp.zeros_like(age), num_previous=position)


def slide(inputs: Array, newest: Array, age: Array) -> tuple[jax.Array, jax.Array]:
    """Returns a window of the last W steps after one more, and the mask `[B, W]` of its episode.

    Args:
      inputs: `[B, W, H]`, newest last.
      newest: `[B, H]`.
      age: `[B]` int32, steps of this episode before the newest.
    """
    window = jnp.concatenate([inputs[:, 1:], newest[:, None]], axis=1)
    steps_ago = jnp.arange(window.shape[1])[::-1]
    return window, steps_ago[None] <= age[:, None]


ROTARY_GPT = Trunk(
    params_name="rotary_transformer",
    has_memory=True,
    modes=("refresh", "periodic", "persistent"),
    check=_check,
    init=_init,
    apply=_apply,
    num_memories=one_memory,
    init_stream=_init_stream,
    step=_step,
    prepare=no_preparation,
    sharding_rules=(PROJECTION, *under("rotary_transformer", rotary_transformer.SHARDING)),
    is_transformer=True,
)
