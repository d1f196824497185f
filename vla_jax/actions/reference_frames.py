"""Conversion of actions between the world frame and the tool frame.

The rotation matrix R of the tool's orientation (`rotations.euler_to_matrix`) maps vectors in the
tool frame to vectors in the world frame. All functions take NumPy or JAX arrays, inside `jit` too,
with any leading axes.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from vla_jax.actions.rotations import array_module, euler_to_matrix, matrix_to_euler
from vla_jax.config import LEAST_FLOAT, checked, did_you_mean
from vla_jax.types import Array

Delta = Literal[
    "rotation",  # Euler angles of the rotation, about the world's axes
    "euler_difference",  # Euler angles after the action minus those before it
]


@dataclass(frozen=True)
@checked(radians=(LEAST_FLOAT, 1e12))
class ToolFrame:
    """Options of a policy that acts in the tool frame, for data in the world frame."""

    orientation: tuple[int, int, int] = (3, 4, 5)  # columns of raw proprio: roll, pitch, yaw, rad
    delta: Delta = "rotation"  # representation of the data's rotations; CALVIN: "euler_difference"
    radians: float = 1.0  # radians per unit of the data's rotations; CALVIN: 1/20

    def __post_init__(self):
        """Checks the representation, the columns and the unit."""
        if self.delta not in get_args(Delta):
            raise ValueError(
                f"unknown delta '{self.delta}'; {did_you_mean(self.delta, get_args(Delta))}"
            )
        if min(self.orientation) < 0:
            raise ValueError(
                f"orientation must be column indices of 0 or more, got {self.orientation}."
            )
        if self.radians <= 0:
            raise ValueError(f"radians must be positive, got {self.radians}.")


def to_tool_frame(action: Array, orientation: Array, config: ToolFrame) -> Array:
    """Returns actions, given in the world frame, in the tool frame.

        position: Rᵀ p        rotation: Rᵀ R',  R' = R(δ) R  or  R(orientation + δ)

    R' is the tool's rotation after the action, computed from the rotation δ of the data by
    `config.delta`. Positions may have any unit; rotations keep the unit of the data. The gripper
    is unchanged.

    Args:
      action: `[..., A]`, dx dy dz droll dpitch dyaw and more, in the world frame.
      orientation: `[..., 3]` roll, pitch, yaw of the tool before the action, radians.
      config: representation and unit of rotations.

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
    """Returns actions, given in the tool frame, in the world frame: the inverse of `to_tool_frame`.

    Differences of Euler angles are wrapped to [-π, π].

    Args:
      action: `[..., A]`, dx dy dz droll dpitch dyaw and more, in the tool frame.
      orientation: `[..., 3]` roll, pitch, yaw of the tool before the action, radians.
      config: representation and unit of rotations.

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
        turn = _wrap(matrix_to_euler(moved) - orientation)
    return _joined(action, tool, turn / config.radians)


def read_orientation(proprio: Array | None, config: ToolFrame) -> Array:
    """Returns the tool's roll, pitch, yaw `[..., 3]` from raw `proprio [..., P]`.

    Raises:
      ValueError: proprio is missing, or has fewer columns than the config names.
    """
    if proprio is None or proprio.shape[-1] <= max(config.orientation):
        got = "none" if proprio is None else f"{proprio.shape[-1]} columns"
        raise ValueError(
            f"proprio must hold the tool's orientation in columns {config.orientation}, got {got}; "
            "pass the robot's raw proprio, or leave tool_frame out."
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
    return array_module(action).concat([position, turn, action[..., 6:]], axis=-1)


def _product(a: Array, b: Array) -> Array:
    # `@` rounds its factors to fewer bits on accelerators, which costs precision of the motion.
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def _wrap(angle: Array) -> Array:
    return angle - 2 * math.pi * array_module(angle).round(angle / (2 * math.pi))


def _transposed(matrix: Array) -> Array:
    return matrix.swapaxes(-1, -2)
