"""Fields that a converted LeRobot data set states itself, in `meta/vla_jax_fields.json`.

LeRobot's own description has no place for the grippers' range; lerobot ignores the file.
"""

import pathlib

from vla_jax.data.readers.fields import FieldMap, GripperRange
from vla_jax.files import read_json, write_json

FIELDS_PATH = "meta/vla_jax_fields.json"


def write_fields(root: pathlib.Path, fields: FieldMap) -> None:
    """Writes the fields of a data set."""
    write_json(root / FIELDS_PATH, {**fields._asdict(), "gripper_range": fields.gripper_range})


def read_fields(root: pathlib.Path) -> FieldMap | None:
    """Returns the fields that a data set states, None if it does not.

    Raises:
      ValueError: the file is damaged.
    """
    path = root / FIELDS_PATH
    if not path.is_file():
        return None
    data = read_json(path, "fields of a data set")
    try:
        closed, opened = (float(value) for value in data["gripper_range"])
        return FieldMap(
            cameras={str(field): str(key) for field, key in data["cameras"].items()},
            columns={str(f): tuple(map(str, keys)) for f, keys in data["columns"].items()},
            grippers=(
                None
                if data["grippers"] is None
                else tuple(int(index) for index in data["grippers"])
            ),
            gripper_range=GripperRange(closed, opened),
            gripper_keeps_at_zero=bool(data.get("gripper_keeps_at_zero", False)),
            gripper_only_open=bool(data.get("gripper_only_open", False)),
            rotate_images=bool(data["rotate_images"]),
            robot=str(data["robot"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold the fields that a conversion wrote, got {error!r}; convert the data "
            "again or delete the file."
        ) from error
