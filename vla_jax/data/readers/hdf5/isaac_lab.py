"""Isaac Lab's recordings: HDF5 files with the groups `data/demo_<i>`, nested to any depth.

`initial_state` describes the start of an episode and is no column. Source: Isaac Lab,
`isaaclab/utils/datasets/hdf5_dataset_file_handler.py`; `env_args` has the type 2.
"""

import pathlib
from typing import Any

from vla_jax.data.raw import RawDataset
from vla_jax.data.readers.fields import FieldMap, GripperRange
from vla_jax.data.readers.hdf5.camera_fields import camera_fields
from vla_jax.data.readers.hdf5.demo_groups import member, open_demos
from vla_jax.data.readers.hdf5.hdf5_files import hdf5_paths
from vla_jax.data.readers.hdf5.layouts import layout_of

PROPRIO = (("eef_pos", "eef_quat", "gripper_pos"), ("joint_pos", "joint_vel"))  # first complete


def probe(path: pathlib.Path) -> bool:
    """Returns True for Isaac Lab's recordings."""
    return layout_of(path) == "isaac_lab"


def open(path: pathlib.Path, *, split: str | None = None) -> RawDataset:
    """Opens the raw view; arguments, names and errors as for robomimic's files."""
    several = len(hdf5_paths(path)) > 1
    return open_demos(
        path, "isaac_lab", split=split, numbered=several, skip=("initial_state",),
        rate=step_rate, usual_fps=None,
    )  # fmt: skip


def step_rate(env_args: dict[str, Any]) -> Any:
    """Returns the steps per second, from the physics' time step and decimation; None if missing."""
    step, decimation = (member(env_args, "sim_args", key) for key in ("dt", "decimation"))
    if step is None or decimation is None:
        return None
    try:
        return 1.0 / (float(step) * float(decimation))
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):  # a text is refused
        return str((step, decimation))


def fields(raw: RawDataset) -> FieldMap:
    """Returns the fields of Isaac Lab's manipulation tasks: last action +1 open, -1 closed.

    Source: `BinaryJointAction` of Isaac Lab: negative values close. Actions of other sizes than
    7 and 8 (one arm and a gripper) have no gripper here.
    """
    size = raw.columns["actions"].shape[0] if raw.columns["actions"].shape else 1
    proprio = _proprio(raw)
    return FieldMap(
        cameras=camera_fields(key for key in raw.images if key.startswith("obs/")),
        columns={"action": ("actions",), **({"proprio": proprio} if proprio else {})},
        grippers=(-1,) if size in (7, 8) else (),
        gripper_range=GripperRange(closed=-1.0, opened=1.0),
        robot="isaac_lab",
    )


def _proprio(raw: RawDataset) -> tuple[str, ...]:
    by_name = {k.rpartition("/")[2]: k for k in reversed(list(raw.columns)) if k.startswith("obs/")}
    for names in PROPRIO:
        if all(name in by_name for name in names):
            return tuple(by_name[name] for name in names)
    return ()
