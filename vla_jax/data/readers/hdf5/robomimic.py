"""robomimic's data sets: one HDF5 file with the groups `data/demo_<i>`.

Source: robomimic 0.3.0, `robomimic/utils/dataset.py` (SequenceDataset) and its documentation of
the file format. Demos are sorted by number, under a filter key too. There is no instruction.
"""

import pathlib
from typing import Any

from vla_jax.data.raw import RawDataset
from vla_jax.data.readers.fields import FieldMap, GripperRange
from vla_jax.data.readers.hdf5.camera_fields import camera_fields
from vla_jax.data.readers.hdf5.demo_groups import member, open_demos
from vla_jax.data.readers.hdf5.hdf5_files import hdf5_paths
from vla_jax.data.readers.hdf5.layouts import layout_of

PROPRIO = ("eef_pos", "eef_quat", "gripper_qpos")  # of each robot, robomimic's low-dim default


def probe(path: pathlib.Path) -> bool:
    """Returns True for HDF5 files that belong to no other layout."""
    return layout_of(path) == "robomimic"


def open(path: pathlib.Path, *, split: str | None = None) -> RawDataset:
    """Opens the raw view.

    Episodes are named `demo_3`, in a folder with several files `1/demo_3`.

    Args:
      path: file, or folder of files.
      split: filter key such as "train"; None means all demos.

    Raises:
      FileNotFoundError: there is no HDF5 file.
      ValueError: damaged files; unknown filter key; no demos.
      ImportError: h5py is missing.
    """
    several = len(hdf5_paths(path)) > 1
    return open_demos(
        path, "robomimic", split=split, numbered=several, rate=control_rate, usual_fps=None
    )


def control_rate(env_args: dict[str, Any]) -> Any:
    """Returns robosuite's control frequency, Hz; None if not stated."""
    return member(env_args, "env_kwargs", "control_freq")


def fields(raw: RawDataset) -> FieldMap:
    """Returns the fields of robosuite's conventions: gripper -1 open, +1 closed, last of each arm.

    Source: robosuite, `GripperModel.format_action` of the Panda gripper.
    """
    robots = [n for n in range(8) if f"obs/robot{n}_eef_pos" in raw.columns]
    proprio = tuple(
        key
        for robot in robots
        for key in (f"obs/robot{robot}_{name}" for name in PROPRIO)
        if key in raw.columns
    )
    size = raw.columns["actions"].shape[0] if raw.columns["actions"].shape else 1
    arms = len(robots) or max(1, size // 7)
    per_arm = size // arms
    grippers = tuple(per_arm * (arm + 1) - 1 for arm in range(arms)) if size == 7 * arms else ()
    return FieldMap(
        cameras=camera_fields(
            (key for key in raw.images if key.startswith("obs/")), ("obs/agentview_image",)
        ),
        columns={"action": ("actions",), **({"proprio": proprio} if proprio else {})},
        grippers=grippers,
        gripper_range=GripperRange(closed=1.0, opened=-1.0),
        robot="robosuite",
    )
