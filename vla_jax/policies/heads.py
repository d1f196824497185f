"""Features to actions: one MLP for the arm, one for the gripper; or one for bins of all.

An MLP is `{"layers_0": {"kernel" [D, E], "bias" [E]}, ...}`: ReLU between the layers, none after
the last.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vla_jax.actions import bins
from vla_jax.nn.layers import apply_mlp, init_mlp
from vla_jax.types import ActionChunk, Array, BinChunk, Key, Params, Prediction


def init(
    key: Key,
    input_size: int,
    action_horizon: int,
    action_dim: int = 7,
    hidden_sizes: Sequence[int] = (1024, 512, 256),
    *,
    num_bins: int | None = None,
) -> Params:
    """Returns `{"arm": mlp, "gripper": mlp}`, or `{"bins": mlp}`.

    Args:
      key: consumed.
      input_size: features that come in.
      action_horizon: K, actions of a chunk.
      action_dim: A, the last of which is the gripper.
      hidden_sizes: widths of the hidden layers of each MLP.
      num_bins: V, bins that each of the A numbers is told in; None means numbers, not bins.
    """
    if num_bins is not None:
        size = action_horizon * action_dim * num_bins
        return {"bins": init_mlp(key, (input_size, *hidden_sizes, size))}
    arm_key, gripper_key = jax.random.split(key)
    arm_size = action_horizon * (action_dim - 1)
    return {
        "arm": init_mlp(arm_key, (input_size, *hidden_sizes, arm_size)),
        "gripper": init_mlp(gripper_key, (input_size, *hidden_sizes, action_horizon)),
    }


def apply(
    params: Params,
    features: Array,
    action_horizon: int,
    *,
    num_bins: int | None = None,
    dtype: str = "float32",
) -> Prediction:
    """Returns the next K actions, or the bins that they may lie in.

    Args:
      params: from `init`.
      features: `[..., H]`.
      action_horizon: K, as `init` was given it.
      num_bins: V, as `init` was given it.
      dtype: of the factors of the products.

    Returns:
      Arm `[..., K, A-1]` in (-1, 1), gripper logit `[..., K]`; with `num_bins` logits
      `[..., K, A, V]`; float32.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), its policy heads.
    """
    if num_bins is not None:
        logits = apply_mlp(params["bins"], features, dtype=dtype)
        return BinChunk(logits.reshape(*logits.shape[:-1], action_horizon, -1, num_bins))
    arm = jnp.tanh(apply_mlp(params["arm"], features, dtype=dtype))
    arm = arm.reshape(*arm.shape[:-1], action_horizon, -1)
    return ActionChunk(arm, apply_mlp(params["gripper"], features, dtype=dtype))


def actions(prediction: Prediction) -> ActionChunk:
    """Returns the actions of a prediction.

        arm = decode(argmax logits)
        gripper_logit = log P(bins above 0) − log P(bins below 0)

    Args:
      prediction: from `apply`; one that is an `ActionChunk` already is returned as it is.

    Returns:
      Arm `[..., K, A-1]` in (-1, 1), gripper logit `[..., K]`, float32.
    """
    if isinstance(prediction, ActionChunk):
        return prediction
    logits = jnp.asarray(prediction.logits, jnp.float32)
    num_bins, gripper = logits.shape[-1], logits[..., -1, :]
    arm = bins.decode(jnp.argmax(logits[..., :-1, :], axis=-1), num_bins)
    # Of an even number of bins the middle one lies around 0, and counts for neither side.
    below, above = gripper[..., : (num_bins - 1) // 2], gripper[..., num_bins // 2 :]
    logit = jax.nn.logsumexp(above, axis=-1) - jax.nn.logsumexp(below, axis=-1)
    return ActionChunk(arm, logit)
