"""Interface of a trunk: pooled tokens of each step in, features for the action head out."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.recurrence import Carry
from vla_jax.policies.decoder_fields import DecoderFields
from vla_jax.types import Array, Params, ShardingRules

Mode = Literal["refresh", "periodic", "persistent"]


class StepFeatures(NamedTuple):
    """Features of one streamed step, for each of the trunk's C parallel memories.

    A recurrent trunk in mode "refresh" advances C memories that started at different steps; the
    acting memory is the one that has seen the last W steps, or a shorter episode so far. Otherwise
    C = 1.
    """

    features: jax.Array  # [B, C, H] float32, of each memory
    acting: jax.Array  # [B] int32 in [0, C), the memory whose features the heads use
    num_previous: jax.Array  # [B] int32, steps that the acting memory has seen before this one


class Trunk(NamedTuple):
    """Member of the family of trunks; `pooled` are the pooled tokens `[..., D']` of a step."""

    params_name: str  # name of its subtree in the decoder's params
    has_memory: bool  # True if the features of a step depend on earlier steps
    modes: tuple[Mode, ...]  # streaming modes that it supports
    check: Callable[[DecoderFields], None]  # raises a ValueError for an unsupported config
    init: Callable[[jax.Array, DecoderFields], Params]  # (key, config) -> its subtrees of params
    # (params, config, pooled [B, W, D'], *, mask, reset, carry, key) -> (carry, features [B, W, H])
    apply: Callable[..., tuple[Carry, jax.Array]]
    # (mode, window_size) -> C, number of parallel memories in streaming
    num_memories: Callable[[Mode, int], int]
    # (config, batch_size, mode, window_size) -> state, every leaf with a leading axis B
    init_stream: Callable[[DecoderFields, int, Mode, int], Any]
    # (params, config, state, pooled [B, D'], reset [B]) -> (state, features of this step)
    step: Callable[[Params, DecoderFields, Any, Array, Array], tuple[Any, StepFeatures]]
    # (params, config, num_memories C, batch_size) -> params stored for fast single steps
    prepare: Callable[[Params, DecoderFields, int, int], Params]
    sharding_rules: ShardingRules = ()  # by globs of paths in its subtrees; () = replicated
    is_transformer: bool = False  # True if a step attends to earlier ones; trains at lower rates


def one_memory(mode: Mode, window_size: int) -> int:
    """Returns 1: the default `Trunk.num_memories`."""
    del mode, window_size
    return 1


def no_preparation(
    params: Params, config: DecoderFields, num_memories: int, batch_size: int
) -> Params:
    """Returns the params unchanged: the default `Trunk.prepare`."""
    del config, num_memories, batch_size
    return params


def acting_features(step_features: StepFeatures) -> jax.Array:
    """Returns the features `[B, H]` of the acting memory."""
    index = step_features.acting[:, None, None]
    return jnp.take_along_axis(step_features.features, index, axis=1)[:, 0]
