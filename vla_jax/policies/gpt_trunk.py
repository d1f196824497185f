"""The transformer trunk (GPT-2), over a window or one step at a time with a key-value cache.

It has W learned positions. When the window of the last W steps slides, the position of every step
changes, and with it all keys and values.

- "refresh": the cache is used while every row of the batch is in the first W steps of its episode.
  If any row is past them, the last W steps of the whole batch are recomputed at every step, which
  also renews the caches.
- "periodic": the cache is cleared every W steps and always used.
- "persistent" is not supported: there are no positions after W.

Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), `GPTDecoder`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vla_jax.nn import layers, transformer
from vla_jax.nn.recurrence import Carry
from vla_jax.nn.transformer import Cache, TransformerConfig
from vla_jax.policies.decoder_fields import DecoderFields, pooled_size
from vla_jax.policies.trunk import Mode, StepFeatures, Trunk, no_preparation, one_memory
from vla_jax.trees import under
from vla_jax.types import Array, Key, Params

PROJECTION = ("projection/kernel", PartitionSpec("fsdp"))  # sharding rule of `init_projection`


class GPTState(NamedTuple):
    """Key-value cache and, in mode "refresh", the inputs from which it is recomputed."""

    inputs: jax.Array | None  # [B, W, H] float32, oldest first; undefined from index `age` on
    cache: Cache  # leaves [B, W, M, E]
    age: jax.Array  # [B] int32, steps of this episode so far


def transformer_config(config: DecoderFields) -> TransformerConfig:
    """Returns the config of the transformer, with one position per step of a window."""
    return TransformerConfig(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        hidden_size=config.hidden_size,
        num_positions=config.window_size,
        dropout=config.dropout,
        dtype=config.dtype,
    )


def _check(config: DecoderFields) -> None:
    transformer_config(config)  # raises


def _init(key: Key, config: DecoderFields) -> Params:
    projection_key, transformer_key = jax.random.split(key)
    return {
        "transformer": transformer.init(transformer_key, transformer_config(config)),
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
    _, features = transformer.apply(
        params["transformer"],
        transformer_config(config),
        project(params, config, pooled),
        mask=mask,
        reset=reset,
        key=key,
    )
    return {}, features


def _init_stream(config: DecoderFields, batch_size: int, mode: Mode, window_size: int) -> GPTState:
    if window_size > config.window_size:
        raise ValueError(
            f"window_size must be at most {config.window_size} for a decoder of kind 'gpt', its "
            f"number of learned positions, got {window_size}; train with a larger window_size."
        )
    inputs = jnp.zeros((batch_size, window_size, config.hidden_size))
    return GPTState(
        inputs=inputs if mode == "refresh" else None,
        cache=transformer.init_cache(transformer_config(config), batch_size, window_size),
        age=jnp.zeros(batch_size, jnp.int32),
    )


def _step(
    params: Params, config: DecoderFields, state: GPTState, pooled: Array, reset: Array
) -> tuple[GPTState, StepFeatures]:
    newest = project(params, config, pooled)
    state = state._replace(age=jnp.where(reset, 0, state.age))
    if state.inputs is None:
        inputs, (cache, features) = None, _append(params, config, state, newest)
    else:
        inputs, cache, features = _slide(params, config, state, state.inputs, newest)
    acting = jnp.zeros_like(state.age)
    return GPTState(inputs, cache, state.age + 1), StepFeatures(
        features[:, None], acting, num_previous=state.age
    )


def _slide(
    params: Params, config: DecoderFields, state: GPTState, inputs: jax.Array, newest: jax.Array
) -> tuple[jax.Array, Cache, jax.Array]:
    """Advances mode "refresh"; returns the inputs, the cache and the features `[B, H]`."""
    trunk, trunk_config = params["transformer"], transformer_config(config)
    window_size, age = inputs.shape[1], state.age
    is_past = age >= window_size
    position = jnp.minimum(age, window_size - 1)
    shifted = jnp.roll(inputs, -1, axis=1)
    inputs = jnp.where(is_past[:, None, None], shifted, inputs)
    inputs = inputs.at[jnp.arange(age.shape[0]), position].set(newest)

    def run_window() -> tuple[Cache, jax.Array]:
        real = jnp.arange(window_size)[None] <= position[:, None]
        cache, outputs = transformer.apply(trunk, trunk_config, inputs, mask=real)
        return cache, jnp.take_along_axis(outputs, position[:, None, None], axis=1)[:, 0]

    def use_cache() -> tuple[Cache, jax.Array]:
        return transformer.step(trunk, trunk_config, state.cache, newest, position)

    cache, features = jax.lax.cond(jnp.any(is_past), run_window, use_cache)
    return inputs, cache, features


def _append(
    params: Params, config: DecoderFields, state: GPTState, newest: jax.Array
) -> tuple[Cache, jax.Array]:
    """Advances mode "periodic"; returns the cache and the features `[B, H]`."""
    window_size = state.cache["layers_0"].keys.shape[1]
    position = state.age % window_size
    return transformer.step(
        params["transformer"], transformer_config(config), state.cache, newest, position
    )


def init_projection(key: Key, config: DecoderFields) -> Params:
    """Returns `{"projection"}` of pooled steps to H features; empty if they have H features.

    Args:
      key: consumed.
      config: sizes.
    """
    size = pooled_size(config)
    if size == config.hidden_size:
        return {}
    return {"projection": layers.init_dense(key, size, config.hidden_size)}


def refuse_carry(config: DecoderFields, carry: Carry | None) -> None:
    """Raises a ValueError unless `carry` is None."""
    if carry is not None:
        raise ValueError(
            f"carry must be None for a decoder of kind '{config.kind}', which attends to its "
            f"window and has no carry, got {type(carry).__name__}; give the whole window, or use "
            "streaming."
        )


def project(params: Params, config: DecoderFields, pooled: Array) -> jax.Array:
    """Returns the transformer's inputs `[..., H]` float32, from pooled steps `[..., D']`."""
    if "projection" not in params:
        return jnp.asarray(pooled)
    return layers.dense(pooled, **params["projection"], dtype=config.dtype)


GPT = Trunk(
    params_name="transformer",
    has_memory=True,
    modes=("refresh", "periodic"),
    check=_check,
    init=_init,
    apply=_apply,
    num_memories=one_memory,
    init_stream=_init_stream,
    step=_step,
    prepare=no_preparation,
    sharding_rules=(PROJECTION, *under("transformer", transformer.SHARDING)),
    is_transformer=True,
)
