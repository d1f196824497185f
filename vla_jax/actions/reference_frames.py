"""Rotations, and actions between the world's frame and the tool's.

Euler angles are roll, pitch, yaw about the fixed axes x, y, z, one after the other, as in
PyBullet, ROS, CALVIN and SIMPLER:

    R(roll, pitch, yaw) = Rz(yaw) · Ry(pitch) · Rx(roll)

R turns vectors of the tool's frame into those of the world's. Everything works on NumPy and on
JAX arrays, inside `jit` too, with any leading axes.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vla_jax.config import did_you_mean
from vla_jax.types import Array

Delta = Literal[
    "rotation",  # three Euler angles of a turn about the world's axes
    "euler_difference",  # Euler angles after it less those before it
]


@dataclass(frozen=True)
class ToolFrame:
    """A policy that speaks in the tool's frame, on data that speak in the world's."""

    orientation: tuple[int, int, int] = (3, 4, 5)  # columns of raw proprio: roll, pitch, yaw, rad
    delta: Delta = "rotation"  # meaning of the data's; CALVIN: "euler_difference"
    radians: float = 1.0  # of one unit of the data's rotation; CALVIN: 1/20

    def __post_init__(self):
        """Checks the meaning, the columns and the unit."""
        if self.delta not in get_args(Delta):
            raise ValueError(
                f"unknown delta '{self.delta}'; {did_you_mean(self.delta, get_args(Delta))}"
            )
        if min(self.orientation) < 0:
            raise ValueError(f"orientation must be columns from 0 on, got {self.orientation}.")
        if self.radians <= 0:
            raise ValueError(f"radians must be positive, got {self.radians}.")


def euler_to_matrix(euler: Array) -> Array:
    """Rotation matrices of Euler angles.

    Args:
      euler: `[..., 3]` roll, pitch, yaw, radians.

    Returns:
      `[..., 3, 3]`.
    """
    xp = _numpy(euler)
    sine, cosine = xp.sin(euler), xp.cos(euler)
    (sr, sp, sy), (cr, cp, cy) = (xp.moveaxis(part, -1, 0) for part in (sine, cosine))
    rows = (
        (cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr),
        (sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr),
        (-sp, cp * sr, cp * cr),
    )
    return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_euler(matrix: Array) -> Array:
    """Euler angles of rotation matrices: the inverse of `euler_to_matrix` for |pitch| < π/2.

    At pitch ±π/2 roll and yaw turn about the same axis and only their sum is determined.

    Args:
      matrix: `[..., 3, 3]`.

    Returns:
      `[..., 3]` roll and yaw in [-π, π], pitch in [-π/2, π/2], radians.
    """
    xp = _numpy(matrix)
    level = xp.hypot(matrix[..., 0, 0], matrix[..., 1, 0])
    roll = xp.atan2(matrix[..., 2, 1], matrix[..., 2, 2])
    pitch = xp.atan2(-matrix[..., 2, 0], level)
    yaw = xp.atan2(matrix[..., 1, 0], matrix[..., 0, 0])
    return xp.stack([roll, pitch, yaw], axis=-1)


def euler_to_rotation_vector(euler: Array) -> Array:
    """Axis times angle of Euler angles.

    Args:
      euler: `[..., 3]` roll, pitch, yaw, radians.

    Returns:
      `[..., 3]` with the angle, in [0, π] radians, as its length.
    """
    xp = _numpy(euler)
    sine, cosine = xp.sin(euler / 2), xp.cos(euler / 2)
    (sr, sp, sy), (cr, cp, cy) = (xp.moveaxis(part, -1, 0) for part in (sine, cosine))
    real = cr * cp * cy + sr * sp * sy  # a quaternion: well behaved where the angle is small
    vector = xp.stack(
        [sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy], -1
    )
    real, vector = xp.abs(real)[..., None], xp.where(real < 0, -1, 1)[..., None] * vector
    length = xp.linalg.norm(vector, axis=-1, keepdims=True)
    small = length < 1e-6
    factor = 2 * xp.atan2(length, real) / xp.where(small, 1, length)
    return vector * xp.where(small, 2, factor)


def to_tool_frame(action: Array, orientation: Array, config: ToolFrame) -> Array:
    """Actions of the world's frame as the tool sees them.

        position: Rᵀ p        rotation: Rᵀ R',  R' = R(δ) R  or  R(orientation + δ)

    R' is where the data's rotation δ leads the tool, by the config's `delta`. Positions may have
    any unit, since a rotation leaves lengths alone; rotations are turned in radians, and come
    back in the unit in which they came. The gripper is left alone.

    Args:
      action: `[..., A]`, dx dy dz droll dpitch dyaw and more, of the world's frame.
      orientation: `[..., 3]` roll, pitch, yaw of the tool before the action, radians.
      config: what the rotation means, and its unit.

    Returns:
      `[..., A]`.

    Raises:
      ValueError: an action has fewer than six numbers.
    """
    tool = _tool(action, orientation)
    turn = action[..., 3:6] * config.radians
    if config.delta == "rotation":
        moved = _product(euler_to_matrix(turn), tool)
    else:
        moved = euler_to_matrix(orientation + turn)
    moved = _product(_transposed(tool), moved)
    return _joined(action, _transposed(tool), matrix_to_euler(moved) / config.radians)


def to_world_frame(action: Array, orientation: Array, config: ToolFrame) -> Array:
    """Actions of the tool's frame as the world sees them: the inverse of `to_tool_frame`.

    Differences of Euler angles come out in [-π, π], the short way round.

    Args:
      action: `[..., A]`, dx dy dz droll dpitch dyaw and more, of the tool's frame.
      orientation: `[..., 3]` roll, pitch, yaw of the tool before the action, radians.
      config: what the rotation shall mean, and its unit.

    Returns:
      `[..., A]`.

    Raises:
      ValueError: an action has fewer than six numbers.
    """
    tool = _tool(action, orientation)
    moved = _product(tool, euler_to_matrix(action[..., 3:6] * config.radians))
    if config.delta == "rotation":
        turn = matrix_to_euler(_product(moved, _transposed(tool)))
    else:
        turn = _short_way(matrix_to_euler(moved) - orientation)
    return _joined(action, tool, turn / config.radians)


def read_orientation(proprio: Array | None, config: ToolFrame) -> Array:
    """The tool's roll, pitch, yaw `[..., 3]` in the robot's own state `[..., P]`, not normalised.

    Raises:
      ValueError: proprio is missing, or has fewer columns than the config names.
    """
    if proprio is None or proprio.shape[-1] <= max(config.orientation):
        got = "none" if proprio is None else f"{proprio.shape[-1]} columns"
        raise ValueError(
            f"proprio must hold the tool's orientation in its columns {config.orientation}, got "
            f"{got}; give the robot's own state, or leave tool_frame out."
        )
    return proprio[..., list(config.orientation)]


def _tool(action: Array, orientation: Array) -> Array:
    if action.shape[-1] < 6:
        raise ValueError(
            f"action must begin with three positions and three rotations, got {action.shape[-1]} "
            "numbers; leave tool_frame out for this robot."
        )
    return euler_to_matrix(orientation)


def _joined(action: Array, matrix: Array, turn: Array) -> Array:
    position = _product(matrix, action[..., :3, None])[..., 0]
    return _numpy(action).concat([position, turn, action[..., 6:]], axis=-1)


def _product(a: Array, b: Array) -> Array:
    # `@` rounds its factors to fewer bits on accelerators: a robot would feel that.
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def _short_way(angle: Array) -> Array:
    return angle - 2 * math.pi * _numpy(angle).round(angle / (2 * math.pi))


def _transposed(matrix: Array) -> Array:
    return matrix.swapaxes(-1, -2)


def _numpy(array: Array) -> Any:
    """NumPy for its arrays, `jax.numpy` for JAX's."""
    return array.__array_namespace__()
