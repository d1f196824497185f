"""A data set whose actions are turned from the world's frame into the tool's."""

import dataclasses

from vla_jax.actions import reference_frames
from vla_jax.actions.reference_frames import ToolFrame
from vla_jax.data.dataset import Dataset, digest


def in_tool_frame(dataset: Dataset, config: ToolFrame) -> Dataset:
    """The same data set with every action in the frame that the tool has when it is carried out.

    A chunk's later actions are so in later frames, which an agent knows when it sends them.

    Args:
      dataset: actions of the world's frame, proprio as the robot gives it, not normalised.
      config: where the orientation stands, and what the rotation means.

    Returns:
      A data set of another fingerprint; compute its statistics anew.

    Raises:
      ValueError: proprio is missing or has fewer columns, or actions have fewer than six numbers.
    """
    orientation = reference_frames.read_orientation(dataset.columns.get("proprio"), config)
    action = reference_frames.to_tool_frame(dataset.columns["action"], orientation, config)
    return dataset._replace(
        columns={**dataset.columns, "action": action},
        fingerprint=digest(dataset.fingerprint, dataclasses.asdict(config)),
    )
