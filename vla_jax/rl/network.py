"""Networks of agents: observations to Q-values, or to policy logits and a baseline.

An MLP, an optional recurrence after it, an optional second MLP over the outputs of both, and one
linear layer per head. If an observation is a list
of objects, a small MLP can encode each of them with shared weights; the sum of the encodings is
then the input of the main MLP, so that what is learnt about one object holds for all (Zaheer et
al. 2017, "Deep Sets", arXiv:1703.06114).

Sequences are batch-major; `apply` runs a whole sequence, `step` one time step of the same. The
kinds of memory are the family `MEMORIES`; without memory the carry is empty, so that all kinds are
called in the same way.
"""

import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from vla_jax.config import checked, did_you_mean
from vla_jax.nn import recurrence
from vla_jax.nn.cells import CELLS, CellName
from vla_jax.nn.chrono import spread_gates
from vla_jax.nn.layers import MLP_SHARDING, apply_mlp, init_mlp
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.trees import under
from vla_jax.types import Array, Key, Params, ShardingRules

Outputs = dict[str, jax.Array]  # name of a head -> [..., size of the head]

SHARDING: ShardingRules = (
    *under("recurrence", recurrence.SHARDING),
    *MLP_SHARDING,
)
_WIDTHS = (0, 2**16)  # of layers; wider ones are typing errors that would fill the memory


@dataclass(frozen=True)
@checked(object_sizes=_WIDTHS, hidden_sizes=_WIDTHS, joint_sizes=_WIDTHS, memory_size=_WIDTHS)
class NetworkConfig:
    """The network of a policy or of a Q-function."""

    kind: str = "fc"  # "fc" = feed-forward (no memory), or a recurrent cell: rnn, lstm, gru, …
    object_size: int = 0  # features per object in the observation; 0 = no list of objects
    object_sizes: tuple[int, ...] = (64, 64)  # layer widths of the MLP applied to each object
    hidden_sizes: tuple[int, ...] = (64, 64)  # layer widths of the main MLP
    memory_size: int = 64  # hidden units of the recurrence; ignored for kind "fc"
    # largest time constant of the recurrence's units before the first update, environment steps,
    # above 2; 0 = all units forget within a few steps, as their cell starts by default
    gate_span: int = 0
    # layer widths of an MLP after the recurrence, which also sees the recurrence's inputs
    joint_sizes: tuple[int, ...] = ()

    def __post_init__(self):
        """Checks the kind and the sizes."""
        if self.kind not in MEMORIES:
            raise ValueError(f"unknown kind '{self.kind}'; {did_you_mean(self.kind, MEMORIES)}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1 or self.memory_size < 1:
            raise ValueError(
                "hidden_sizes must hold at least one width, all widths and memory_size at least 1, "
                f"got {self.hidden_sizes} and {self.memory_size}."
            )
        if min(self.joint_sizes, default=1) < 1:
            raise ValueError(f"joint_sizes must be at least 1, got {self.joint_sizes}.")
        if self.gate_span and self.gate_span <= 2:
            raise ValueError(f"gate_span must be 0 or above 2, got {self.gate_span}.")
        if self.object_size < 0 or (self.object_size and not self.object_sizes):
            raise ValueError(
                "object_size must be at least 0, and object_sizes not empty if it is above 0, "
                f"got {self.object_size} and {self.object_sizes}."
            )


class MemoryPart(NamedTuple):
    """The part of a network between its MLP and its heads: a member of the family `MEMORIES`.

    `params` are those of the whole network.
    """

    is_recurrent: bool
    init: Callable[[Key, NetworkConfig, int], tuple[Params, int]]  # -> params, output size
    zero_carry: Callable[[NetworkConfig, Array], Any]
    # (params, config, carry, hidden [B, T, D], reset [B, T]) -> (carry, [B, T, D])
    apply: Callable[[Params, NetworkConfig, Any, jax.Array, Array], tuple[Any, jax.Array]]
    # (params, config, carry, hidden [B, D], reset [B]) -> (carry, [B, D])
    step: Callable[[Params, NetworkConfig, Any, jax.Array, Array], tuple[Any, jax.Array]]


def init(
    key: Key, config: NetworkConfig, observation_shape: tuple[int, ...], heads: Mapping[str, int]
) -> Params:
    """Returns `{"object", "mlp", "recurrence", "joint", "heads": {name: one linear layer}}`.

    "object", "recurrence" and "joint" are absent if the config has none. The initial weights of the
    heads are a hundred times smaller than those of the other layers, so that no action is
    preferred before the first update.

    Args:
      key: consumed.
      config: sizes.
      observation_shape: shape of one observation, `[D]` or `[h, w, c]`.
      heads: name to output size.

    Raises:
      ValueError: the size of an observation is not a multiple of `object_size`.
    """
    object_key, mlp_key, memory_key, *head_keys = jax.random.split(key, 3 + len(heads))
    params, size = {"heads": {}}, math.prod(observation_shape)
    if config.object_size:
        _check_objects(config, size)
        sizes = (config.object_size, *config.object_sizes)
        params["object"], size = init_mlp(object_key, sizes), sizes[-1]
    params["mlp"] = init_mlp(mlp_key, (size, *config.hidden_sizes))
    memory, size = MEMORIES[config.kind].init(memory_key, config, config.hidden_sizes[-1])
    params |= memory
    if config.joint_sizes:
        joint_key = jax.random.fold_in(mlp_key, 1)  # the other params stay those without it
        sizes = (config.hidden_sizes[-1] + size, *config.joint_sizes)
        params["joint"], size = init_mlp(joint_key, sizes), sizes[-1]
    for (name, head_size), head_key in zip(heads.items(), head_keys, strict=True):
        head = init_mlp(head_key, (size, head_size))
        params["heads"][name] = jax.tree.map(lambda leaf: 0.01 * leaf, head)
    return params


def zero_carry(config: NetworkConfig, like: Array) -> Any:
    """Returns the carry before the first step; empty without memory.

    Args:
      config: sizes.
      like: an array `[B, ...]` that gives the batch size and the sharding.
    """
    return MEMORIES[config.kind].zero_carry(config, like)


def apply(
    params: Params, config: NetworkConfig, carry: Any, observation: Array, reset: Array
) -> tuple[Any, Outputs]:
    """Returns the carry after the last step, and the outputs at every step.

    Args:
      params: from `init`.
      config: as passed to `init`.
      carry: before the first step.
      observation: `[B, T, ...]`; uint8 images are scaled to [0, 1].
      reset: `[B, T]` bool, True where an episode starts.

    Returns:
      The carry, and name of a head -> `[B, T, size of the head]` float32.
    """
    chex.assert_equal_shape_prefix([observation, reset], 2)
    hidden = _encode(params, config, observation, 2)
    carry, remembered = MEMORIES[config.kind].apply(params, config, carry, hidden, reset)
    return carry, _heads(params, hidden, remembered)


def step(
    params: Params, config: NetworkConfig, carry: Any, observation: Array, reset: Array
) -> tuple[Any, Outputs]:
    """Returns the next carry, and the outputs of one step.

    Args:
      params: from `init`.
      config: as passed to `init`.
      carry: from `zero_carry` or the previous step.
      observation: `[B, ...]`; uint8 images are scaled to [0, 1].
      reset: `[B]` bool, True where an episode starts.

    Returns:
      The carry, and name of a head -> `[B, size of the head]` float32.
    """
    hidden = _encode(params, config, observation, 1)
    carry, remembered = MEMORIES[config.kind].step(params, config, carry, hidden, reset)
    return carry, _heads(params, hidden, remembered)


def _encode(params: Params, config: NetworkConfig, observation: Array, num_axes: int) -> jax.Array:
    """Returns the features of the MLP; the first `num_axes` axes are batch and time."""
    hidden = jnp.asarray(observation).reshape(*observation.shape[:num_axes], -1)
    hidden = hidden / 255.0 if hidden.dtype == jnp.uint8 else hidden
    if config.object_size:
        objects = hidden.reshape(*hidden.shape[:-1], -1, config.object_size)
        hidden = jnp.sum(jax.nn.relu(apply_mlp(params["object"], objects)), axis=-2)
    return jax.nn.relu(apply_mlp(params["mlp"], hidden))


def _check_objects(config: NetworkConfig, size: int) -> None:
    if size % config.object_size:
        raise ValueError(
            f"object_size must divide the {size} numbers of an observation, got "
            f"{config.object_size}; use 0 for observations that are not a list of objects."
        )


def _heads(params: Params, hidden: jax.Array, remembered: jax.Array) -> Outputs:
    if "joint" in params:
        both = jnp.concatenate([hidden, remembered], axis=-1)
        remembered = jax.nn.relu(apply_mlp(params["joint"], both))
    return {name: apply_mlp(head, remembered) for name, head in params["heads"].items()}


def _recurrence(config: NetworkConfig) -> RecurrenceConfig:
    return RecurrenceConfig(typing.cast(CellName, config.kind), hidden_size=config.memory_size)


def _init_recurrence(key: Key, config: NetworkConfig, input_size: int) -> tuple[Params, int]:
    params = recurrence.init(key, _recurrence(config), input_size)
    if config.gate_span:
        spread_key = jax.random.fold_in(key, 1)  # the other params stay those without a span
        cell = typing.cast(CellName, config.kind)
        spread = spread_gates(spread_key, cell, recurrence.layer(params), config.gate_span)
        params = recurrence.from_layer(spread)
    return {"recurrence": params}, config.memory_size


def _apply_recurrence(
    params: Params, config: NetworkConfig, carry: Any, hidden: jax.Array, reset: Array
) -> tuple[Any, jax.Array]:
    return recurrence.apply(
        params["recurrence"], _recurrence(config), hidden, reset=reset, carry=carry
    )


def _step_recurrence(
    params: Params, config: NetworkConfig, carry: Any, hidden: jax.Array, reset: Array
) -> tuple[Any, jax.Array]:
    return recurrence.step(params["recurrence"], _recurrence(config), carry, hidden, reset=reset)


def _pass_through(
    params: Params, config: NetworkConfig, carry: Any, hidden: jax.Array, reset: Array
) -> tuple[Any, jax.Array]:
    del params, config, reset
    return carry, hidden


_FEED_FORWARD = MemoryPart(
    is_recurrent=False,
    init=lambda key, config, input_size: ({}, input_size),
    zero_carry=lambda config, like: {},
    apply=_pass_through,
    step=_pass_through,
)
_RECURRENT = MemoryPart(
    is_recurrent=True,
    init=_init_recurrence,
    zero_carry=lambda config, like: recurrence.zero_carry(_recurrence(config), like),
    apply=_apply_recurrence,
    step=_step_recurrence,
)
MEMORIES = {"fc": _FEED_FORWARD, **dict.fromkeys(CELLS, _RECURRENT)}
