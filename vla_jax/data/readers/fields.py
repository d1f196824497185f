"""Names of the columns and cameras of a raw data set which become the fields of a `Dataset`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vla_jax.actions.action_layout import RANGES
from vla_jax.config import did_you_mean
from vla_jax.data.dataset import ACTION_MASK
from vla_jax.data.raw import RawDataset
from vla_jax.data.readers.dataset_config import DatasetConfig, camera_option
from vla_jax.data.readers.field_columns import field_names, parse_key
from vla_jax.data.readers.robots import ROBOTS


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
    # indices of grippers in the concatenated action, such as -1; None = nothing declares them
    grippers: tuple[int, ...] | None = ()
    gripper_range: GripperRange = GripperRange(-1.0, 1.0)  # of all grippers
    gripper_only_open: bool = False  # any value but that of an open gripper means closed
    # values are changes: a value between the ends keeps what the gripper did before (RT-1)
    gripper_keeps_at_zero: bool = False
    rotate_images: bool = False  # images are upside down on disk: rotate them by 180 degrees
    robot: str = ""  # entry of a table of robots or data sets these conventions come from


def choose_fields(proposed: FieldMap, raw: RawDataset, config: DatasetConfig) -> FieldMap:
    """Returns the fields to read: those the reader proposes, changed by the config.

    Args:
      proposed: from the reader's `fields`.
      raw: data set that must hold all keys.
      config: `cameras`, `feature_keys`, `columns`, `robot`, `gripper`, `gripper_range`,
        `grippers` and `rotate_images`.

    Raises:
      ValueError: an unknown field; a key that the data set lacks; no key for the action; nothing
        declares which numbers are grippers.
    """
    keys = dict(config.feature_keys)
    cameras = {name: key for name, key in keys.items() if name.startswith("image_")}
    columns = {name: tuple(key.split("+")) for name, key in keys.items() if name not in cameras}
    cameras |= dict(map(camera_option, config.cameras))
    proposed = name_cameras(proposed, raw, cameras)
    columns = {**proposed.columns, **columns}
    for keys in columns.values():
        for key in keys:
            parse_key(key, raw.columns)
    if "action" not in columns:
        raise ValueError(
            f"{raw.path} must have an action, got the columns {sorted(raw.columns)}; name its key "
            "with --dataset.feature-keys action KEY."
        )
    wanted = tuple(columns)
    if config.columns is not None:  # the mask says which of the actions exist
        wanted = (*config.columns, "action", *({ACTION_MASK} & columns.keys()))
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise ValueError(
            f"{raw.path} must have a column for {missing[0]}, got {sorted(raw.columns)}; name its "
            f"key with --dataset.feature-keys {missing[0]} KEY."
        )
    proposed = proposed._replace(**_gripper_fields(proposed, raw, config, columns["action"]))
    return proposed._replace(
        columns={name: columns[name] for name in wanted},
        gripper_range=_gripper_range(proposed, config),
        gripper_only_open=(
            proposed.gripper_only_open
            if config.gripper is None and config.gripper_range is None
            else config.gripper == "open_one_else_closed"
        ),
        rotate_images=(
            proposed.rotate_images if config.rotate_images is None else config.rotate_images
        ),
    )


def name_cameras(fields: FieldMap, raw: RawDataset, cameras: Mapping[str, str]) -> FieldMap:
    """Returns the fields with some cameras under chosen names, and under no other names.

    Args:
      fields: from a reader.
      raw: data set that must hold the cameras.
      cameras: field, such as image_primary -> camera's key.

    Raises:
      ValueError: no such camera.
    """
    for name, key in cameras.items():
        if key not in raw.images:
            raise ValueError(
                f"{name} must be read from a camera of {raw.path}, got {key!r}; "
                f"{did_you_mean(key, raw.images)}"
            )
    others = {name: key for name, key in fields.cameras.items() if key not in cameras.values()}
    return fields._replace(cameras={**others, **cameras})


def _gripper_fields(
    proposed: FieldMap, raw: RawDataset, config: DatasetConfig, action: Sequence[str]
) -> dict[str, Any]:
    """Returns `grippers`, and the range if a robot is named, of the chosen action."""
    robot = ROBOTS.get(config.robot or "")
    dim = len(field_names(raw.columns, action))
    grippers = proposed.grippers if robot is None else robot.grippers.get(dim)
    grippers = grippers if config.grippers is None else config.grippers
    if grippers is None:
        raise ValueError(
            f"{raw.path} must say which of the {dim} numbers of {' + '.join(action)} are grippers, "
            "got no names of dimensions and no known robot of this size; declare them with "
            "--dataset.grippers INDEX (-1 is the last, no index: no gripper) and "
            "--dataset.gripper-range CLOSED OPEN, or choose --dataset.robot from "
            f"{', '.join(ROBOTS)}."
        )
    if robot is None:
        return {"grippers": grippers}
    changed = {"gripper_range": GripperRange(robot.closed, robot.opened), "robot": config.robot}
    return {"grippers": grippers, "gripper_only_open": False, **changed}


def choose_cameras(
    fields: FieldMap, raw: RawDataset, needed: Sequence[str] | None, *, partial: bool = False
) -> dict[str, str]:
    """Returns camera -> key of the needed cameras; None means all that have a key.

    Raises:
      ValueError: a needed camera has no key; with `partial`, none of them has one.
    """
    if partial and needed:
        needed = [name for name in needed if name in fields.cameras] or needed
    for name in needed or ():
        if name not in fields.cameras:
            raise ValueError(
                f"the policy needs the camera {name}, which no camera of {raw.path} is known to be "
                f"(they are {', '.join(raw.images) or 'none'}); name it with --cameras "
                f"{name.removeprefix('image_')}=KEY."
            )
    return {name: fields.cameras[name] for name in (fields.cameras if needed is None else needed)}


def _gripper_range(proposed: FieldMap, config: DatasetConfig) -> GripperRange:
    if config.gripper_range is not None:
        return GripperRange(*config.gripper_range)
    return GripperRange(*RANGES[config.gripper]) if config.gripper else proposed.gripper_range
