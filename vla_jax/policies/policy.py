"""A policy is a backbone and a decoder: observations in, chunks of actions out.

    params = policy.init(key, config)
    chunk = policy.apply(params, config, observation, timestep_mask)      # a window, to train
    state = policy.init_stream(params, config, batch_size)                # on the robot
    state, chunk = policy.step(params, config, state, observation)

The chunks of the two ways are the same.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.backbones.backbone import BACKBONES, BackboneConfig
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.policies import decoders, streaming
from vla_jax.policies.decoders import DecoderConfig
from vla_jax.policies.streaming import Mode
from vla_jax.types import ActionChunk, Array, Key, Observation, Params, Prediction


@dataclass(frozen=True)
class PolicyConfig:
    """A backbone and the decoder that fits it; `connect` makes them fit."""

    backbone: BackboneConfig = PerceiverConfig()
    decoder: DecoderConfig = DecoderConfig(
        token_dim=PerceiverConfig().token_dim, num_tokens=PerceiverConfig().num_tokens
    )

    def __post_init__(self):
        """Checks that the decoder expects the backbone's tokens."""
        given = (self.backbone.num_tokens, self.backbone.token_dim)
        expected = (self.decoder.num_tokens or given[0], self.decoder.token_dim)  # 0 = any number
        if given != expected:
            raise ValueError(
                f"decoder must expect the backbone's tokens [{given[0]}, {given[1]}], got "
                f"num_tokens {expected[0]} and token_dim {expected[1]}; use policy.connect."
            )


def connect(backbone: BackboneConfig, decoder: DecoderConfig) -> PolicyConfig:
    """The two as one config, with the decoder's `num_tokens` and `token_dim` set to fit."""
    decoder = dataclasses.replace(
        decoder, num_tokens=backbone.num_tokens, token_dim=backbone.token_dim
    )
    return PolicyConfig(backbone, decoder)


def init(key: Key, config: PolicyConfig) -> Params:
    """Random params `{"backbone": …, "decoder": …}`; `key` is consumed."""
    backbone_key, decoder_key = jax.random.split(key)
    return {
        "backbone": BACKBONES[config.backbone.kind].init(backbone_key, config.backbone),
        "decoder": decoders.init(decoder_key, config.decoder),
    }


def encode(params: Params, config: PolicyConfig, observation: Observation) -> jax.Array:
    """Tokens `[..., N, D]` of observations with leading axes `[...]`; no memory is involved."""
    return BACKBONES[config.backbone.kind].apply(params["backbone"], config.backbone, observation)


def apply(
    params: Params,
    config: PolicyConfig,
    observation: Observation,
    timestep_mask: Array | None = None,
    *,
    reset: Array | None = None,
    tokens: Array | None = None,
    key: Key | None = None,
) -> Prediction:
    """Action chunks (of a discrete head: bins) at every position of a window.

    Args:
      params: from `init`.
      config: the same.
      observation: `[B, W, ...]`; not looked at where `tokens` are given.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.
      tokens: `[B, W, N, D]` that `encode` gave earlier, for a frozen backbone.
      key: for dropout, consumed; None means no dropout.

    Returns:
      Chunks `[B, W, K, …]`.
    """
    trunk_key, head_key = (None, None) if key is None else jax.random.split(key)
    _, hidden = features(
        params, config, observation, timestep_mask, reset=reset, tokens=tokens, key=trunk_key
    )
    return decoders.predict(
        params["decoder"],
        config.decoder,
        hidden,
        timestep_mask=timestep_mask,
        reset=reset,
        key=head_key,
    )


def features(
    params: Params,
    config: PolicyConfig,
    observation: Observation,
    timestep_mask: Array | None = None,
    *,
    reset: Array | None = None,
    tokens: Array | None = None,
    key: Key | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What lies between observations and chunks, for other heads than the actions'.

    `decoders.predict(params["decoder"], config.decoder, features, ...)` makes chunks of them.

    Args:
      params: as for `apply`, and so are the others.
      config: the same.
      observation: `[B, W, ...]`.
      timestep_mask: `[B, W]`.
      reset: `[B, W]`.
      tokens: `[B, W, N, D]`.
      key: for dropout, consumed.

    Returns:
      Tokens `[B, W, N, D]`, those given or the backbone's, and the memory's features `[B, W, H]`.
    """
    if tokens is None:
        tokens = encode(params, config, observation)
    _, hidden = decoders.features(
        params["decoder"],
        config.decoder,
        tokens,
        timestep_mask=timestep_mask,
        reset=reset,
        key=key,
    )
    return jnp.asarray(tokens), hidden


def init_stream(
    params: Params,
    config: PolicyConfig,
    batch_size: int,
    *,
    mode: Mode = "refresh",
    window_size: int | None = None,
) -> Any:
    """What the decoder remembers before the first step; see `streaming.init`."""
    return streaming.init(
        params["decoder"], config.decoder, batch_size, mode=mode, window_size=window_size
    )


def lay_out(params: Params, config: PolicyConfig, state: Any) -> Params:
    """Params with which `step` gives the same faster, where it can; see `streaming.lay_out`."""
    return {**params, "decoder": streaming.lay_out(params["decoder"], config.decoder, state)}


def step(
    params: Params,
    config: PolicyConfig,
    state: Any,
    observation: Observation,
    *,
    reset: Array | None = None,
) -> tuple[Any, ActionChunk]:
    """One time step.

    Args:
      params: from `init` or `lay_out`.
      config: the same.
      state: from `init_stream` or the step before.
      observation: `[B, ...]`.
      reset: `[B]`, True where a new episode starts with this observation.

    Returns:
      The new state, and chunks `[B, K, …]`.
    """
    tokens = encode(params, config, observation)
    return streaming.step(params["decoder"], config.decoder, state, tokens, reset=reset)
