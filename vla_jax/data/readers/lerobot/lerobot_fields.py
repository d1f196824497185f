"""Fields that a LeRobot data set suggests: cameras by name, grippers by robot."""

import re
from collections.abc import Mapping, Sequence

from vla_jax.data.raw import Feature, RawDataset
from vla_jax.data.readers.fields import FieldMap, GripperRange
from vla_jax.data.readers.lerobot.info import read_info
from vla_jax.data.readers.lerobot.modality import Modality, NamedSlice, read_modality
from vla_jax.data.readers.lerobot.stored_fields import read_fields
from vla_jax.data.readers.robots import ROBOTS, robot_name

PRIMARY = (  # words in names of a third-person camera, the best first
    "primary", "image", "top", "front", "frontview", "agentview", "static", "high", "head",
    "overhead", "base", "main", "exterior", "external", "third", "ego", "side",
)  # fmt: skip
WRIST = re.compile(r"wrist|hand|gripper")
DEPTH = re.compile(r"depth|tactile|segment|mask")
GRIPPER = re.compile(r"gripper|claw")
KEYS = {  # field -> keys that hold it, the first one that exists is used
    "proprio": ("observation.state", "state", "observation.proprio"),
    "environment_state": ("observation.environment_state",),
    "action": ("action", "actions"),
    "action_mask": ("is_acting",),
}


def suggest_fields(raw: RawDataset) -> FieldMap:
    """Returns the fields that a LeRobot data set suggests.

    Cameras: a name with "wrist", "hand" or "gripper" is a wrist camera, the first of which is
    `image_wrist`. Of the others, the one with the first word in `PRIMARY` is `image_primary`, or
    the only camera of the data set whatever its name is. All remaining cameras are
    `image_<name>`.

    Grippers: dimensions of the action with "gripper" in their name; without such names those of
    the robot in `ROBOTS`. They are undeclared for an unknown robot with unnamed dimensions.

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


def name_cameras(names: Mapping[str, str]) -> dict[str, str]:
    """Returns field -> camera.

    Args:
      names: camera's key -> its name, "" takes the name from the key.
    """
    short = {key: name or _short_name(key) for key, name in names.items()}
    pictures = [key for key in short if not DEPTH.search(short[key].lower())]
    wrist = [key for key in pictures if WRIST.search(short[key].lower())]
    third_person = [key for key in pictures if key not in wrist]
    ranks = {key: _rank(short[key].lower()) for key in third_person}
    known = [key for key in third_person if ranks[key] is not None]
    primary = sorted(known, key=lambda key: ranks[key] or 0)  # stable
    if len(pictures) == 1:
        primary = third_person
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


def _rank(name: str) -> int | None:
    """Returns the place of a name in PRIMARY: equal names before those with such a word."""
    if name in PRIMARY:
        return PRIMARY.index(name)
    places = [PRIMARY.index(word) for word in re.findall("[a-z]+", name) if word in PRIMARY]
    return len(PRIMARY) + min(places) if places else None


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
) -> tuple[int, ...] | None:
    """Returns the grippers' places in the concatenated action; None if nothing declares them."""
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
    if robot in ROBOTS and len(names) in ROBOTS[robot].grippers:
        return ROBOTS[robot].grippers[len(names)]
    is_named = modality.action or any(columns[key].names for key in keys)
    return () if is_named or not names else None


def _dimension_names(key: str, feature: Feature) -> Sequence[str]:
    size = max(feature.shape[0], 0) if feature.shape else 1
    return feature.names or [key.rpartition(".")[2]] * size
