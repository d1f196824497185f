"""An action chunk, one action after the other: the decoder of an encoder-decoder.

The trunk has read the window: its features are what `seq2seq` calls the source. At every step t
of it a recurrence of its own writes the K actions that follow, each told the one before, and each
looks at the features up to t for what it needs:

    h₀ = tanh(W featuresₜ + b)      hₖ = cell(hₖ₋₁, embed(actionₖ₋₁))
    contextₖ = attention(hₖ, features up to t)      outputₖ = U tanh(V [hₖ; contextₖ])

The arm is tanh of an output, its last number is the gripper's logit. What the next action is told
of the gripper is +1 or −1, as demonstrations have it and as it is sent, not the logit.

In training the action before is the demonstrator's (teacher forcing), or now and then the
writer's own (scheduled sampling); in acting it is always its own.

Source: the attention of Luong et al. 2015 (arXiv:1508.04025), the sampling of Bengio et al. 2015
(arXiv:1506.03099).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from vla_jax.nn import attention, layers, recurrence, scheduled_sampling, seq2seq
from vla_jax.nn.layers import dense
from vla_jax.nn.recurrence import Carry
from vla_jax.nn.seq2seq import Decoded, Memory, Seq2SeqConfig
from vla_jax.types import ActionChunk, Array, Key, Params


class Told(NamedTuple):
    """What a writer is told of the true actions, while it learns."""

    action: Array  # [B, W, K, A], arm in [-1, 1], gripper +1 open / -1 closed
    action_mask: Array  # [B, W, K] bool, True where the action exists; the others may be anything
    rate: Array | None = None  # [] probability that an action is told; None = always, and at once


def init(key: Key, config: Seq2SeqConfig) -> Params:
    """Returns the decoder's share of `seq2seq.init`, and `"bridge"` to its first carry.

    Args:
      key: consumed.
      config: of one layer, from vectors of H features to vectors of A.
    """
    decoder_key, bridge_key = jax.random.split(key)
    whole = seq2seq.init(decoder_key, config)
    params = {name: part for name, part in whole.items() if name not in ("source", "encoder")}
    parts = _zero_carry(config, jnp.zeros((1, 1)))["layers_0"]["forward"]._fields
    size = config.hidden_size
    params["bridge"] = {
        name: layers.init_dense(part_key, size, size)
        for name, part_key in zip(parts, jax.random.split(bridge_key, len(parts)), strict=True)
    }
    return params


def apply(
    params: Params,
    config: Seq2SeqConfig,
    features: Array,
    seen: Array,
    visible: Array,
    action_horizon: int,
    *,
    told: Told | None = None,
    key: Key | None = None,
) -> tuple[ActionChunk, jax.Array | None]:
    """Returns the chunks that are written at some steps, and where each action looked.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      features: of the steps that are written at, `[B, W, H]`.
      seen: features of the steps that can be looked at, `[B, S, H]`.
      visible: `[B, W, S]`, True where the one may look at the other.
      action_horizon: K, actions of a chunk.
      told: the true actions; None means that the writer is told its own, as in acting.
      key: consumed, for dropout and, with `told.rate`, for what is told; None means no dropout.

    Returns:
      Arm `[B, W, K, A-1]` in (-1, 1), gripper logit `[B, W, K]`, float32; and weights
      `[B, W, K, S]`, None without attention.

    Raises:
      ValueError: there is a rate but no key.
    """
    B, W = features.shape[:2]
    chex.assert_shape(visible, (B, W, seen.shape[1]))
    memory = _remember(params, config, features, seen, visible)
    decoded = _write(params, config, memory, action_horizon, told, key)
    # Each step of each window is a row of its own to the writer.
    decoded = jax.tree.map(lambda part: part.reshape(B, W, *part.shape[1:]), decoded)
    arm = jnp.tanh(decoded.outputs[..., :-1])
    return ActionChunk(arm, decoded.outputs[..., -1]), decoded.weights


def sent(outputs: Array, key: Key | None = None) -> jax.Array:
    """Returns the actions `[..., A]` of outputs: what the next one is told; no gradient of ±1."""
    del key
    arm, gripper_logit = outputs[..., :-1], outputs[..., -1:]
    return jnp.concatenate([jnp.tanh(arm), jnp.where(gripper_logit > 0, 1.0, -1.0)], axis=-1)


def _write(
    params: Params,
    config: Seq2SeqConfig,
    memory: Memory,
    action_horizon: int,
    told: Told | None,
    key: Key | None,
) -> Decoded:
    if told is None:
        return scheduled_sampling.free_running(
            params, config, memory, action_horizon, choose=sent, key=key
        )[0]
    # The selection comes first: what is not real may be NaN, and its gradient would be.
    action = jnp.where(jnp.asarray(told.action_mask)[..., None], told.action, 0.0)
    action = action.reshape(-1, *action.shape[2:])
    chex.assert_axis_dimension(action, 1, action_horizon)
    if told.rate is None:
        return seq2seq.teacher_forcing(params, config, memory, action, key=key)
    if key is None:
        raise ValueError("key must be given where told.rate is, got None; give one, or no rate.")
    return scheduled_sampling.scheduled_sampling(
        params, config, memory, action, told.rate, key, choose=sent
    )


def _remember(
    params: Params, config: Seq2SeqConfig, features: Array, seen: Array, visible: Array
) -> Memory:
    """Returns the memory of B·W rows, W of which look at the same source."""
    rows, visible = jnp.reshape(features, (-1, features.shape[-1])), jnp.asarray(visible)
    carry = _zero_carry(config, rows)
    for name, part in params["bridge"].items():
        first = jnp.tanh(dense(rows, **part, dtype=config.dtype))
        carry["layers_0"]["forward"] = carry["layers_0"]["forward"]._replace(**{name: first})
    if config.score == "none":
        return Memory(carry, None)
    # What no step may look at may be NaN, and a weight of 0 would not silence it.
    source = attention.prepare(
        params["attention"], seq2seq.attention_config(config), seen, mask=visible.any(axis=1)
    )
    return Memory(carry, source._replace(mask=visible.reshape(-1, visible.shape[-1])))


def _zero_carry(config: Seq2SeqConfig, like: Array) -> Carry:
    return recurrence.zero_carry(seq2seq.decoder_config(config), like)
