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
# m further down, against the object: a clone whose motion is a little shorter than the expert's
# touches it as well
_PRESS = 0.016
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


def touch_again(state: MemoryState, contact: Array) -> Array:
    """Returns a translation `[3]` that makes contact, stays for a step, and rises before the next.

    The step separates the last motion down from the first motion up, between which a clone would
    have to tell by millimetres.

    Args:
      state: of one environment.
      contact: translation towards the object, `[3]`.
    """
    still = jnp.array([0.0, 0.0, -_PRESS])
    after = jnp.where(state.progress.since == 0, still, rise(state))
    return jnp.where(state.progress.armed, contact, after)


def reach(state: MemoryState, point: Array, height: float) -> Array:
    """Returns the translation `[3]` to above a point `[2]`, then down to a height in metres."""
    return expert.approach(state.table.tool, point, height, _AIM)


def press_on(state: MemoryState, point: Array, top: float) -> Array:
    """Returns the translation `[3]` to above a point `[2]`, then against an object of height `top`.

    Directly above it, the hand aims below the top, which stops it.
    """
    is_above = jnp.linalg.norm(point - state.table.tool[:2]) < _AIM
    deeper = jnp.array([0.0, 0.0, -_PRESS]) * is_above
    return reach(state, point, top - _INSIDE) + deeper


def touch_block(state: MemoryState, block: Array) -> Array:
    """Returns the translation `[3]` towards the top of a block, an index `[]`."""
    place = state.table.blocks[block, :2]
    return press_on(state, place, 2 * rules.BLOCK_HALF_SIZE[2])


def press(state: MemoryState) -> Array:
    """Returns the translation `[3]` towards the button."""
    return press_on(state, state.layout.button, BUTTON_HEIGHT)


def touch_cup(state: MemoryState, place: Array) -> Array:
    """Returns the translation `[3]` towards the cup at a place `[]`."""
    return press_on(state, state.layout.blocks[place], CUP_HEIGHT)


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
