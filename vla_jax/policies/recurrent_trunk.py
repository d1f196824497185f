"""The recurrent trunk: any cell of `nn.cells`, over a window or one step at a time.

Streaming advances C carries per row of the batch. With `age` = steps since the episode began,

    carry c is zeroed where age mod period = c
    acting carry = 0 while age < C, then (age + 1) mod C

- "refresh": C = period = W. Every output is that of the last W steps from a zero carry, as in
  training and in RoboVLMs: W carries, each started one step after the one before, advance as one
  batch. That is one sequential step, where running the window again would take W.
- "periodic": C = 1, period = W. The carry is zeroed every W steps: memory of 1 … W steps.
- "persistent": C = 1, infinite period. Memory of the whole episode.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from vla_jax.nn import residual_blocks
from vla_jax.nn.cells import CellName
from vla_jax.nn.recurrence import Carry, RecurrenceConfig
from vla_jax.nn.residual_blocks import StackConfig
from vla_jax.policies.decoder_fields import DecoderFields, pooled_size
from vla_jax.policies.trunk import Mode, StepFeatures, Trunk
from vla_jax.trees import under
from vla_jax.types import Array, Key, Params

_INFINITE = jnp.iinfo(jnp.int32).max  # steps; longer than any episode


class RecurrentState(NamedTuple):
    """C carries, and when each is zeroed."""

    carry: Carry  # leaves [B, C, ...]
    age: jax.Array  # [B] int32, steps of this episode so far
    period: jax.Array  # [B] int32, steps after which a carry is zeroed


def recurrence_config(config: DecoderFields) -> RecurrenceConfig:
    """Returns the config of the recurrence."""
    return RecurrenceConfig(
        cell=cast(CellName, config.kind),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        conv_size=config.conv_size,
        dropout=config.dropout,
        remat_chunk=config.remat_chunk,
        implementation=config.implementation,
        dtype=config.dtype,
    )


def stack_config(config: DecoderFields) -> StackConfig:
    """Returns the config of the recurrence with its blocks."""
    return StackConfig(
        recurrence_config(config), config.block, config.block_expansion, config.gate_span
    )


def _check(config: DecoderFields) -> None:
    stack_config(config)  # raises


def _init(key: Key, config: DecoderFields) -> Params:
    return {"recurrence": residual_blocks.init(key, stack_config(config), pooled_size(config))}


def _apply(
    params: Params,
    config: DecoderFields,
    pooled: jax.Array,
    *,
    mask: Array | None,
    reset: Array | None,
    carry: Carry | None,
    key: Key | None,
) -> tuple[Carry, jax.Array]:
    return residual_blocks.apply(
        params["recurrence"],
        stack_config(config),
        pooled,
        mask=mask,
        reset=reset,
        carry=carry,
        key=key,
    )


def _num_memories(mode: Mode, window_size: int) -> int:
    return window_size if mode == "refresh" else 1


def _init_stream(
    config: DecoderFields, batch_size: int, mode: Mode, window_size: int
) -> RecurrentState:
    num_carries = _num_memories(mode, window_size)
    period = _INFINITE if mode == "persistent" else window_size
    carry = residual_blocks.zero_carry(stack_config(config), jnp.zeros((batch_size, 1)))
    return RecurrentState(
        jax.tree.map(lambda h: jnp.repeat(h[:, None], num_carries, 1), carry),
        age=jnp.zeros(batch_size, jnp.int32),
        period=jnp.full(batch_size, period, jnp.int32),
    )


def _step(
    params: Params, config: DecoderFields, state: RecurrentState, pooled: Array, reset: Array
) -> tuple[RecurrentState, StepFeatures]:
    num_carries = jax.tree.leaves(state.carry)[0].shape[1]
    age = jnp.where(reset, 0, state.age)
    zeroed = (age % state.period)[:, None] == jnp.arange(num_carries)[None]
    # The step [B, 1, D'] broadcasts against carries [B, C, H]: its product with the input kernel of
    # the first layer is computed once and shared by all of them.
    carry, features = residual_blocks.step(
        params["recurrence"],
        stack_config(config),
        state.carry,
        jnp.asarray(pooled)[:, None],
        reset=zeroed,
    )
    acting = jnp.where(age < num_carries, 0, (age + 1) % num_carries)
    # With C > 1 the head's ring buffer is indexed by the age in the episode, not in the period.
    num_previous = age if num_carries > 1 else age % state.period
    return RecurrentState(carry, age + 1, state.period), StepFeatures(
        features, acting, num_previous
    )


def _prepare(params: Params, config: DecoderFields, num_memories: int, batch_size: int) -> Params:
    if num_memories == 1:
        return params
    prepared = residual_blocks.prepare_params(
        params["recurrence"], stack_config(config), num_rows=num_memories * batch_size
    )
    return params if prepared is params["recurrence"] else {**params, "recurrence": prepared}


RECURRENT = Trunk(
    params_name="recurrence",
    has_memory=True,
    modes=("refresh", "periodic", "persistent"),
    check=_check,
    init=_init,
    apply=_apply,
    num_memories=_num_memories,
    init_stream=_init_stream,
    step=_step,
    prepare=_prepare,
    sharding_rules=under("recurrence", residual_blocks.SHARDING),
)
