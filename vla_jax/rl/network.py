"""Observations to what an agent decides by: Q-values, or a policy's logits and its baseline.

An MLP, or a recurrence with an MLP before it, and one linear layer for each thing that is asked
for. Where an observation is a list of objects, one small MLP may read each of them, and the sum of
what it makes of them goes on: what is learnt of one is then known of all (Zaheer et al. 2017,
"Deep Sets", arXiv:1703.06114). Sequences are batch-major; `apply` runs a stretch of time, `step`
one step of the same. The feed-forward network has a carry too, an empty one, so that both are used
alike.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from vla_jax.config import did_you_mean
from vla_jax.nn import recurrence
from vla_jax.nn.cells import CELLS
from vla_jax.nn.layers import apply_mlp, init_mlp
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.types import Array, Key, Params

Outputs = dict[str, jax.Array]  # name of a head -> [..., E], what init was told of it


@dataclass(frozen=True)
class NetworkConfig:
    """The network behind a policy or a Q-function."""

    kind: Literal["fc", "rnn", "lstm", "gru"] = "fc"  # fc = no memory
    object_size: int = 0  # numbers of an object, where an observation is a list of such; 0 = not
    object_sizes: tuple[int, ...] = (64, 64)  # widths of the MLP that reads each object alike
    hidden_sizes: tuple[int, ...] = (64, 64)  # widths of the MLP
    memory_size: int = 64  # H, units of the recurrence, where there is one

    def __post_init__(self):
        """Checks the kind and the sizes."""
        kinds = ("fc", *CELLS)
        if self.kind not in kinds:
            raise ValueError(f"unknown kind '{self.kind}'; {did_you_mean(self.kind, kinds)}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1 or self.memory_size < 1:
            raise ValueError(
                "hidden_sizes must hold at least one width and all be >= 1, memory_size too, got "
                f"{self.hidden_sizes} and {self.memory_size}."
            )
        if self.object_size < 0 or (self.object_size and not self.object_sizes):
            raise ValueError(
                "object_size must be >= 0, and above 0 object_sizes hold at least one width, got "
                f"{self.object_size} and {self.object_sizes}."
            )


def init(
    key: Key, config: NetworkConfig, observation_shape: tuple[int, ...], heads: Mapping[str, int]
) -> Params:
    """Returns `{"object": ..., "mlp": ..., "recurrence": ..., "heads": {name: mlp of one layer}}`.

    Without objects or memory their parts are absent.

    The heads start a hundred times smaller than the layers before them, so that at first no
    action is preferred.

    Args:
      key: consumed.
      config: sizes.
      observation_shape: of one observation, `[D]` or `[h, w, c]`.
      heads: name to width.

    Raises:
      ValueError: the observation cannot be cut into objects.
    """
    object_key, mlp_key, memory_key, *head_keys = jax.random.split(key, 3 + len(heads))
    params, width = {"heads": {}}, math.prod(observation_shape)
    if config.object_size:
        _check_objects(config, width)
        sizes = (config.object_size, *config.object_sizes)
        params["object"], width = init_mlp(object_key, sizes), sizes[-1]
    params["mlp"] = init_mlp(mlp_key, (width, *config.hidden_sizes))
    width = config.hidden_sizes[-1]
    if config.kind != "fc":
        params["recurrence"] = recurrence.init(memory_key, _memory(config), width)
        width = config.memory_size
    for (name, size), head_key in zip(heads.items(), head_keys, strict=True):
        head = init_mlp(head_key, (width, size))
        params["heads"][name] = jax.tree.map(lambda leaf: 0.01 * leaf, head)
    return params


def zero_carry(config: NetworkConfig, like: Array) -> Any:
    """Returns the carry before the first step; empty where there is no memory.

    Args:
      config: sizes.
      like: any array `[B, ...]` that comes in; the carry is sharded as it is.
    """
    return {} if config.kind == "fc" else recurrence.zero_carry(_memory(config), like)


def apply(
    params: Params, config: NetworkConfig, carry: Any, observation: Array, reset: Array
) -> tuple[Any, Outputs]:
    """Returns the carry after the last step, and the heads' outputs at every step.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      carry: before the first step.
      observation: `[B, T, ...]`; uint8 counts as pictures, and is scaled to [0, 1].
      reset: `[B, T]` bool, True where an episode starts.

    Returns:
      The carry, and name of a head -> `[B, T, E]` float32.
    """
    chex.assert_equal_shape_prefix([observation, reset], 2)
    hidden = _encode(params, config, observation, 2)
    if config.kind != "fc":
        carry, hidden = recurrence.apply(
            params["recurrence"], _memory(config), hidden, reset=reset, carry=carry
        )
    return carry, _heads(params, hidden)


def step(
    params: Params, config: NetworkConfig, carry: Any, observation: Array, reset: Array
) -> tuple[Any, Outputs]:
    """Returns the next carry, and the heads' outputs of one step.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      carry: from `zero_carry` or the step before.
      observation: `[B, ...]`.
      reset: `[B]` bool, True where an episode starts.

    Returns:
      The carry, and name of a head -> `[B, E]` float32.
    """
    hidden = _encode(params, config, observation, 1)
    if config.kind != "fc":
        carry, hidden = recurrence.step(
            params["recurrence"], _memory(config), carry, hidden, reset=reset
        )
    return carry, _heads(params, hidden)


def _encode(params: Params, config: NetworkConfig, observation: Array, num_axes: int) -> jax.Array:
    """Returns the MLP's features; the first `num_axes` axes are batch and time."""
    hidden = jnp.asarray(observation).reshape(*observation.shape[:num_axes], -1)
    hidden = hidden / 255.0 if hidden.dtype == jnp.uint8 else hidden
    if config.object_size:
        objects = hidden.reshape(*hidden.shape[:-1], -1, config.object_size)
        hidden = jnp.sum(jax.nn.relu(apply_mlp(params["object"], objects)), axis=-2)
    return jax.nn.relu(apply_mlp(params["mlp"], hidden))


def _check_objects(config: NetworkConfig, width: int) -> None:
    if width % config.object_size:
        raise ValueError(
            f"object_size must divide the {width} numbers of an observation, got "
            f"{config.object_size}; 0 reads them as a whole."
        )


def _heads(params: Params, hidden: jax.Array) -> Outputs:
    return {name: apply_mlp(head, hidden) for name, head in params["heads"].items()}


def _memory(config: NetworkConfig) -> RecurrenceConfig:
    assert config.kind != "fc"  # it has none
    return RecurrenceConfig(cell=config.kind, hidden_size=config.memory_size)
