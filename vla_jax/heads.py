"""Features to actions: one MLP for the arm, one for the gripper.

An MLP is `{"layers_0": {"kernel" [D, E], "bias" [E]}, ...}`: ReLU between the layers, none after
the last.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vla_jax.cells import affine
from vla_jax.types import ActionChunk, Array, Key, Params


def init(
    key: Key,
    input_size: int,
    action_horizon: int,
    action_dim: int = 7,
    hidden_sizes: Sequence[int] = (1024, 512, 256),
) -> Params:
    """Returns `{"arm": mlp, "gripper": mlp}`.

    Args:
      key: consumed.
      input_size: features that come in.
      action_horizon: K, actions of a chunk.
      action_dim: A, the last of which is the gripper.
      hidden_sizes: widths of the hidden layers of both MLPs.
    """
    arm_key, gripper_key = jax.random.split(key)
    arm_size = action_horizon * (action_dim - 1)
    return {
        "arm": init_mlp(arm_key, (input_size, *hidden_sizes, arm_size)),
        "gripper": init_mlp(gripper_key, (input_size, *hidden_sizes, action_horizon)),
    }


def apply(
    params: Params, features: Array, action_horizon: int, *, dtype: str = "float32"
) -> ActionChunk:
    """Returns the next K actions.

    Args:
      params: from `init`.
      features: `[..., H]`.
      action_horizon: K, as `init` was given it.
      dtype: of the factors of the products.

    Returns:
      Arm `[..., K, A-1]` in (-1, 1), gripper logit `[..., K]`, float32.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), its policy heads.
    """
    arm = jnp.tanh(apply_mlp(params["arm"], features, dtype=dtype))
    arm = arm.reshape(*arm.shape[:-1], action_horizon, -1)
    return ActionChunk(arm, apply_mlp(params["gripper"], features, dtype=dtype))


def init_mlp(key: Key, sizes: Sequence[int]) -> Params:
    """Returns kernels drawn from U(−√(6/(D+E)), √(6/(D+E))) (Xavier) and zero biases.

    Args:
      key: consumed.
      sizes: features that come in, then the width of every layer.
    """
    params = {}
    for layer, layer_key in enumerate(jax.random.split(key, len(sizes) - 1)):
        shape = (sizes[layer], sizes[layer + 1])
        bound = math.sqrt(6.0 / sum(shape))
        kernel = jax.random.uniform(layer_key, shape, jnp.float32, -bound, bound)
        params[f"layers_{layer}"] = {"kernel": kernel, "bias": jnp.zeros(shape[1:])}
    return params


def apply_mlp(params: Params, inputs: Array, *, dtype: str = "float32") -> jax.Array:
    """Returns what the last layer gives, without ReLU.

    Args:
      params: from `init_mlp`.
      inputs: `[..., D]`.
      dtype: of the factors of the products.

    Returns:
      `[..., E]` float32.
    """
    outputs = jnp.asarray(inputs)
    for layer in range(len(params)):
        outputs = jax.nn.relu(outputs) if layer > 0 else outputs
        kernel, bias = params[f"layers_{layer}"]["kernel"], params[f"layers_{layer}"]["bias"]
        outputs = affine(outputs, kernel, bias, dtype=dtype)
    return outputs
