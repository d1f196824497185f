"""Grippers of robots by name: where they are in an action, and what their numbers mean."""

from collections.abc import Mapping
from typing import NamedTuple


class Robot(NamedTuple):
    """Meaning of the actions of a robot."""

    closed: float  # number of a closed gripper
    opened: float  # number of an open gripper
    grippers: Mapping[int, tuple[int, ...]]  # size of the action -> grippers, where without names


ROBOTS = {  # robot_type in info.json, without a prefix "bi_" or endings such as "_follower"
    # this library's recordings on its own table: last number, -1 = closed, 1 = open
    "table": Robot(-1.0, 1.0, {7: (6,)}),
    # lerobot/robots/so_follower, koch_follower: MotorNormMode.RANGE_0_100, 100 = open
    "so100": Robot(0.0, 100.0, {6: (5,), 12: (5, 11)}),
    "so101": Robot(0.0, 100.0, {6: (5,), 12: (5, 11)}),
    "koch": Robot(0.0, 100.0, {6: (5,), 12: (5, 11)}),
    # ALOHA, gym_aloha/constants.py: positions normalised to 0 = closed, 1 = open
    "aloha": Robot(0.0, 1.0, {7: (6,), 14: (6, 13), 16: (6, 13)}),
    "viperx": Robot(0.0, 1.0, {7: (6,)}),
    # BridgeData V2: 1 = open, 0 = closed
    "widowx": Robot(0.0, 1.0, {7: (6,)}),
    "bridge": Robot(0.0, 1.0, {7: (6,)}),
    # CALVIN: gripper_action 1 = open, -1 = close
    "calvin": Robot(-1.0, 1.0, {7: (6,)}),
    # robosuite's Panda, as LIBERO and robomimic record it: -1 = open, 1 = close
    "panda": Robot(1.0, -1.0, {7: (6,)}),
    "libero": Robot(1.0, -1.0, {7: (6,)}),
    # DROID: gripper_position 0 = open, 1 = closed
    "franka": Robot(1.0, 0.0, {7: (6,), 8: (7,)}),
    "droid": Robot(1.0, 0.0, {7: (6,), 8: (7,)}),
    # gym_pusht: positions of the pusher in pixels
    "pusht": Robot(-1.0, 1.0, {2: ()}),
}


def robot_name(robot_type: str) -> str:
    """Returns the key of `ROBOTS` that a robot type has, else the type in lower case."""
    name = robot_type.lower().strip().replace("-", "_")
    parts = name.split("_")
    return next((robot for robot in ROBOTS if robot in parts), name)
