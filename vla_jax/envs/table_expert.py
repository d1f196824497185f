"""The demonstrator of the table: an action from what can be seen, with no memory of its own.

It is a function of the block positions, the plate, the tool and the task, so that a policy which
knows the instruction can imitate it exactly.
"""

import numpy as np

from vla_jax.envs import table

_HOVER = 0.06  # m above the grasp, on the way to it
_TOUCH_Z = 2 * table.BLOCK_HALF_SIZE[2] - 0.004  # m, tool centre just inside a block's top
_GRASP_Z = 0.018  # m, tool centre at a grasp
_CARRY_Z = 0.115  # m, tool centre while a block is carried or was lifted
_GRASPED = 0.68  # opening below which the fingers hold a block (35 of 65 mm)
_AIM = 0.012  # m, horizontal error at which a grasp is worth trying
_AIM_YAW = 0.15  # rad, likewise
_RELEASE_DISTANCE = 0.02  # m from the plate's centre


def act(
    environment_state: np.ndarray,
    proprio: np.ndarray,
    task: str,
    target: int,
    *,
    step_size: float,
    turn_size: float,
) -> np.ndarray:
    """What to do now.

    Args:
      environment_state: blocks and plate `[22]`, metres from the table's centre.
      proprio: the tool `[8]`, not normalised.
      task: "touch", "lift" or "place".
      target: index of the block's colour.
      step_size: metres per unit of action.
      turn_size: radians per unit of action.

    Returns:
      Action `[7]` float32 in [-1, 1].
    """
    x, y, z, sin_2yaw, cos_2yaw = environment_state[5 * target : 5 * target + 5]
    block, plate, tool = np.array([x, y, z]), environment_state[-2:], proprio[:3]
    turn = _wrap(0.5 * np.arctan2(sin_2yaw, cos_2yaw) - np.arctan2(proprio[3], proprio[4]))
    opening = proprio[7]
    if task == "touch":
        move, grip = _approach(tool, block, _TOUCH_Z), -1.0
    else:
        move, turn, grip = _grasp_and_carry(tool, block, turn, opening, plate, task)
    turns = np.array([-proprio[5], -proprio[6], turn]) / turn_size
    return np.clip(np.array([*(move / step_size), *turns, grip]), -1, 1).astype(np.float32)


def _grasp_and_carry(tool, block, turn, opening, plate, task):
    away = np.linalg.norm(plate - block[:2])
    lying = block[2] < table.BLOCK_HALF_SIZE[2] + table.PLATE_HEIGHT + 0.012
    if task == "place" and lying and away < _RELEASE_DISTANCE + 0.015:
        return np.array([0, 0, 0.5 * (opening > 0.9) * _HOVER]), 0.0, 1.0
    error = np.linalg.norm(block[:2] - tool[:2])
    around = error < 2 * _AIM and tool[2] - block[2] < 0.015
    if around and opening < _GRASPED:
        return _carry(tool, plate, task), 0.0, -1.0
    aimed = error < _AIM and abs(turn) < _AIM_YAW
    ready = aimed and tool[2] < _GRASP_Z + 0.012
    move = _approach(tool, block, _GRASP_Z, allow=_AIM, wait=abs(turn) > 2 * _AIM_YAW)
    return move, turn, -1.0 if ready or (around and opening < 0.95) else 1.0


def _carry(tool, plate, task):
    if task == "lift":
        return np.array([0, 0, _CARRY_Z - tool[2]])
    across = plate - tool[:2]
    distance = np.linalg.norm(across)
    if tool[2] < _CARRY_Z - 0.045 and distance > _RELEASE_DISTANCE + 0.02:
        across = 0 * across  # straight up first, clear of the neighbours
    height = _GRASP_Z + table.PLATE_HEIGHT + _funnel(distance, _RELEASE_DISTANCE)
    return np.array([*across, min(height, _CARRY_Z) - tool[2]])


def _approach(tool, block, height, allow=0.01, wait=False):
    """Over the block first, then down a funnel onto it."""
    across = block[:2] - tool[:2]
    above = _HOVER if wait else min(_funnel(np.linalg.norm(across), allow), _HOVER)
    return np.array([*across, height + above - tool[2]])


def _funnel(distance, allow):
    """Height to keep at this distance: none within `allow`, then rising steeply."""
    return max(0.0, distance - allow) * 3.0


def _wrap(angle):
    """Into (-π/2, π/2]: a block looks the same after half a turn."""
    return (angle + np.pi / 2) % np.pi - np.pi / 2
