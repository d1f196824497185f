"""Order and range of a robot's action numbers, converted to this library's and back.

In this library the last number of an action is the gripper, +1 open and -1 closed; the others are
the arm's. Robots differ: their gripper is anywhere in the action, counts from 0 to 100, or is
missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vla_jax.config import checked
from vla_jax.types import Array

Gripper = Literal[
    "open_positive",  # +1 open, -1 closed: that of this library and of CALVIN
    "closed_positive",  # +1 closed, -1 open
    "open_one_closed_zero",  # 1 open, 0 closed
    "closed_one_open_zero",  # 1 closed, 0 open
    "open_one_else_closed",  # 1 open, anything else closed: as RoboVLMs reads Open X-Embodiment
]
RANGES: dict[Gripper, tuple[float, float]] = {  # (closed, open)
    "open_positive": (-1.0, 1.0),
    "closed_positive": (1.0, -1.0),
    "open_one_closed_zero": (0.0, 1.0),
    "closed_one_open_zero": (1.0, 0.0),
    "open_one_else_closed": (-1.0, 1.0),
}


@dataclass(frozen=True)
@checked(dim=(0, 4096))
class ActionLayout:
    """Places of the grippers in a robot's action `[dim]`, and the meaning of their values."""

    dim: int = 7  # numbers of the robot's action
    # indices of the grippers in [0, dim). One gripper becomes the last number. Several ones stay
    # where they are, as continuous numbers in [-1, 1].
    grippers: tuple[int, ...] = (6,)
    closed: float = -1.0  # value of a closed gripper on the robot
    opened: float = 1.0  # value of an open gripper on the robot
    only_open: bool = False  # only `opened` itself means open; any other value means closed

    def __post_init__(self) -> None:
        """Checks the indices and the range."""
        if self.dim < 1:
            raise ValueError(f"an action must have at least 1 number, got {self.dim}.")
        wrong = [index for index in self.grippers if not 0 <= index < self.dim]
        if wrong or len(set(self.grippers)) < len(self.grippers):
            raise ValueError(
                f"grippers must be different indices below {self.dim}, the size of the action, got "
                f"{self.grippers}; give their indices with --dataset.grippers."
            )
        if not np.isfinite([self.closed, self.opened]).all() or self.closed == self.opened:
            raise ValueError(
                "the values of a closed and an open gripper must be finite and different, got "
                f"{self.closed:g} and {self.opened:g}."
            )

    @property
    def size(self) -> int:
        """A, numbers of an action in this library, its gripper included."""
        return self.dim if len(self.grippers) == 1 else self.dim + 1

    @property
    def missing(self) -> tuple[int, ...]:
        """Indices in [0, A) of the numbers that the robot has not: a gripper, or none."""
        return () if len(self.grippers) == 1 else (self.dim,)


def make_layout(
    dim: int,
    grippers: Sequence[int],
    gripper_range: tuple[float, float],
    *,
    only_open: bool = False,
) -> ActionLayout:
    """Returns the layout of actions of `dim` numbers.

    Args:
      dim: numbers of an action.
      grippers: indices of grippers, negative ones from the end.
      gripper_range: values of a closed and of an open gripper, such as one of `RANGES`.
      only_open: any value but that of an open gripper means closed.

    Raises:
      ValueError: an index outside the action, or no range.
    """
    closed, opened = gripper_range
    indices = tuple(index + dim if index < 0 else index for index in grippers)
    return ActionLayout(dim, indices, float(closed), float(opened), only_open)


def from_robot(action: np.ndarray, layout: ActionLayout) -> np.ndarray:
    """Returns actions in this library's order, grippers from -1 (closed) to +1 (open).

    Args:
      action: `[F, dim]`, as the robot records it.
      layout: of this robot.

    Returns:
      `[F, A]` float32; a gripper that the robot has not is 0.

    Raises:
      ValueError: another number of dimensions, or gripper values that contradict the layout.
    """
    if action.shape[-1] != layout.dim:
        raise ValueError(f"action must have {layout.dim} numbers, got {action.shape[-1]}.")
    values = np.asarray(action, np.float32).copy()
    indices = list(layout.grippers)
    if indices:
        values[:, indices] = _to_signed(values[:, indices], layout)
    if len(indices) == 1:
        return np.concatenate([np.delete(values, indices, axis=1), values[:, indices]], axis=1)
    return np.concatenate([values, np.zeros_like(values[:, :1])], axis=1)


def reorder_names(names: Sequence[str], layout: ActionLayout) -> tuple[str, ...]:
    """Returns the names `[A]` of this library's action numbers, from those `[dim]` of the robot."""
    if len(layout.grippers) != 1:
        return (*names, "no gripper")
    place = layout.grippers[0]
    return (*names[:place], *names[place + 1 :], names[place])


def to_robot(action: Array, layout: ActionLayout) -> Array:
    """Returns actions in the robot's order and range; the inverse of `from_robot`.

    Args:
      action: `[..., A]`, gripper last, -1 closed to +1 open.
      layout: of this robot.

    Returns:
      `[..., dim]`.
    """
    xp = action.__array_namespace__()
    parts = [action[..., i : i + 1] for i in range(layout.dim)]
    if len(layout.grippers) == 1:
        place = layout.grippers[0]
        parts = [*parts[:place], action[..., -1:], *parts[place : layout.dim - 1]]
    middle, half = (layout.opened + layout.closed) / 2, (layout.opened - layout.closed) / 2
    return xp.concat(
        [middle + half * p if i in layout.grippers else p for i, p in enumerate(parts)], axis=-1
    )


def _to_signed(values: np.ndarray, layout: ActionLayout) -> np.ndarray:
    """Returns gripper values as -1 … +1, after a check of their range."""
    closed, opened = layout.closed, layout.opened
    if layout.only_open:
        return np.where(values == opened, 1.0, -1.0)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    least, most, width = min(closed, opened), max(closed, opened), abs(opened - closed)
    # 0 … 1 where -1 … 1 was declared: half of the range is never used.
    is_unsigned = least == -most and 0 <= low < 0.25 * width
    # 0 … 1 or -1 … 1 where 0 … 100 was declared: a gripper that moves, but within 2 % of its range.
    is_narrow = width > 20 and high - low > 0.5 and low >= -1.01 and high <= 1.01
    if low < least - 5e-4 * width or high > most + 5e-4 * width or is_unsigned or is_narrow:
        expected = f"lie in [{least:g}, {most:g}]" + (" with both signs" if least < 0 else "")
        expected += " and use more than 5 % of it" if is_narrow else ""
        raise ValueError(
            f"gripper declared as {closed:g} closed and {opened:g} open must {expected}, got "
            f"values from {low:g} to {high:g}; declare its --dataset.gripper-range CLOSED OPEN, or "
            "other --dataset.grippers."
        )
    # In this form the values of the library's own range do not change.
    return (values - (opened + closed) / 2) / ((opened - closed) / 2)
