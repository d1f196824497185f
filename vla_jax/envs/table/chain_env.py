"""Chains on the JAX table: several instructions one after another, without a reset in between.

The next instruction is given when the last one is done. A chain ends when the task of an
instruction is done with a wrong block, or after `table.max_steps` steps of one instruction. Its
return is the number of instructions that were done. Only instructions that are possible are drawn:
never the same twice in a row, and "put … on the plate" only while the plate is empty.

Source: Mees et al. 2022, "CALVIN" (https://arxiv.org/abs/2112.03227), section 4: chains of five.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vla_jax.config import checked
from vla_jax.envs.table import jax_env, rules
from vla_jax.envs.table.jax_env import JaxTableConfig
from vla_jax.envs.table.quasi_static import TableState
from vla_jax.types import Env, Key, Observation, Transition

_PLACE = rules.TASKS.index("place")
_LOW, _FAR = 0.06, 0.04  # m: below this height and beyond this distance the expert first rises
_RISE = 0.096  # m, height to which it rises
_PLATE_ROOM = 0.08  # m from the plate's centre, for a block on it and one beside it
_FREE = 0.9  # opening of fingers that have let go of a block


@dataclass(frozen=True)
@checked(length=(1, 100))
class ChainConfig:
    """Chains of instructions on the JAX table."""

    length: int = 5  # instructions of a chain
    # whether all instructions are given in the first steps, one per step, and none afterwards
    all_at_start: bool = False
    # options of the table; `max_steps` counts anew for every instruction
    table: JaxTableConfig = JaxTableConfig(image_size=0)


class ChainState(NamedTuple):
    """State of one environment; `table.instruction` is the instruction to follow."""

    table: TableState  # `num_steps` counts from the start of the chain
    order: Array  # [length] int32 into INSTRUCTIONS, drawn so far; 0 behind them
    done: Array  # [] int32, instructions that were done
    since: Array  # [] int32, steps since the present instruction began
    # [4] bool, blocks with which the task was done already when its instruction began, and wrong
    # blocks that were held: they count only after that has changed
    stale: Array
    key: Key  # of the further instructions


@functools.cache  # the same functions for the same config, so that jit compiles them once
def make(config: ChainConfig) -> Env:
    """Returns an `Env` whose episodes are chains, and whose reward is 1 per instruction done."""
    return Env(
        reset=functools.partial(_reset, config),
        step=functools.partial(_step, config),
        expert=functools.partial(_expert, config),
        instructions=tuple(instruction.text for instruction in rules.INSTRUCTIONS),
        tasks=("chain",) * len(rules.INSTRUCTIONS),
        instruction_index=functools.partial(_given, config),
        max_steps=config.table.max_steps * config.length,
    )


def possible(last: Array, plate_taken: Array) -> Array:
    """Returns the instructions `[12]` bool that can follow.

    Args:
      last: `[]` int32, instruction before; −1 = none.
      plate_taken: `[]` bool, a block is on the plate.
    """
    index = jnp.arange(len(rules.INSTRUCTIONS))
    return (index != last) & ~((index // rules.NUM_BLOCKS == _PLACE) & plate_taken)


def _is_plate_taken(table: TableState) -> Array:
    """Returns `[]` bool: whether a block is on the plate, above it or too close to it."""
    away = jnp.linalg.norm(table.blocks[:, :2] - table.plate[None], axis=1)
    return jnp.any(away < _PLATE_ROOM)


def _draw(key: Key, last: Array, plate_taken: Array) -> Array:
    logits = jnp.where(possible(last, plate_taken), 0.0, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _draw_all(config: ChainConfig, key: Key) -> Array:
    """Returns a whole chain `[length]`, possible if every instruction is done."""

    def draw(carry: tuple[Array, Array], key: Key) -> tuple[tuple[Array, Array], Array]:
        last, plate_taken = carry
        drawn = _draw(key, last, plate_taken)
        return (drawn, plate_taken | (drawn // rules.NUM_BLOCKS == _PLACE)), drawn

    start = jnp.int32(-1), jnp.zeros((), bool)
    return jax.lax.scan(draw, start, jax.random.split(key, config.length))[1]


def _reset(config: ChainConfig, key: Key) -> tuple[ChainState, Observation]:
    table_key, chain_key = jax.random.split(key)
    table, observation = jax_env.make(config.table).reset(table_key)
    order = _draw_all(config, chain_key)
    if not config.all_at_start:  # the further ones depend on what happens
        order = order * (jnp.arange(config.length) == 0)
    table = table._replace(instruction=order[0])
    zero = jnp.zeros((), jnp.int32)
    stale = jnp.zeros(rules.NUM_BLOCKS, bool)
    return ChainState(table, order, zero, zero, stale, chain_key), observation


def _given(config: ChainConfig, state: ChainState) -> Array:
    """Returns the instruction `[]` that the policy is given now, or was given last."""
    if not config.all_at_start:
        return state.table.instruction
    return state.order[jnp.minimum(state.table.num_steps, config.length - 1)]


def _step(
    config: ChainConfig, state: ChainState, action: Array | np.ndarray
) -> tuple[ChainState, Transition]:
    table, touching = jax_env.advance(config.table, state.table, action)
    finished = jax_env.finished(table, touching)
    task, target = jnp.divmod(table.instruction, rules.NUM_BLOCKS)
    stale = state.stale & _is_stale(table, finished)
    counts = finished[task] & ~stale
    success = counts[target]
    failed = jnp.any(counts) & ~success
    state = state._replace(table=table, since=state.since + 1, stale=stale)
    late = ~success & ~failed & (state.since >= config.table.max_steps)
    state = jax.tree.map(
        lambda new, old: jnp.where(success, new, old), _next(config, state, finished), state
    )
    all_done = state.done == config.length
    return state, Transition(
        observation=jax_env.observe(config.table, table),
        reward=success.astype(jnp.float32),
        terminated=failed | all_done | late,
        truncated=jnp.zeros((), bool),
        success=all_done,
    )


def _next(config: ChainConfig, state: ChainState, finished: Array) -> ChainState:
    """Returns the state with the next instruction.

    Args:
      config: of the chains.
      state: after the step in which the present instruction was done.
      finished: `[3, 4]` bool, as of `jax_env.finished`.
    """
    done, last = state.done + 1, state.table.instruction
    place = jnp.minimum(done, config.length - 1)
    drawn = state.order[place]
    if not config.all_at_start:
        drawn = _draw(jax.random.fold_in(state.key, done), last, _is_plate_taken(state.table))
    table = state.table._replace(instruction=drawn)
    return state._replace(
        table=table,
        order=state.order.at[place].set(jnp.where(done < config.length, drawn, state.order[place])),
        done=done,
        since=jnp.zeros((), jnp.int32),
        stale=_is_stale(table, finished),
    )


def _is_stale(table: TableState, finished: Array) -> Array:
    """Returns the blocks `[4]` bool that are as the instruction wants one, or wrong and held.

    A wrong block that is held may fall onto the plate when the hand lets go of it.
    """
    task, target = jnp.divmod(table.instruction, rules.NUM_BLOCKS)
    is_wrong = jnp.arange(rules.NUM_BLOCKS) != target
    return finished[task] | (table.held & is_wrong)


def _expert(config: ChainConfig, state: ChainState) -> Array:
    """Returns the action of the table's expert, which first lets go of a block and rises."""
    table = state.table
    action = _turn_within_limits(config, table, jax_env.expert_action(config.table, table))
    task, target = jnp.divmod(table.instruction, rules.NUM_BLOCKS)
    is_target = jnp.arange(rules.NUM_BLOCKS) == target
    away = table.blocks[:, :2] - table.tool[None, :2]
    distance = jnp.linalg.norm(away, axis=1)
    needed = is_target & (task != rules.TASKS.index("touch"))
    lets_go = jnp.any(table.held & ~needed)
    rises = ~jnp.any(table.held) & (table.tool[2] < _LOW) & (distance[target] > _FAR)
    stays = jnp.zeros(6)
    up = stays.at[2].set(jnp.clip((_RISE - table.tool[2]) / config.table.step_size, -1, 1))
    opened = jnp.ones(1)
    grip = jnp.where(table.opening > _FREE, 1.0, action[6])[None]  # a block between stays there
    action = jnp.where(rises, jnp.concatenate([up, grip]), action)
    return jnp.where(lets_go, jnp.concatenate([stays, opened]), action)


def _turn_within_limits(config: ChainConfig, table: TableState, action: Array) -> Array:
    """Returns the expert's action, which turns the other way where the hand cannot turn so far.

    It turns at most by π/2, since a block has a rotational symmetry of π. From where the hand was
    turned for another block, that can lead beyond its limit.
    """
    turn = table.yaws[table.instruction % rules.NUM_BLOCKS] - table.turns[2]
    nearest = (turn + jnp.pi / 2) % jnp.pi - jnp.pi / 2
    goal = table.turns[2] + nearest
    other = nearest - jnp.pi * jnp.sign(goal)
    is_beyond = (jnp.abs(goal) > rules.MAX_TOOL_YAW) & (action[5] != 0)
    back = jnp.clip(other / config.table.turn_size, -1, 1)
    return action.at[5].set(jnp.where(is_beyond, back, action[5]))
