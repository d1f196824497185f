"""The autoregressive head: decodes the actions of a chunk one by one, as an encoder-decoder.

The trunk's features of the window are the source of `nn.seq2seq`. At every step t a second
recurrence decodes the K actions that follow. Each takes the previous action as input and
attends to the features up to t:

    h₀ = tanh(W featuresₜ + b)      hₖ = cell(hₖ₋₁, embed(actionₖ₋₁))
    contextₖ = attention(hₖ, features up to t)      outputₖ = U tanh(V [hₖ; contextₖ])

The arm is tanh of the first A − 1 outputs; the last output is the gripper's logit. The gripper is
fed back as +1 or −1, as in the demonstrations, not as a logit.

In training the previous action is the demonstrator's (teacher forcing) or, with some probability,
the head's own (scheduled sampling); when acting it is always the head's own.

Streaming keeps the features of the last steps in a ring buffer (attention does not depend on their
order) for as many steps as the head attended to in training, or for the window if that is shorter.
In mode "refresh" each of the W memories has its own features, so the buffer is W times as large.

Source: attention of Luong et al. 2015 (arXiv:1508.04025), scheduled sampling of Bengio et al. 2015
(arXiv:1506.03099).
"""

from typing import NamedTuple, cast

import chex
import jax
import jax.numpy as jnp

from vla_jax.nn import attention, layers, recurrence, scheduled_sampling, seq2seq
from vla_jax.nn.cells import CELLS, CellName
from vla_jax.nn.layers import dense
from vla_jax.nn.recurrence import Carry
from vla_jax.nn.seq2seq import Decoded, Memory, Seq2SeqConfig
from vla_jax.policies.decoder_fields import DecoderFields
from vla_jax.policies.head import Head, TeacherForcing, bound_arm
from vla_jax.policies.trunk import Mode, StepFeatures
from vla_jax.types import ActionChunk, Array, Key, Params


class FeatureBuffer(NamedTuple):
    """Ring buffer of the features of the last S steps, of each of the trunk's C memories."""

    features: jax.Array  # [B, S, C, H] float32


def seq2seq_config(config: DecoderFields) -> Seq2SeqConfig:
    """Returns the config of the action decoder: one layer of the trunk's cell, H wide."""
    size = config.hidden_size
    return Seq2SeqConfig(
        source="vectors",
        source_size=size,
        target="vectors",
        target_size=config.action_dim,
        embed_size=size,
        cell=cast(CellName, config.kind),
        hidden_size=size,
        bidirectional=False,
        score=config.score,
        score_size=size,
        dropout=config.dropout,
        dtype=config.dtype,
    )


def check(config: DecoderFields) -> None:
    """Raises a ValueError unless the trunk is a recurrent cell, which the head uses too."""
    usable = [name for name, cell in CELLS.items() if cell.has_vector_carry]
    if config.kind not in usable:
        raise ValueError(
            f"kind must be one of {', '.join(usable)} with head 'autoregressive', which uses the "
            f"trunk's cell, got '{config.kind}'; choose one of them, or another head."
        )


def init(key: Key, config: DecoderFields) -> Params:
    """Returns the decoder part of `seq2seq.init`, and `"bridge"`, from features to its first carry.

    Args:
      key: consumed.
      config: of the decoder.
    """
    decoder_key, bridge_key = jax.random.split(key)
    inner = seq2seq_config(config)
    all_params = seq2seq.init(decoder_key, inner)
    params = {name: part for name, part in all_params.items() if name not in ("source", "encoder")}
    parts = _zero_carry(inner, jnp.zeros((1, 1)))["layers_0"]["forward"]._fields
    size = config.hidden_size
    params["bridge"] = {
        name: layers.init_dense(part_key, size, size)
        for name, part_key in zip(parts, jax.random.split(bridge_key, len(parts)), strict=True)
    }
    return params


def apply(
    params: Params,
    config: DecoderFields,
    features: Array,
    *,
    timestep_mask: Array | None = None,
    reset: Array | None = None,
    targets: TeacherForcing | None = None,
    key: Key | None = None,
) -> ActionChunk:
    """Returns the next K actions at every step of a window.

    Args:
      params: from `init`.
      config: of the decoder.
      features: `[B, W, H]`.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.
      targets: ground-truth actions for teacher forcing; None feeds the head's own actions back.
      key: consumed, for dropout and for `targets.rate`; None disables dropout.

    Returns:
      Arm `[B, W, K, A-1]` in (-1, 1), gripper logit `[B, W, K]`, float32.

    Raises:
      ValueError: `targets` have a rate, but there is no key.
    """
    shape = features.shape[:2]
    visible = attention.causal_mask(
        jnp.ones(shape, bool) if timestep_mask is None else timestep_mask,
        jnp.zeros(shape, bool) if reset is None else reset,
        config.window_size,
    )
    return decode(params, config, features, features, visible, targets=targets, key=key)[0]


def decode(
    params: Params,
    config: DecoderFields,
    features: Array,
    source: Array,
    visible: Array,
    *,
    targets: TeacherForcing | None = None,
    key: Key | None = None,
) -> tuple[ActionChunk, jax.Array | None]:
    """Returns the chunks decoded at some steps, and the attention weights of each action.

    Args:
      params: from `init`.
      config: of the decoder.
      features: of the steps at which chunks are decoded, `[B, W, H]`.
      source: features of the steps that can be attended to, `[B, S, H]`.
      visible: `[B, W, S]`, True where a step may attend to a source step.
      targets: as for `apply`.
      key: as for `apply`.

    Returns:
      Arm `[B, W, K, A-1]` in (-1, 1), gripper logit `[B, W, K]`, float32; and weights
      `[B, W, K, S]`, None without attention.

    Raises:
      ValueError: `targets` have a rate, but there is no key.
    """
    B, W = features.shape[:2]
    chex.assert_shape(visible, (B, W, source.shape[1]))
    inner = seq2seq_config(config)
    memory = _remember(params, inner, features, source, visible)
    decoded = _decode_rows(params, inner, memory, config.action_horizon, targets, key)
    # Each step of each window is one row of the action decoder's batch.
    decoded = jax.tree.map(lambda part: part.reshape(B, W, *part.shape[1:]), decoded)
    arm = bound_arm(decoded.outputs[..., :-1])
    return ActionChunk(arm, decoded.outputs[..., -1]), decoded.weights


def to_actions(outputs: Array, key: Key | None = None) -> jax.Array:
    """Returns the actions `[..., A]` to feed back; the gripper's ±1 has no gradient.

    What follows from an output that is not finite must not be finite either.
    """
    del key
    arm, gripper_logit = outputs[..., :-1], outputs[..., -1:]
    gripper = jnp.where(gripper_logit > 0, 1.0, -1.0)
    gripper = jnp.where(jnp.isfinite(gripper_logit), gripper, jnp.nan)
    return jnp.concatenate([bound_arm(arm), gripper], axis=-1)


def _init_stream(
    config: DecoderFields, batch_size: int, num_memories: int, mode: Mode, window_size: int
) -> FeatureBuffer:
    # Mode "persistent" has no window: as many steps as the head attended to in training.
    capacity = config.window_size if mode == "persistent" else min(window_size, config.window_size)
    return FeatureBuffer(jnp.zeros((batch_size, capacity, num_memories, config.hidden_size)))


def _step(
    params: Params,
    config: DecoderFields,
    state: FeatureBuffer,
    step_features: StepFeatures,
    reset: Array,
) -> tuple[FeatureBuffer, ActionChunk]:
    del reset  # `num_previous` is 0 after it
    count, capacity = step_features.num_previous, state.features.shape[1]
    rows = jnp.arange(count.shape[0])
    buffer = state.features.at[rows, count % capacity].set(step_features.features)
    source = jnp.take_along_axis(buffer, step_features.acting[:, None, None, None], axis=2)[:, :, 0]
    visible = jnp.arange(capacity)[None] <= count[:, None]
    features = source[rows, count % capacity]
    chunk, _ = decode(params, config, features[:, None], source, visible[:, None])
    return FeatureBuffer(buffer), jax.tree.map(lambda leaf: leaf[:, 0], chunk)


def _decode_rows(
    params: Params,
    config: Seq2SeqConfig,
    memory: Memory,
    action_horizon: int,
    targets: TeacherForcing | None,
    key: Key | None,
) -> Decoded:
    if targets is None:
        return scheduled_sampling.free_running(
            params, config, memory, action_horizon, choose=to_actions, key=key
        )[0]
    # Replaced by 0: missing targets may be NaN, which would make the gradient NaN.
    action = jnp.where(jnp.asarray(targets.action_mask)[..., None], targets.action, 0.0)
    action = action.reshape(-1, *action.shape[2:])
    chex.assert_axis_dimension(action, 1, action_horizon)
    if targets.rate is None:
        return seq2seq.teacher_forcing(params, config, memory, action, key=key)
    if key is None:
        raise ValueError(
            "key must be given with targets.rate, got None; give a key, or leave out the rate."
        )
    return scheduled_sampling.scheduled_sampling(
        params, config, memory, action, targets.rate, key, choose=to_actions
    )


def _remember(
    params: Params, config: Seq2SeqConfig, features: Array, source: Array, visible: Array
) -> Memory:
    """Returns the memory of B·W rows, W of which share one source."""
    rows, visible = jnp.reshape(features, (-1, features.shape[-1])), jnp.asarray(visible)
    carry = _zero_carry(config, rows)
    for name, part in params["bridge"].items():
        first = jnp.tanh(dense(rows, **part, dtype=config.dtype))
        carry["layers_0"]["forward"] = carry["layers_0"]["forward"]._replace(**{name: first})
    if config.score == "none":
        return Memory(carry, None)
    # Masked source steps may be NaN, and a weight of 0 would not remove them.
    prepared = attention.prepare(
        params["attention"], seq2seq.attention_config(config), source, mask=visible.any(axis=1)
    )
    return Memory(carry, prepared._replace(mask=visible.reshape(-1, visible.shape[-1])))


def _zero_carry(config: Seq2SeqConfig, like: Array) -> Carry:
    return recurrence.zero_carry(seq2seq.decoder_config(config), like)


AUTOREGRESSIVE = Head(
    takes_targets=True,
    draws_noise=False,
    is_bounded=True,
    check=check,
    init=init,
    apply=apply,
    init_stream=_init_stream,
    step=_step,
    sharding_rules=seq2seq.SHARDING,
)
