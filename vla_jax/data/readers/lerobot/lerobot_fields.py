"""Fields that a LeRobot data set suggests: cameras by name, grippers by robot."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vla_jax.data.raw import Feature, RawDataset
from vla_jax.data.readers.fields import FieldMap, GripperRange
from vla_jax.data.readers.lerobot.info import read_info
from vla_jax.data.readers.lerobot.modality import Modality, NamedSlice, read_modality
from vla_jax.data.readers.lerobot.stored_fields import read_fields

PRIMARY = (  # parts of names of a third-person camera, the best first
    "primary", "image", "top", "front", "agentview", "static", "high", "head", "base", "main",
    "exterior", "ego",
)  # fmt: skip
WRIST = re.compile(r"wrist|hand|gripper")
DEPTH = re.compile(r"depth|tactile|segment|mask")
GRIPPER = re.compile(r"gripper|claw")
KEYS = {  # field -> keys that hold it, the first one that exists is used
    "proprio": ("observation.state", "state", "observation.proprio"),
    "environment_state": ("observation.environment_state",),
    "action": ("action", "actions"),
}


class Robot(NamedTuple):
    """Meaning of the actions of a robot."""

    closed: float  # number of a closed gripper
    opened: float  # number of an open gripper
    grippers: Mapping[int, tuple[int, ...]]  # size of the action -> grippers, where without names


ROBOTS = {  # robot_type in info.json, without a prefix "bi_" or endings such as "_follower"
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


def suggest_fields(raw: RawDataset) -> FieldMap:
    """Returns the fields that a LeRobot data set suggests.

    Cameras: a name with "wrist", "hand" or "gripper" is a wrist camera, the first of which is
    `image_wrist`. Of the others, the one with the first name in `PRIMARY`, else the first one, is
    `image_primary`. All remaining cameras are `image_<name>`.

    Grippers: dimensions of the action with "gripper" in their name; without such names those of
    the robot in `ROBOTS`, and of an unknown robot with unnamed dimensions the last one, which
    this library's own data sets have.

    Args:
      raw: from `open_lerobot`.

    A converted data set states its fields itself.

    Raises:
      ValueError: `meta/modality.json` contradicts the data set.
    """
    stated = read_fields(raw.path)
    if stated is not None:
        return stated
    modality = read_modality(raw.path, raw.columns, raw.images)
    columns = {name: keys for name in KEYS if (keys := _keys(name, raw.columns))}
    if modality.state:
        columns["proprio"] = tuple(map(_slice, modality.state))
    if modality.action:
        columns["action"] = tuple(map(_slice, modality.action))
    name = robot_name(read_info(raw.path).robot_type)
    robot = ROBOTS.get(name)
    return FieldMap(
        cameras=name_cameras({key: modality.cameras.get(key, "") for key in raw.images}),
        columns=columns,
        grippers=_grippers(raw.columns, columns.get("action", ()), modality, name),
        gripper_range=GripperRange(robot.closed, robot.opened) if robot else GripperRange(-1, 1),
        robot=name if robot else "",
    )


def robot_name(robot_type: str) -> str:
    """Returns the key of `ROBOTS` that a robot type has, else the type in lower case."""
    name = robot_type.lower().strip().replace("-", "_")
    parts = name.split("_")
    return next((robot for robot in ROBOTS if robot in parts), name)


def name_cameras(names: Mapping[str, str]) -> dict[str, str]:
    """Returns field -> camera.

    Args:
      names: camera's key -> its name, "" takes the name from the key.
    """
    short = {key: name or _short_name(key) for key, name in names.items()}
    pictures = [key for key in short if not DEPTH.search(short[key].lower())]
    wrist = [key for key in pictures if WRIST.search(short[key].lower())]
    third_person = [key for key in pictures if key not in wrist]
    primary = sorted(third_person, key=lambda key: _rank(short[key].lower()))  # stable
    found = {"image_primary": primary[:1], "image_wrist": wrist[:1]}
    cameras = {field: key for field, keys in found.items() for key in keys}
    for key in [key for key in short if key not in cameras.values()]:
        field = base = "image_" + (re.sub(r"\W", "_", short[key]) or "camera")
        number = 2
        while field in cameras:
            field, number = f"{base}_{number}", number + 1
        cameras[field] = key
    return cameras


def _short_name(key: str) -> str:
    """Returns the part of a camera's key that names it: "top" of observation.images.top."""
    for prefix in ("observation.images.", "observation.", "images.", "video."):
        if key.startswith(prefix) and len(key) > len(prefix):
            return key.removeprefix(prefix)
    return key


def _rank(name: str) -> int:
    """Returns the place of a name in PRIMARY: equal names before those that contain one."""
    for place, part in enumerate(PRIMARY):
        if name == part:
            return place
    contained = [place for place, part in enumerate(PRIMARY) if part in name]
    return len(PRIMARY) + min(contained, default=len(PRIMARY))


def _keys(field: str, columns: Mapping[str, Feature]) -> tuple[str, ...]:
    """Returns the columns of a field: one of `KEYS`, else all that begin like the first one."""
    numbers = [key for key, f in columns.items() if f.dtype != "str" and len(f.shape) <= 1]
    for key in KEYS[field]:
        if key in numbers:
            return (key,)
    prefix = KEYS[field][0] + "."
    return tuple(key for key in numbers if key.startswith(prefix))


def _slice(part: NamedSlice) -> str:
    return f"{part.key}[{part.start}:{part.end}]"


def _grippers(
    columns: Mapping[str, Feature], keys: Sequence[str], modality: Modality, robot: str
) -> tuple[int, ...]:
    """Returns the grippers' places in the concatenated action."""
    if modality.action:
        names = [
            f"{part.name}.{index}"
            for part in modality.action
            for index in range(part.end - part.start)
        ]
    else:
        names = [name for key in keys for name in _dimension_names(key, columns[key])]
    named = tuple(index for index, name in enumerate(names) if GRIPPER.search(name.lower()))
    if named:
        return named
    if robot in ROBOTS:
        return ROBOTS[robot].grippers.get(len(names), ())
    is_named = modality.action or any(columns[key].names for key in keys)
    return () if is_named or not names else (len(names) - 1,)


def _dimension_names(key: str, feature: Feature) -> Sequence[str]:
    size = max(feature.shape[0], 0) if feature.shape else 1
    return feature.names or [key.rpartition(".")[2]] * size
