"""Conversion of a data set's actions from the world frame to the tool frame."""

import dataclasses

from vla_jax.actions import reference_frames
from vla_jax.actions.reference_frames import ToolFrame
from vla_jax.data.dataset import Dataset, digest


def in_tool_frame(dataset: Dataset, config: ToolFrame) -> Dataset:
    """Returns the data set with every action in the tool frame at the time of its execution.

    Each action of a chunk is thus in a later frame, which is known when the action is sent.

    Args:
      dataset: actions in the world frame, proprio in the robot's units, not normalised.
      config: proprio columns of the orientation, and the representation of rotations.

    Returns:
      A data set with another fingerprint; its statistics must be computed again.

    Raises:
      ValueError: proprio is missing or has too few columns; actions have fewer than six numbers.
    """
    orientation = reference_frames.read_orientation(dataset.columns.get("proprio"), config)
    action = reference_frames.to_tool_frame(dataset.columns["action"], orientation, config)
    return dataset._replace(
        columns={**dataset.columns, "action": action},
        fingerprint=digest(dataset.fingerprint, dataclasses.asdict(config)),
    )
