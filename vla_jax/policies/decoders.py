"""A decoder turns tokens into action chunks: pooling, a trunk, a head.

    tokens [B, W, N, D] → pool → [B, W, D'] → trunk → [B, W, H] → head → Prediction

The trunk is a recurrence of any cell ("lstm", "gru", "rnn", …), a transformer over the window
("gpt"), over episodes ("rotary_gpt") or over segments with memory tokens ("memory_gpt"), or an MLP
without memory, the baseline ("fc"). `apply` predicts at every position of a window; `step` predicts
the same chunks one step at a time:

- mode "refresh": every chunk is that of the last W steps, as in training and in RoboVLMs;
- mode "periodic": memory is cleared every W steps, so that it spans 1 … W steps;
- mode "persistent": memory is cleared by `reset` alone and spans the whole episode.

While an episode is not longer than W steps all three are the same. Every array of a streaming state
has a leading axis B, and every row has its own age, so the robots of a batch may start episodes
at any step. A state may be donated to `step`.
"""

import math
from typing import Any, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from vla_jax import trees
from vla_jax.config import did_you_mean
from vla_jax.nn import bptt, pooling
from vla_jax.nn.recurrence import Carry
from vla_jax.policies import heads, trunks
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.decoder_fields import least_tokens
from vla_jax.policies.head import TeacherForcing
from vla_jax.policies.trunk import Mode
from vla_jax.types import ActionChunk, Array, Key, Params, Prediction, ShardingRules


class StreamState(NamedTuple):
    """Streaming state; every leaf has a leading axis B."""

    trunk: Any  # state of the trunk; its type depends on kind and mode
    head: Any  # state of the head; empty if the head uses the current step only


def init(key: Key, config: DecoderConfig) -> Params:
    """Returns the trunk's params, `"heads"`, and `"pooling"` where it has params.

    The trunk's are `"recurrence"`, `"mlp"` (fc), `"transformer"` (gpt), `"rotary_transformer"` or
    `"memory_transformer"`, the last three with `"projection"` where a pooled step does not have H
    features.

    Args:
      key: consumed.
      config: trunk, head and sizes.
    """
    pooling_key, trunk_key, heads_key = jax.random.split(key, 3)
    params: Params = {
        **trunks.get(config.kind).init(trunk_key, config),
        "heads": heads.HEADS[config.head].init(heads_key, config),
    }
    pooling_params = pooling.init(pooling_key, config.pooling, config.num_latents, config.token_dim)
    return {**params, "pooling": pooling_params} if pooling_params else params


def sharding_rules(config: DecoderConfig) -> ShardingRules:
    """Returns how the params are split over a mesh of devices: rules of the trunk and the head."""
    trunk, head = trunks.get(config.kind), heads.HEADS[config.head]
    return (*trunk.sharding_rules, *trees.under("heads", head.sharding_rules))


def apply(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    *,
    timestep_mask: Array | None = None,
    token_mask: Array | None = None,
    reset: Array | None = None,
    carry: Carry | None = None,
    targets: TeacherForcing | None = None,
    key: Key | None = None,
) -> Prediction:
    """Returns the prediction at every position of a window.

    Args:
      params: from `init`.
      config: the one given to `init`.
      tokens: `[B, W, N, D]`; W may be any number of steps, at most the config's for "gpt". Masked
        tokens and those of masked steps may be NaN.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      token_mask: `[B, W, N]`, True where the token is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.
      carry: of the trunk before the first step; None means the start of an episode. Must be None
        for "gpt" and "rotary_gpt".
      targets: ground-truth actions for teacher forcing (heads "autoregressive" and "flow"); None
        decodes from the model's own actions, or from noise.
      key: consumed, for dropout, for `targets.rate` and for the noise of head "flow"; None disables
        dropout.

    Returns:
      Arm `[B, W, K, A-1]` in (-1, 1), gripper logit `[B, W, K]`; of head "discrete" logits
      `[B, W, K, A, V]`, of head "flow" with targets the velocity; float32. At masked steps they are
      those of zero features.

    Raises:
      ValueError: `tokens` are not `[B, W, N, D]` with the config's N and D; a carry for
        "gpt" or "rotary_gpt", or a longer window for "gpt"; targets for another head;
        `targets.rate`, or targets of head "flow", without a key.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), `LSTMDecoder`, `GPTDecoder`, `FCDecoder`.
    """
    trunk_key, head_key = (None, None) if key is None else jax.random.split(key)
    _, features = run_trunk(
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
        params,
        config,
        features,
        timestep_mask=timestep_mask,
        reset=reset,
        targets=targets,
        key=head_key,
    )


def run_trunk(
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
    """Returns the carry after the last step, and the features for the head.

    Args:
      params: from `init`.
      config: the one given to `init`.
      tokens: `[B, W, N, D]`, as for `apply`.
      timestep_mask: `[B, W]`, as for `apply`.
      token_mask: `[B, W, N]`, as for `apply`.
      reset: `[B, W]`, as for `apply`.
      carry: as for `apply`.
      key: consumed, for dropout; None disables dropout.

    Returns:
      The carry (an empty dict for "fc", "gpt" and "rotary_gpt"), and features `[B, W, H]`,
      float32, zeros at masked steps.

    Raises:
      ValueError: `tokens` are not `[B, W, N, D]` with the config's N and D; a carry for
        "gpt" or "rotary_gpt", or a longer window for "gpt".
    """
    check_tokens(config, tokens, "[B, W, N, D]")
    if timestep_mask is not None:
        chex.assert_shape(timestep_mask, tokens.shape[:2])
    pooled = pool(params, config, tokens, _real_tokens(tokens, timestep_mask, token_mask))
    return trunks.get(config.kind).apply(
        params, config, pooled, mask=timestep_mask, reset=reset, carry=carry, key=key
    )


def predict(
    params: Params,
    config: DecoderConfig,
    features: Array,
    *,
    timestep_mask: Array | None = None,
    reset: Array | None = None,
    targets: TeacherForcing | None = None,
    key: Key | None = None,
) -> Prediction:
    """Returns the head's prediction from the features of a window.

    Args:
      params: from `init`.
      config: the one given to `init`.
      features: `[B, W, H]` from `run_trunk`; `[..., H]` for heads "continuous" and
        "discrete", which do not use the arguments after `timestep_mask`. Those of masked steps may
        be NaN.
      timestep_mask: `[B, W]`, as for `apply`.
      reset: `[B, W]`, as for `apply`.
      targets: as for `apply`.
      key: consumed, as for `apply`.

    Raises:
      ValueError: targets for a head that does not take any; `targets.rate`, or targets of head
        "flow", without a key.
    """
    head = heads.HEADS[config.head]
    if targets is not None and not head.takes_targets:
        raise ValueError(
            f"targets must be None for head '{config.head}', which has no actions as input, got "
            "actions; leave them out, or choose head 'autoregressive' or 'flow'."
        )
    return head.apply(
        params["heads"],
        config,
        bptt.keep_real(features, timestep_mask),
        timestep_mask=timestep_mask,
        reset=reset,
        targets=targets,
        key=key,
    )


def init_stream(
    params: Params,
    config: DecoderConfig,
    batch_size: int,
    *,
    mode: Mode = "refresh",
    window_size: int | None = None,
) -> StreamState:
    """Returns the streaming state before the first step.

    Args:
      params: from `init`.
      config: the one given to `init`.
      batch_size: B, robots that act together.
      mode: "refresh", "periodic" or "persistent".
      window_size: W, in steps; None means the config's, which is the largest for "gpt".

    Raises:
      ValueError: an unknown mode or one that the trunk lacks, a size below 1, params of another
        kind of decoder, or a window that is too long for "gpt".
    """
    window_size = config.window_size if window_size is None else window_size
    trunk = trunks.get(config.kind)
    if trunk.params_name not in params:
        raise ValueError(
            f"params must have '{trunk.params_name}' for a decoder of kind '{config.kind}', got "
            f"{sorted(params)}; use the config they were trained with."
        )
    check_mode(config, mode)
    for name, size in (("batch_size", batch_size), ("window_size", window_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    num_memories = trunk.num_memories(mode, window_size)
    return StreamState(
        trunk.init_stream(config, batch_size, mode, window_size),
        heads.HEADS[config.head].init_stream(config, batch_size, num_memories, mode, window_size),
    )


def prepare_params(
    params: Params,
    config: DecoderConfig,
    batch_size: int,
    *,
    mode: Mode = "refresh",
    window_size: int | None = None,
) -> Params:
    """Returns params stored for fast single steps on this device; results are unchanged.

    They are for `step` only, on states of the same batch size, mode and window. Kernels are stored
    in the config's dtype, in which products read them: with bfloat16 half as many bytes. On a CPU,
    in mode "refresh" and with few rows B · W, large kernels of the recurrence are transposed once.
    `Agent.prepare` calls this.

    Args:
      params: from `init`.
      config: the one given to `init`.
      batch_size: B of the states.
      mode: of the states.
      window_size: W of the states; None means the config's.
    """
    window_size = config.window_size if window_size is None else window_size
    trunk = trunks.get(config.kind)
    num_memories = trunk.num_memories(mode, window_size)
    prepared = trunk.prepare(params, config, num_memories, batch_size)
    if config.dtype == "float32":
        return prepared
    is_kernel = trees.map_paths(lambda path: path.endswith("kernel"), prepared)
    return jax.tree.map(
        lambda leaf, stored: jnp.asarray(leaf, config.dtype) if stored else leaf,
        prepared,
        is_kernel,
    )


def step(
    params: Params,
    config: DecoderConfig,
    state: StreamState,
    tokens: Array,
    *,
    token_mask: Array | None = None,
    reset: Array | None = None,
) -> tuple[StreamState, ActionChunk]:
    """Advances one time step.

    Args:
      params: from `init` or `prepare_params`.
      config: the one given to `init`.
      state: from `init_stream` or the previous step.
      tokens: of one step, `[B, N, D]`.
      token_mask: `[B, N]`, True where the token is real; None means everywhere.
      reset: `[B]`, True where this step is the first of an episode; None means nowhere.

    Returns:
      The next state, and arm `[B, K, A-1]`, gripper logit `[B, K]`.

    Raises:
      ValueError: `tokens` are not `[B, N, D]` with the config's N and D.

    Source: mode "refresh" has the behaviour of RoboVLMs' `LSTMDecoder` and `GPTDecoder` at
    inference.
    """
    check_tokens(config, tokens, "[B, N, D]")
    reset = jnp.zeros(tokens.shape[:1], bool) if reset is None else jnp.asarray(reset)
    chex.assert_shape(reset, tokens.shape[:1])
    chex.assert_tree_shape_prefix(state, tokens.shape[:1])
    pooled = pool(params, config, tokens, token_mask)
    trunk_state, step_features = trunks.get(config.kind).step(
        params, config, state.trunk, pooled, reset
    )
    head_state, prediction = heads.HEADS[config.head].step(
        params["heads"], config, state.head, step_features, reset
    )
    return StreamState(trunk_state, head_state), heads.actions(prediction)


def check_mode(config: DecoderConfig, mode: str) -> None:
    """Raises a ValueError unless the decoder can stream in this mode."""
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode '{mode}'; {did_you_mean(mode, get_args(Mode))}")
    modes = trunks.get(config.kind).modes
    if mode not in modes:
        listed = " or ".join(f"'{name}'" for name in modes)
        raise ValueError(
            f"mode must be {listed} for a decoder of kind '{config.kind}', whose memory ends at "
            f"window_size = {config.window_size}, got '{mode}'; choose one of them."
        )


def check_tokens(config: DecoderConfig, tokens: Array, axes: str) -> None:
    """Raises a ValueError unless `tokens` have these axes, the last two as in the config.

    Args:
      config: of the decoder.
      tokens: tokens to check.
      axes: expected axes, such as "[B, W, N, D]".
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


def _real_tokens(
    tokens: Array, timestep_mask: Array | None, token_mask: Array | None
) -> Array | None:
    """Returns the mask `[B, W, N]` of the real tokens of real steps; None means everywhere."""
    if timestep_mask is None:
        return token_mask
    of_steps = jnp.broadcast_to(jnp.asarray(timestep_mask)[..., None], tokens.shape[:-1])
    return of_steps if token_mask is None else of_steps & token_mask


def pool(
    params: Params, config: DecoderConfig, tokens: Array, token_mask: Array | None = None
) -> jax.Array:
    """Returns one vector `[..., D']` per step, of `tokens [..., N, D]`; see `pooling.apply`."""
    return pooling.apply(
        params.get("pooling", {}), config.pooling, tokens, config.num_latents, mask=token_mask
    )
