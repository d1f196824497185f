"""Motions of the scripted experts of the memory tasks, without memory of their own."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from vla_jax.envs.memory_table.memory_task import RISEN, MemoryState
from vla_jax.envs.table import expert, quasi_static, rules

BUTTON_RADIUS, BUTTON_HEIGHT = 0.03, 0.02  # m
CUP_RADIUS, CUP_HEIGHT = 0.042, 0.06  # m
DOT_HEIGHT = 0.03  # m, of the tool over a dot
_INSIDE = 0.004  # m below the top of an object, so that the hand reaches it
_RISE = RISEN + 0.015  # m, height to which the hand rises between two contacts
_AIM = 0.010  # m, horizontal error below which the hand descends


def send(config: Any, move: Array, *, opens: Array | bool = False) -> Array:
    """Returns the action `[7]` of a translation `[3]` in metres, clipped to [-1, 1]."""
    grip = jnp.where(jnp.asarray(opens), 1.0, -1.0)
    return jnp.clip(jnp.concatenate([move / config.step_size, jnp.zeros(3), grip[None]]), -1, 1)


def stay() -> Array:
    """Returns the translation `[3]` of a hand that stays."""
    return jnp.zeros(3)


def rise(state: MemoryState) -> Array:
    """Returns the translation `[3]` to the height between two contacts."""
    return jnp.append(jnp.zeros(2), _RISE - state.table.tool[2])


def reach(state: MemoryState, point: Array, height: float) -> Array:
    """Returns the translation `[3]` to above a point `[2]`, then down to a height in metres."""
    return expert.approach(state.table.tool, point, height, _AIM)


def touch_block(state: MemoryState, block: Array) -> Array:
    """Returns the translation `[3]` towards the top of a block, an index `[]`."""
    place = state.table.blocks[block, :2]
    return reach(state, place, 2 * rules.BLOCK_HALF_SIZE[2] - _INSIDE)


def press(state: MemoryState) -> Array:
    """Returns the translation `[3]` towards the button."""
    return reach(state, state.layout.button, BUTTON_HEIGHT - _INSIDE)


def touch_cup(state: MemoryState, place: Array) -> Array:
    """Returns the translation `[3]` towards the cup at a place `[]`."""
    return reach(state, state.layout.blocks[place], CUP_HEIGHT - _INSIDE)


def handle(
    config: Any,
    state: MemoryState,
    task: str,
    colour: Array,
    to: Array,
    *,
    release_distance: float = expert.RELEASE_DISTANCE,
) -> Array:
    """Returns the action `[7]` of the table's expert.

    Args:
      config: of the memory table.
      state: of one environment.
      task: of `rules.TASKS`.
      colour: `[]`, index of the block.
      to: place `[2]` to which "place" carries it.
      release_distance: greatest distance from there at which it puts the block down, metres.
    """
    return expert.act(
        quasi_static.environment_state(state.table._replace(plate=to)),
        quasi_static.proprio(state.table),
        jnp.int32(rules.TASKS.index(task)),
        colour,
        step_size=config.step_size,
        turn_size=config.turn_size,
        release_distance=release_distance,
    )
