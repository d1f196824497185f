"""The discrete head: one MLP for a distribution over bins of each action dimension."""

import chex
import jax
import jax.numpy as jnp
import optax

from vla_jax.actions import bins
from vla_jax.nn.layers import MLP_SHARDING, apply_mlp, init_mlp
from vla_jax.policies import continuous_head
from vla_jax.policies.decoder_fields import DecoderFields
from vla_jax.policies.head import Head, PredictionKind, TeacherForcing, make_step, no_stream
from vla_jax.types import ActionChunk, Array, BinChunk, Key, Params


def init(key: Key, config: DecoderFields) -> Params:
    """Returns `{"bins": mlp}`; `key` is consumed."""
    size = config.action_horizon * config.action_dim * config.num_bins
    return {"bins": init_mlp(key, (config.hidden_size, *config.head_sizes, size))}


def apply(
    params: Params,
    config: DecoderFields,
    features: Array,
    *,
    timestep_mask: Array | None = None,
    reset: Array | None = None,
    targets: TeacherForcing | None = None,
    key: Key | None = None,
) -> BinChunk:
    """Returns the logits of the bins of the next K actions at every step.

    Args:
      params: from `init`.
      config: of the decoder.
      features: `[..., H]`.
      timestep_mask: unused, as are the following: each step is predicted independently.
      reset: unused.
      targets: unused.
      key: unused.

    Returns:
      Logits `[..., K, A, V]` float32.
    """
    del timestep_mask, reset, targets, key
    logits = apply_mlp(params["bins"], features, dtype=config.dtype)
    shape = (*logits.shape[:-1], config.action_horizon, -1, config.num_bins)
    return BinChunk(logits.reshape(shape))


def _actions(chunk: BinChunk) -> ActionChunk:
    """Returns the centre of the most probable bin, and the gripper's logit.

        gripper_logit = log P(bins above 0) − log P(bins below 0)

    A number one of whose logits is not finite is NaN: the argmax of NaN is a valid bin.
    """
    logits = jnp.asarray(chunk.logits, jnp.float32)
    num_bins, gripper = logits.shape[-1], logits[..., -1, :]
    arm = bins.decode(jnp.argmax(logits[..., :-1, :], axis=-1), num_bins)
    # Of an odd number of bins the middle one is centred on 0 and counts for neither side.
    below, above = gripper[..., : (num_bins - 1) // 2], gripper[..., num_bins // 2 :]
    logit = jax.nn.logsumexp(above, axis=-1) - jax.nn.logsumexp(below, axis=-1)
    is_finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return ActionChunk(
        jnp.where(is_finite[..., :-1], arm, jnp.nan), jnp.where(is_finite[..., -1], logit, jnp.nan)
    )


def _errors(chunk: BinChunk, target: jax.Array) -> dict[str, jax.Array]:
    chex.assert_shape(chunk.logits, (*target.shape, None))
    target_bins = bins.encode(target, chunk.logits.shape[-1])
    argmax = jnp.argmax(chunk.logits[..., :-1, :], axis=-1)
    return {
        "bins": optax.losses.softmax_cross_entropy_with_integer_labels(chunk.logits, target_bins),
        "acc_arm": argmax == target_bins[..., :-1],
    }


DISCRETE = Head(
    takes_targets=False,
    draws_noise=False,
    is_bounded=True,
    check=continuous_head.check,
    init=init,
    apply=apply,
    init_stream=no_stream,
    step=make_step(apply),
    sharding_rules=MLP_SHARDING,
)
BIN_CHUNK = PredictionKind(actions=_actions, errors=_errors)
