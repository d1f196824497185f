"""The continuous head: one MLP for the arm (tanh), one for the gripper's logit.

Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), its policy heads.
"""

import chex
import jax
import jax.numpy as jnp
import optax

from vla_jax.nn.layers import MLP_SHARDING, apply_mlp, init_mlp
from vla_jax.policies.decoder_fields import DecoderFields
from vla_jax.policies.head import (
    Head,
    PredictionKind,
    TeacherForcing,
    bound_arm,
    make_step,
    no_stream,
)
from vla_jax.types import ActionChunk, Array, Key, Params


def check(config: DecoderFields) -> None:
    """Accepts every config."""
    del config


def init(key: Key, config: DecoderFields) -> Params:
    """Returns `{"arm": mlp, "gripper": mlp}`; `key` is consumed."""
    arm_key, gripper_key = jax.random.split(key)
    sizes, horizon = (config.hidden_size, *config.head_sizes), config.action_horizon
    return {
        "arm": init_mlp(arm_key, (*sizes, horizon * (config.action_dim - 1))),
        "gripper": init_mlp(gripper_key, (*sizes, horizon)),
    }


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
    """Returns the next K actions at every step.

    Args:
      params: from `init`.
      config: of the decoder.
      features: `[..., H]`.
      timestep_mask: unused, as are the following: each step is predicted independently.
      reset: unused.
      targets: unused.
      key: unused.

    Returns:
      Arm `[..., K, A-1]` in (-1, 1), gripper logit `[..., K]`, float32.
    """
    del timestep_mask, reset, targets, key
    arm = bound_arm(apply_mlp(params["arm"], features, dtype=config.dtype))
    arm = arm.reshape(*arm.shape[:-1], config.action_horizon, -1)
    return ActionChunk(arm, apply_mlp(params["gripper"], features, dtype=config.dtype))


def _errors(chunk: ActionChunk, target: jax.Array) -> dict[str, jax.Array]:
    chex.assert_shape(chunk.arm, (*target.shape[:-1], target.shape[-1] - 1))
    chex.assert_shape(chunk.gripper_logit, target.shape[:-1])
    is_open = (target[..., -1] > 0).astype(jnp.float32)
    return {
        "arm": optax.losses.huber_loss(chunk.arm, target[..., :-1], delta=1.0),
        "gripper": optax.losses.sigmoid_binary_cross_entropy(chunk.gripper_logit, is_open),
    }


CONTINUOUS = Head(
    takes_targets=False,
    draws_noise=False,
    is_bounded=True,
    check=check,
    init=init,
    apply=apply,
    init_stream=no_stream,
    step=make_step(apply),
    sharding_rules=MLP_SHARDING,
)
ACTION_CHUNK = PredictionKind(actions=lambda chunk: chunk, errors=_errors)
