"""Tokens to action chunks over a window: pooled, run through a trunk, given to the heads.

    tokens [B, W, N, D] → pool → [B, W, D'] → trunk → [B, W, H] → heads → Prediction

The trunk is a recurrence of any cell ("lstm", "gru", "rnn", …), a transformer that looks back over
the window ("gpt"), or an MLP that remembers nothing, the baseline ("fc"). Actions come out at every
position of the window; `streaming` gives the same ones step by step. The heads see the features of
their own step, but for head "autoregressive", which looks back at those before: an encoder-decoder.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from vla_jax.nn import attention, layers, pooling, recurrence, transformer
from vla_jax.nn.cells import CELLS
from vla_jax.nn.layers import dense
from vla_jax.nn.recurrence import Carry
from vla_jax.policies import autoregressive_head, heads
from vla_jax.policies.autoregressive_head import Told
from vla_jax.policies.decoder_config import (
    DecoderConfig,
    least_tokens,
    pooled_size,
    recurrence_config,
    transformer_config,
    writer_config,
)
from vla_jax.types import Array, Key, Params, Prediction


class Trunk(NamedTuple):
    """A family member: what stands between pooling and heads."""

    name: str  # of its params
    init: Callable[[Key, DecoderConfig], Params]
    apply: Callable[..., tuple[Carry, jax.Array]]  # see `features`, with pooled for tokens


def init(key: Key, config: DecoderConfig) -> Params:
    """Returns `{"recurrence" (or what the kind has), "heads", "pooling" (where it has params)}`.

    Kind "fc" has "mlp" in place of "recurrence"; "gpt" has "transformer", and "projection" where
    a pooled step has not H features already.

    Args:
      key: consumed.
      config: sizes and kind.
    """
    pooling_key, trunk_key, heads_key = jax.random.split(key, 3)
    params: Params = {
        **TRUNKS[config.kind].init(trunk_key, config),
        "heads": _init_heads(heads_key, config),
    }
    pooling_params = pooling.init(pooling_key, config.pooling, config.num_latents, config.token_dim)
    return {**params, "pooling": pooling_params} if pooling_params else params


def apply(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    *,
    timestep_mask: Array | None = None,
    token_mask: Array | None = None,
    reset: Array | None = None,
    carry: Carry | None = None,
    told: Told | None = None,
    key: Key | None = None,
) -> Prediction:
    """Returns what is predicted at every position: action chunks, or bins of them.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      tokens: `[B, W, N, D]`; W may be any number of steps here, of "gpt" at most the config's.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      token_mask: `[B, W, N]`, True where the token is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.
      carry: of the recurrence before the first step; None means zeros. Of "gpt" always None.
      told: the true actions, that head "autoregressive" learns from; None means it is told its own.
      key: consumed, for dropout, and for `told.rate`; None means no dropout.

    Returns:
      Arm `[B, W, K, A-1]` in (-1, 1), gripper logit `[B, W, K]`; of head "discrete" logits
      `[B, W, K, A, V]`; float32. At masked steps they are those of zero features.

    Raises:
      ValueError: `tokens` are not `[B, W, N, D]` with the config's N and D, or for "gpt" there is
        a carry or a longer window; another head is told, or `told.rate` has no key.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), `LSTMDecoder`, `GPTDecoder`, `FCDecoder`.
    """
    trunk_key, head_key = (None, None) if key is None else jax.random.split(key)
    _, hidden = features(
        params,
        config,
        tokens,
        timestep_mask=timestep_mask,
        token_mask=token_mask,
        reset=reset,
        carry=carry,
        key=trunk_key,
    )
    return predict(
        params, config, hidden, timestep_mask=timestep_mask, reset=reset, told=told, key=head_key
    )


def predict(
    params: Params,
    config: DecoderConfig,
    features: Array,
    *,
    timestep_mask: Array | None = None,
    reset: Array | None = None,
    told: Told | None = None,
    key: Key | None = None,
) -> Prediction:
    """Returns what the heads make of the features of a window, as `apply` does.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      features: `[B, W, H]` from `features`; or `[..., H]`, but for head "autoregressive", which
        alone needs what follows.
      timestep_mask: `[B, W]`, as for `apply`.
      reset: `[B, W]`, as for `apply`.
      told: as for `apply`.
      key: consumed, as for `apply`.

    Raises:
      ValueError: another head is told, which would not hear it, or `told.rate` has no key.
    """
    if config.head == "autoregressive":
        visible = attention.causal_mask(
            jnp.ones(features.shape[:2], bool) if timestep_mask is None else timestep_mask,
            jnp.zeros(features.shape[:2], bool) if reset is None else reset,
            config.window_size,
        )
        return autoregressive_head.apply(
            params["heads"],
            writer_config(config),
            features,
            features,
            visible,
            config.action_horizon,
            told=told,
            key=key,
        )[0]
    if told is not None:
        raise ValueError(
            f"told must be None for head '{config.head}', whose actions do not wait for one "
            "another, got actions; leave it out, or choose head 'autoregressive'."
        )
    return heads.apply(
        params["heads"],
        features,
        config.action_horizon,
        num_bins=_num_bins(config),
        dtype=config.dtype,
    )


def features(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    *,
    timestep_mask: Array | None = None,
    token_mask: Array | None = None,
    reset: Array | None = None,
    carry: Carry | None = None,
    key: Key | None = None,
) -> tuple[Carry, jax.Array]:
    """Returns what the heads get, and the carry after the last step, to go on from.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      tokens: `[B, W, N, D]`; W may be any number of steps here, of "gpt" at most the config's.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      token_mask: `[B, W, N]`, True where the token is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.
      carry: of the recurrence before the first step; None means zeros. Of "gpt" always None.
      key: consumed, for dropout; None means no dropout.

    Returns:
      The carry (of kinds "fc" and "gpt": an empty dict), and features `[B, W, H]`, float32, zeros
      at masked steps.

    Raises:
      ValueError: `tokens` are not `[B, W, N, D]` with the config's N and D, or for "gpt" there is
        a carry or a longer window.
    """
    check_tokens(config, tokens, "[B, W, N, D]")
    if timestep_mask is not None:
        chex.assert_shape(timestep_mask, tokens.shape[:2])
    pooled = pool(params, config, tokens, token_mask=token_mask)
    return TRUNKS[config.kind].apply(
        params, config, pooled, mask=timestep_mask, reset=reset, carry=carry, key=key
    )


def pool(
    params: Params, config: DecoderConfig, tokens: Array, *, token_mask: Array | None = None
) -> jax.Array:
    """Returns one vector `[..., D']` per step, of `tokens [..., N, D]`; see `pooling.apply`."""
    return pooling.apply(
        params.get("pooling", {}), config.pooling, tokens, config.num_latents, mask=token_mask
    )


def project(params: Params, config: DecoderConfig, pooled: Array) -> jax.Array:
    """Returns what the transformer of kind "gpt" gets of `pooled [..., D']`: `[..., H]` float32."""
    if "projection" not in params:
        return jnp.asarray(pooled)
    projection = params["projection"]
    return dense(pooled, projection["kernel"], projection["bias"], dtype=config.dtype)


def check_tokens(config: DecoderConfig, tokens: Array, axes: str) -> None:
    """Raises a ValueError unless `tokens` have these axes, the last two as in the config.

    Args:
      config: of the decoder.
      tokens: what a user gave.
      axes: their axes in words, such as "[B, W, N, D]".
    """
    least = config.num_tokens or least_tokens(config)
    most = config.num_tokens or math.inf
    fits = tokens.ndim == axes.count(",") + 1 and tokens.shape[-1] == config.token_dim
    if not fits or not least <= tokens.shape[-2] <= most:
        expected = f"= {least}" if config.num_tokens else f"≥ {least}"
        raise ValueError(
            f"tokens must be {axes} with N {expected} and D = {config.token_dim}, got "
            f"{tokens.shape}; check num_tokens and token_dim of the decoder config."
        )


def _init_heads(key: Key, config: DecoderConfig) -> Params:
    if config.head == "autoregressive":
        return autoregressive_head.init(key, writer_config(config))
    return heads.init(
        key,
        config.hidden_size,
        config.action_horizon,
        config.action_dim,
        config.head_sizes,
        num_bins=_num_bins(config),
    )


def _num_bins(config: DecoderConfig) -> int | None:
    return config.num_bins if config.head == "discrete" else None


def _keep(values: jax.Array, mask: Array | None) -> jax.Array:
    return values if mask is None else jnp.where(mask[..., None], values, 0.0)


def _init_recurrence(key: Key, config: DecoderConfig) -> Params:
    return {"recurrence": recurrence.init(key, recurrence_config(config), pooled_size(config))}


def _apply_recurrence(
    params: Params, config: DecoderConfig, pooled: jax.Array, *, mask, reset, carry, key
) -> tuple[Carry, jax.Array]:
    return recurrence.apply(
        params["recurrence"],
        recurrence_config(config),
        pooled,
        mask=mask,
        reset=reset,
        carry=carry,
        key=key,
    )


def _init_mlp(key: Key, config: DecoderConfig) -> Params:
    size = pooled_size(config)
    return {"mlp": layers.init_mlp(key, (size, max(size // 2, 1), config.hidden_size))}


def _apply_mlp(
    params: Params, config: DecoderConfig, pooled: jax.Array, *, mask, reset, carry, key
) -> tuple[Carry, jax.Array]:
    del reset, carry, key  # nothing is remembered, nothing dropped
    return {}, _keep(layers.apply_mlp(params["mlp"], pooled, dtype=config.dtype), mask)


def _init_transformer(key: Key, config: DecoderConfig) -> Params:
    projection_key, transformer_key = jax.random.split(key)
    params = {"transformer": transformer.init(transformer_key, transformer_config(config))}
    sizes = (pooled_size(config), config.hidden_size)
    if sizes[0] != sizes[1]:
        params["projection"] = layers.init_mlp(projection_key, sizes)["layers_0"]
    return params


def _apply_transformer(
    params: Params, config: DecoderConfig, pooled: jax.Array, *, mask, reset, carry, key
) -> tuple[Carry, jax.Array]:
    if carry is not None:
        raise ValueError(
            "carry must be None for a decoder of kind 'gpt', which looks at its window and carries "
            f"nothing, got {type(carry).__name__}; give the whole window, or use streaming."
        )
    inputs = project(params, config, pooled)
    _, features = transformer.apply(
        params["transformer"], transformer_config(config), inputs, mask=mask, reset=reset, key=key
    )
    return {}, features


_RECURRENCE = Trunk("recurrence", _init_recurrence, _apply_recurrence)
TRUNKS = {
    **dict.fromkeys(CELLS, _RECURRENCE),
    "fc": Trunk("mlp", _init_mlp, _apply_mlp),
    "gpt": Trunk("transformer", _init_transformer, _apply_transformer),
}
