"""Scripted expert of both tables: a pure function of the observation and the instruction.

It has no memory, so a policy that knows the instruction can imitate it exactly.
"""

import jax.numpy as jnp
from jax import Array

from vla_jax.envs.table import rules

_HOVER = 0.06  # m above the grasp during the approach
_TOUCH_Z = 2 * rules.BLOCK_HALF_SIZE[2] - 0.004  # m, tool centre just inside a block's top
_GRASP_Z = 0.018  # m, tool centre at a grasp
_CARRY_Z = 0.115  # m, tool centre while a block is carried or was lifted
_GRASPED = 0.68  # opening below which the fingers hold a block (35 of 65 mm)
_TOUCH_AIM = 0.010  # m, horizontal error below which the tool descends to touch
_AIM = 0.012  # m, horizontal error below which the fingers close
_AIM_YAW = 0.15  # rad, likewise
RELEASE_DISTANCE = 0.02  # m from the plate's centre
_RELEASED = 0.015  # m further away, where a block may lie that was released


def act(
    environment_state: Array,
    proprio: Array,
    task: Array,
    target: Array,
    *,
    step_size: float,
    turn_size: float,
    release_distance: float = RELEASE_DISTANCE,
) -> Array:
    """Returns the expert's action.

    Args:
      environment_state: blocks and plate `[22]`, metres from the table's centre.
      proprio: raw state of the tool `[8]`.
      task: index into `rules.TASKS`, `[]` int32.
      target: index of the block's colour, `[]` int32.
      step_size: metres per unit of action.
      turn_size: radians per unit of action.
      release_distance: greatest distance from the plate's centre at which it puts a block down,
        metres.

    Returns:
      Action `[7]` float32 in [-1, 1], proportional to the remaining motion and clipped.
    """
    row = environment_state[:-2].reshape(rules.NUM_BLOCKS, 5)[target]
    block, plate, tool = row[:3], environment_state[-2:], proprio[:3]
    turn = _wrap(0.5 * jnp.arctan2(row[3], row[4]) - jnp.arctan2(proprio[3], proprio[4]))
    is_touch = task == rules.TASKS.index("touch")
    move, turn, grip = (
        jnp.where(is_touch, touch, other)
        for touch, other in zip(
            (approach(tool, block[:2], _TOUCH_Z, _TOUCH_AIM), turn, -1.0),
            _grasp_and_carry(tool, block, turn, proprio[7], plate, task, release_distance),
            strict=True,
        )
    )
    turns = jnp.stack([-proprio[5], -proprio[6], turn]) / turn_size
    return jnp.clip(jnp.concatenate([move / step_size, turns, grip[None]]), -1, 1)


def _grasp_and_carry(tool, block, turn, opening, plate, task, release_distance):
    """Returns translation, rotation and gripper command to grasp, carry or release a block."""
    error = jnp.linalg.norm(block[:2] - tool[:2])
    around = (error < 2 * _AIM) & (tool[2] - block[2] < 0.015)
    holding = around & (opening < _GRASPED)
    ready = (error < _AIM) & (jnp.abs(turn) < _AIM_YAW) & (tool[2] < _GRASP_Z + 0.012)
    clearance = jnp.where(jnp.abs(turn) > 2 * _AIM_YAW, _HOVER, 0.0)  # rotate above the block
    reach = approach(tool, block[:2], _GRASP_Z, _AIM, clearance)
    move = jnp.where(holding, _carry(tool, plate, task, release_distance), reach)
    grip = jnp.where(holding | ready | (around & (opening < 0.95)), -1.0, 1.0)
    leave = _is_on_plate(block, plate, release_distance + _RELEASED) & (
        task == rules.TASKS.index("place")
    )
    up = jnp.array([0, 0, 0.5 * _HOVER]) * (opening > 0.9)
    return (
        jnp.where(leave, up, move),
        jnp.where(leave | holding, 0.0, turn),
        jnp.where(leave, 1.0, grip),
    )


def _is_on_plate(block, plate, distance):
    down = block[2] < rules.BLOCK_HALF_SIZE[2] + rules.PLATE_HEIGHT + 0.012
    return down & (jnp.linalg.norm(plate - block[:2]) < distance)


def _carry(tool, plate, task, release_distance):
    """Returns the translation: up for `lift`; up, across and down onto the plate for `place`."""
    across = plate - tool[:2]
    distance = jnp.linalg.norm(across)
    # straight up first, to clear the other blocks
    rise = (tool[2] < _CARRY_Z - 0.045) & (distance > release_distance + 0.02)
    height = _GRASP_Z + rules.PLATE_HEIGHT + _funnel(distance, release_distance)
    is_lift = task == rules.TASKS.index("lift")
    across = jnp.where(is_lift | rise, 0.0, across)
    height = jnp.where(is_lift, _CARRY_Z, jnp.minimum(height, _CARRY_Z))
    return jnp.append(across, height - tool[2])


def approach(
    tool: Array, point: Array, height: float, tolerance: float, clearance: Array | float = 0.0
) -> Array:
    """Returns the translation `[3]` to above a point, then down to `height + clearance`.

    Args:
      tool: `[3]`, metres.
      point: `[2]`, metres.
      height: of the tool at the end, metres.
      tolerance: horizontal distance from which the tool descends, metres.
      clearance: least height above `height`, metres.
    """
    across = point - tool[:2]
    above = jnp.clip(_funnel(jnp.linalg.norm(across), tolerance), clearance, _HOVER)
    return jnp.append(across, height + above - tool[2])


def _funnel(distance, tolerance):
    """Returns the least height at a horizontal distance: 0 within `tolerance`, then rising."""
    return jnp.maximum(0.0, distance - tolerance) * 3.0


def _wrap(angle):
    """Wraps an angle to [-π/2, π/2), since a block has a rotational symmetry of π."""
    return (angle + jnp.pi / 2) % jnp.pi - jnp.pi / 2
