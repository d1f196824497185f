"""Record that names the columns and cameras of a source which become the fields of a `Dataset`."""

from collections.abc import Mapping
from typing import NamedTuple


class GripperRange(NamedTuple):
    """Values of a gripper's number on disk."""

    closed: float  # value of a closed gripper
    opened: float  # value of an open gripper; may be below `closed`


class FieldMap(NamedTuple):
    """Fields of a `Dataset` -> keys of a `RawDataset`; a reader proposes one, options change it.

    A key may select dimensions: `observation/state[:7]`, `action[0:3]`, `action[-1]`.
    """

    cameras: Mapping[str, str] = {}  # image_primary, image_wrist, image_<name> -> camera's key
    columns: Mapping[str, tuple[str, ...]] = {}  # proprio, action, ... -> keys, concatenated
    grippers: tuple[int, ...] = ()  # indices of grippers in the concatenated action, as -1
    gripper_range: GripperRange = GripperRange(-1.0, 1.0)  # of all grippers
    # values are changes: a value between the ends keeps what the gripper did before (RT-1)
    gripper_keeps_at_zero: bool = False
    rotate_images: bool = False  # images are upside down on disk: rotate them by 180 degrees
    robot: str = ""  # name of the conventions' entry in a table, "" = generic
