"""A policy is a backbone and a decoder: observations in, action chunks out.

    params = policy.init(key, config)
    prediction = policy.apply(params, config, observation)             # a window, for training
    state = policy.init_stream(params, config, batch_size)             # on the robot
    state, chunk = policy.step(params, config, state, observation)

`apply` and `step` predict the same chunks.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from vla_jax.backbones import registry
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.backbones.registry import BackboneConfig
from vla_jax.config import checked
from vla_jax.nn import bptt
from vla_jax.policies import decoders, heads, trunks, window_history
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.decoders import StreamState
from vla_jax.policies.head import TeacherForcing
from vla_jax.policies.trunk import Mode
from vla_jax.policies.window_history import PastSteps
from vla_jax.trees import under
from vla_jax.types import (
    ActionChunk,
    Array,
    Key,
    Observation,
    Params,
    Prediction,
    ShardingRules,
    Tokens,
)


@dataclass(frozen=True)
@checked()
class PolicyConfig:
    """A backbone and a matching decoder; `connect` sets the decoder's input sizes."""

    # fields without an option on the command line, where `complete` sets them
    DERIVED: ClassVar[tuple[str, ...]] = ("decoder.num_tokens", "decoder.token_dim")

    backbone: BackboneConfig = PerceiverConfig()  # encoder of images and instruction
    # trunk and action head on the backbone's tokens
    decoder: DecoderConfig = DecoderConfig(
        token_dim=PerceiverConfig().token_dim, num_tokens=PerceiverConfig().num_tokens
    )

    def __post_init__(self):
        """Checks that the decoder expects the backbone's tokens."""
        produced = (self.backbone.num_tokens, self.backbone.token_dim)
        num_tokens = self.decoder.num_tokens or produced[0]  # 0 = any number
        if produced != (num_tokens, self.decoder.token_dim):
            raise ValueError(
                f"decoder must expect the backbone's tokens [N, D] = {list(produced)}, got "
                f"num_tokens {num_tokens} and token_dim {self.decoder.token_dim}; "
                "use policy.connect."
            )
        sees_window = registry.get(self.backbone).history(self.backbone) is not None
        if sees_window and trunks.get(self.decoder.kind).has_memory:
            raise ValueError(
                "kind of the decoder must be 'fc' with a backbone of history 'window', which sees "
                f"the earlier steps itself, got '{self.decoder.kind}'; choose one of them."
            )

    def complete(self) -> Self:
        """Returns the config with the decoder's input sizes set by the backbone."""
        connected = connect(self.backbone, self.decoder).decoder
        if not self.decoder.num_tokens:  # any number
            connected = dataclasses.replace(connected, num_tokens=0)
        return dataclasses.replace(self, decoder=connected)


class WindowStream(NamedTuple):
    """Streaming state of a policy whose backbone sees earlier steps; leaves have an axis B."""

    past: PastSteps
    decoder: StreamState


class PolicyOutputs(NamedTuple):
    """Everything that a policy computes over a window."""

    tokens: Tokens  # [B, W, N, D], the argument or the output of the backbone
    features: jax.Array  # [B, W, H] float32, of the decoder's trunk; zeros at masked steps
    prediction: Prediction  # [B, W, K, ...]


def connect(backbone: BackboneConfig, decoder: DecoderConfig) -> PolicyConfig:
    """Returns both as one config; sets the decoder's `num_tokens` and `token_dim`."""
    decoder = dataclasses.replace(
        decoder, num_tokens=backbone.num_tokens, token_dim=backbone.token_dim
    )
    return PolicyConfig(backbone, decoder)


def init(key: Key, config: PolicyConfig) -> Params:
    """Returns random params `{"backbone": …, "decoder": …}`; `key` is consumed."""
    backbone_key, decoder_key = jax.random.split(key)
    return {
        "backbone": registry.get(config.backbone).init(backbone_key, config.backbone),
        "decoder": decoders.init(decoder_key, config.decoder),
    }


def sharding_rules(config: PolicyConfig) -> ShardingRules:
    """Returns how the params are split over a mesh of devices: rules of backbone and decoder."""
    return (
        *under("backbone", registry.get(config.backbone).sharding_rules),
        *under("decoder", decoders.sharding_rules(config.decoder)),
    )


def encode(params: Params, config: PolicyConfig, observation: Observation) -> Tokens:
    """Returns the tokens of observations, each encoded independently.

    Args:
      params: from `init`.
      config: the one given to `init`.
      observation: any leading axes `[...]`.

    Returns:
      Tokens `[..., N, D]`, mask `[..., N]`.

    Raises:
      ValueError: the tokens of a step depend on earlier steps.
    """
    backbone = config.backbone
    member = registry.get(backbone)
    if member.history(backbone) is not None:
        raise ValueError(
            f"history of backbone '{backbone.kind}' must be 'step' to encode steps one by one, as "
            "a cache of tokens does, got 'window'; use `encode_window`."
        )
    return member.apply(params["backbone"], backbone, observation)


def encode_window(
    params: Params,
    config: PolicyConfig,
    observation: Observation,
    *,
    timestep_mask: Array | None = None,
    reset: Array | None = None,
) -> Tokens:
    """Returns the tokens of the steps of a window, from the steps that the backbone sees.

    Args:
      params: from `init`.
      config: the one given to `init`.
      observation: `[B, W, ...]`; masked steps may be NaN.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.

    Returns:
      Tokens `[B, W, N, D]`, mask `[B, W, N]`.
    """
    backbone = config.backbone
    history = registry.get(backbone).history(backbone)
    if timestep_mask is not None:
        observation = _keep_real(observation, timestep_mask)
    if history is None:
        return encode(params, config, observation)
    return window_history.encode_window(
        history,
        params["backbone"],
        backbone,
        observation,
        config.decoder.window_size,
        timestep_mask=timestep_mask,
        reset=reset,
    )


def takes_targets(config: PolicyConfig) -> bool:
    """Returns True if `apply` and `outputs` use ground-truth actions (teacher forcing)."""
    return heads.HEADS[config.decoder.head].takes_targets


def apply(
    params: Params,
    config: PolicyConfig,
    observation: Observation,
    *,
    timestep_mask: Array | None = None,
    reset: Array | None = None,
    tokens: Tokens | None = None,
    targets: TeacherForcing | None = None,
    key: Key | None = None,
) -> Prediction:
    """Returns the prediction at every position of a window.

    Args:
      params: from `init`.
      config: the one given to `init`.
      observation: `[B, W, ...]`; not used if `tokens` are given.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.
      tokens: from `encode`, `[B, W, N, D]`, cached for a frozen backbone; None computes them.
      targets: ground-truth actions for teacher forcing (heads "autoregressive" and "flow"); None
        decodes from the model's own actions, or from noise.
      key: consumed, for dropout, for `targets.rate` and for the noise of head "flow"; None disables
        dropout.

    Returns:
      Action chunks, bins of a discrete head, or with targets a flow's velocity, `[B, W, K, …]`.

    Raises:
      ValueError: as for `decoders.apply`.
    """
    return outputs(
        params,
        config,
        observation,
        timestep_mask=timestep_mask,
        reset=reset,
        tokens=tokens,
        targets=targets,
        key=key,
    ).prediction


def outputs(
    params: Params,
    config: PolicyConfig,
    observation: Observation,
    *,
    timestep_mask: Array | None = None,
    reset: Array | None = None,
    tokens: Tokens | None = None,
    targets: TeacherForcing | None = None,
    key: Key | None = None,
) -> PolicyOutputs:
    """Returns the prediction of `apply`, and the tokens and features it is computed from.

    The arguments are those of `apply`. Auxiliary heads and value functions use the features.
    """
    trunk_key, head_key = (None, None) if key is None else jax.random.split(key)
    if tokens is None:
        tokens = encode_window(
            params, config, observation, timestep_mask=timestep_mask, reset=reset
        )
    tokens = tokens._replace(tokens=jnp.asarray(tokens.tokens, jnp.float32))  # cached in half
    _, features = decoders.run_trunk(
        params["decoder"],
        config.decoder,
        tokens.tokens,
        timestep_mask=timestep_mask,
        token_mask=tokens.mask,
        reset=reset,
        key=trunk_key if config.decoder.dropout else None,
    )
    prediction = decoders.predict(
        params["decoder"],
        config.decoder,
        features,
        timestep_mask=timestep_mask,
        reset=reset,
        targets=targets,
        key=head_key,
    )
    return PolicyOutputs(tokens, features, prediction)


def init_stream(
    params: Params,
    config: PolicyConfig,
    batch_size: int,
    *,
    mode: Mode = "refresh",
    window_size: int | None = None,
) -> StreamState | WindowStream:
    """Returns the state before the first step; see `decoders.init_stream`."""
    decoder = decoders.init_stream(
        params["decoder"], config.decoder, batch_size, mode=mode, window_size=window_size
    )
    backbone = config.backbone
    member = registry.get(backbone)
    history = member.history(backbone)
    if history is None:
        return decoder
    size = window_size or config.decoder.window_size
    past = window_history.init(member, history, params["backbone"], backbone, batch_size, size)
    return WindowStream(past, decoder)


def prepare_params(
    params: Params,
    config: PolicyConfig,
    batch_size: int,
    *,
    mode: Mode = "refresh",
    window_size: int | None = None,
) -> Params:
    """Returns params stored for fast single steps; see `decoders.prepare_params`."""
    prepared = decoders.prepare_params(
        params["decoder"], config.decoder, batch_size, mode=mode, window_size=window_size
    )
    return {**params, "decoder": prepared}


def step(
    params: Params,
    config: PolicyConfig,
    state: Any,
    observation: Observation,
    *,
    reset: Array | None = None,
) -> tuple[Any, ActionChunk]:
    """Advances one time step.

    Args:
      params: from `init` or `prepare_params`.
      config: the one given to `init`.
      state: from `init_stream` or the previous step.
      observation: `[B, ...]`.
      reset: `[B]`, True where a new episode starts with this observation.

    Returns:
      The next state, and chunks `[B, K, …]`.
    """
    backbone = config.backbone
    history = registry.get(backbone).history(backbone)
    if history is None:
        return _decode(params, config, state, encode(params, config, observation), reset)
    past, tokens = window_history.step(
        history, params["backbone"], backbone, state.past, observation, reset
    )
    decoder, chunk = _decode(params, config, state.decoder, tokens, reset)
    return WindowStream(past, decoder), chunk


def _keep_real(observation: Observation, timestep_mask: Array) -> Observation:
    """Returns the observation `[B, W, ...]` with zeros for the real numbers of masked steps."""
    return jax.tree.map(
        lambda part: (
            bptt.keep_real(part, timestep_mask)
            if jnp.issubdtype(part.dtype, jnp.floating)
            else part
        ),
        observation,
    )


def _decode(
    params: Params, config: PolicyConfig, state: StreamState, tokens: Tokens, reset: Array | None
) -> tuple[StreamState, ActionChunk]:
    return decoders.step(
        params["decoder"],
        config.decoder,
        state,
        tokens.tokens,
        token_mask=tokens.mask,
        reset=reset,
    )
