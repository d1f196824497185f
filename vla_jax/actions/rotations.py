"""Rotations as matrices, Euler angles and rotation vectors.

Euler angles are roll, pitch, yaw about the fixed axes x, y, z in this order, as in PyBullet, ROS,
CALVIN and SIMPLER:

    R(roll, pitch, yaw) = Rz(yaw) · Ry(pitch) · Rx(roll)

All functions take NumPy or JAX arrays, inside `jit` too, with any leading axes.
"""

from typing import Any

from vla_jax.types import Array


def euler_to_matrix(euler: Array) -> Array:
    """Returns rotation matrices of Euler angles.

    Args:
      euler: `[..., 3]` roll, pitch, yaw, radians.

    Returns:
      `[..., 3, 3]`.
    """
    xp = array_module(euler)
    sine, cosine = xp.sin(euler), xp.cos(euler)
    (sr, sp, sy), (cr, cp, cy) = (xp.moveaxis(part, -1, 0) for part in (sine, cosine))
    rows = (
        (cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr),
        (sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr),
        (-sp, cp * sr, cp * cr),
    )
    return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_euler(matrix: Array) -> Array:
    """Returns Euler angles of rotation matrices: inverts `euler_to_matrix` for |pitch| < π/2.

    At pitch ±π/2 roll and yaw have the same axis and only their sum is determined.

    Args:
      matrix: `[..., 3, 3]`.

    Returns:
      `[..., 3]` roll and yaw in [-π, π], pitch in [-π/2, π/2], radians.
    """
    xp = array_module(matrix)
    level = xp.hypot(matrix[..., 0, 0], matrix[..., 1, 0])
    roll = xp.atan2(matrix[..., 2, 1], matrix[..., 2, 2])
    pitch = xp.atan2(-matrix[..., 2, 0], level)
    yaw = xp.atan2(matrix[..., 1, 0], matrix[..., 0, 0])
    return xp.stack([roll, pitch, yaw], axis=-1)


def euler_to_rotation_vector(euler: Array) -> Array:
    """Returns axis times angle of the rotation with these Euler angles.

    Args:
      euler: `[..., 3]` roll, pitch, yaw, radians.

    Returns:
      `[..., 3]` with the angle, in [0, π] radians, as its length.
    """
    xp = array_module(euler)
    sine, cosine = xp.sin(euler / 2), xp.cos(euler / 2)
    (sr, sp, sy), (cr, cp, cy) = (xp.moveaxis(part, -1, 0) for part in (sine, cosine))
    real = cr * cp * cy + sr * sp * sy  # of a quaternion, which is accurate for small angles
    vector = xp.stack(
        [sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy], -1
    )
    real, vector = xp.abs(real)[..., None], xp.where(real < 0, -1, 1)[..., None] * vector
    length = xp.linalg.norm(vector, axis=-1, keepdims=True)
    small = length < 1e-6
    factor = 2 * xp.atan2(length, real) / xp.where(small, 1, length)
    return vector * xp.where(small, 2, factor)


def matrix_to_rotation_vector(matrix: Array) -> Array:
    """Returns axis times angle of rotation matrices.

    Args:
      matrix: `[..., 3, 3]`, rotations by less than π.

    Returns:
      `[..., 3]` with the angle, in radians, as its length.
    """
    xp = array_module(matrix)
    axis = xp.stack(
        [
            matrix[..., 2, 1] - matrix[..., 1, 2],
            matrix[..., 0, 2] - matrix[..., 2, 0],
            matrix[..., 1, 0] - matrix[..., 0, 1],
        ],
        axis=-1,
    )
    trace = matrix[..., 0, 0] + matrix[..., 1, 1] + matrix[..., 2, 2]
    angle = xp.acos(xp.clip((trace - 1) / 2, -1, 1))
    small = angle < 1e-6
    factor = xp.where(small, 0.5, angle / xp.where(small, 1, 2 * xp.sin(angle)))
    return axis * factor[..., None]


def array_module(array: Array) -> Any:
    """Returns NumPy for its arrays, `jax.numpy` for JAX's."""
    return array.__array_namespace__()
