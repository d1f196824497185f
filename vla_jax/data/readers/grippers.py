"""Grippers among the numbers of an action on disk."""

import numpy as np

from vla_jax.actions import action_layout
from vla_jax.actions.action_layout import ActionLayout
from vla_jax.data.readers.fields import FieldMap

CHANGE = 0.1  # in units of half the gripper's range: a change of a gripper that is given as such


def make_layout(fields: FieldMap, dim: int) -> ActionLayout:
    """Returns the layout of actions of `dim` numbers; errors as `action_layout.make_layout`."""
    return action_layout.make_layout(
        dim, fields.grippers or (), fields.gripper_range, only_open=fields.gripper_only_open
    )


def hold_grippers(action: np.ndarray, fields: FieldMap) -> np.ndarray:
    """Returns actions whose grippers, given as changes, are states: open or closed at every step.

    A value near the middle keeps the state before. Until the first change the gripper is in the
    opposite state, and open if there is no change. NaN and infinity stay, to be found later.

    Args:
      action: `[T, dim]` of one episode.
      fields: grippers and their range.

    Source: rel2abs_gripper_actions of octo (octo/data/utils/data_utils.py), for RT-1's data.
    """
    layout = make_layout(fields, action.shape[1])
    held = action.copy()
    middle, half = (layout.opened + layout.closed) / 2, (layout.opened - layout.closed) / 2
    for index in layout.grippers:
        signed = (action[:, index] - middle) / half
        change = np.where(np.abs(signed) > CHANGE, np.sign(signed), 0)
        moves = np.flatnonzero(change)
        before = -change[moves[0]] if len(moves) else 1.0
        last = np.maximum.accumulate(np.where(change != 0, np.arange(len(change)), -1))
        states = middle + half * np.where(last >= 0, change[last], before)
        held[:, index] = np.where(np.isfinite(signed), states, signed)
    return held
