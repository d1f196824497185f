"""Gripper conventions of data sets, converted to this library's: +1 open, −1 closed."""

from typing import Literal, get_args

import numpy as np

Gripper = Literal[
    "open_positive",  # +1 open, -1 closed: that of this library and of CALVIN
    "closed_positive",  # +1 closed, -1 open
    "open_one_closed_zero",  # 1 open, 0 closed
    "closed_one_open_zero",  # 1 closed, 0 open
    "open_one_else_closed",  # 1 open, anything else closed: as RoboVLMs reads Open X-Embodiment
]


def gripper_to_open_positive(action: np.ndarray, gripper: Gripper) -> np.ndarray:
    """Returns the actions with the gripper as +1 open, -1 closed.

    Args:
      action: `[num_frames, A]`, gripper last.
      gripper: the data set's convention.

    Returns:
      A copy; values between open and closed are scaled, except for "open_one_else_closed".

    Raises:
      ValueError: an unknown convention, or values outside its range.
    """
    if gripper not in get_args(Gripper):
        raise ValueError(f"gripper must be one of {get_args(Gripper)}, got {gripper!r}.")
    values = action[:, -1]
    low, high = float(values.min()), float(values.max())
    from_zero = gripper in ("open_one_closed_zero", "closed_one_open_zero")
    least = 0 if from_zero else -1
    signs = gripper in ("open_positive", "closed_positive")
    is_unsigned = signs and low >= 0 and low < 0.5  # 0 … 1 where -1 … 1 was declared
    if low < least - 1e-3 or high > 1 + 1e-3 or is_unsigned:
        expected = "have both signs in [-1, 1]" if signs else f"lie in [{least}, 1]"
        raise ValueError(
            f"gripper declared as {gripper!r} must {expected}, got values from {low:g} to "
            f"{high:g}; declare another of {get_args(Gripper)}."
        )
    signed = 2 * values - 1 if from_zero else values
    if gripper == "open_one_else_closed":
        signed = np.where(values == 1, values, -np.ones_like(values))
    opened = signed if gripper.startswith("open") else -signed
    return np.concatenate([action[:, :-1], opened[:, None]], axis=1)
