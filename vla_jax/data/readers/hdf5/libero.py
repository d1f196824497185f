"""LIBERO's data sets: one HDF5 file per task with the groups `data/demo_<i>`.

Images are upside down on disk, as OpenGL renders them; users of LIBERO in vision-language-action
work rotate them by 180 degrees, and the fields do so too. Files that OpenVLA regenerated without
idle steps have no attributes: their instruction is in the file name.

Source: LIBERO, `scripts/create_dataset.py` (8f1084e) and `grab_language_from_filename`; openvla,
`regenerate_libero_dataset.py`.
"""

import pathlib
import re
from typing import Any

from vla_jax.data.raw import RawDataset
from vla_jax.data.readers.fields import FieldMap, GripperRange
from vla_jax.data.readers.hdf5.camera_fields import camera_fields
from vla_jax.data.readers.hdf5.demo_groups import json_attribute, member, open_demos
from vla_jax.data.readers.hdf5.layouts import layout_of
from vla_jax.data.readers.hdf5.robomimic import control_rate

FPS = 20.0  # Hz, of all LIBERO tasks
PROPRIO = ("obs/ee_states", "obs/gripper_states")  # position, axis-angle, two fingers


def probe(path: pathlib.Path) -> bool:
    """Returns True for LIBERO's task files."""
    return layout_of(path) == "libero"


def open(path: pathlib.Path, *, split: str | None = None) -> RawDataset:
    """Opens the raw view.

    Episodes of a folder are named `<file>/demo_<i>`, with the index of the file in the order of
    the file names; those of a single file `demo_<i>`.

    Args:
      path: folder of task files, or one of them.
      split: filter key, as in robomimic; LIBERO writes none.

    Raises:
      FileNotFoundError: there is no HDF5 file.
      ValueError: damaged files; unknown filter key; no demos.
      ImportError: h5py is missing.
    """
    return open_demos(
        path, "libero", split=split, numbered=path.is_dir(), instruction=instruction,
        rate=control_rate, usual_fps=FPS,
    )  # fmt: skip


def instruction(data: Any, file: pathlib.Path) -> str:
    """Returns the instruction of a task file, from `problem_info` or from the file's name."""
    found = member(json_attribute(data, "problem_info", file), "language_instruction")
    if isinstance(found, list) and all(isinstance(word, str) for word in found):
        found = " ".join(found)  # tokens of the BDDL file
    if found is None:
        return instruction_from_name(file.stem)
    if not isinstance(found, str):
        raise ValueError(
            f"{file}: language_instruction in the attribute problem_info of data must be a text, "
            f"got {found!r:.60}; correct it."
        )
    return found


def instruction_from_name(stem: str) -> str:
    """Returns the instruction in the name of a task file, as LIBERO does.

    "KITCHEN_SCENE4_put_the_black_bowl_in_the_bottom_drawer_demo" gives "put the black bowl in the
    bottom drawer".
    """
    stem = re.sub(r"^[A-Z_]*SCENE\d+_", "", stem.removesuffix("_demo"))
    return " ".join(stem.split("_"))


def fields(raw: RawDataset) -> FieldMap:
    """Returns the fields of LIBERO: gripper -1 open, +1 closed; images rotated by 180 degrees."""
    proprio = tuple(key for key in PROPRIO if key in raw.columns)
    return FieldMap(
        cameras=camera_fields(
            (key for key in raw.images if key.startswith("obs/")), ("obs/agentview_rgb",)
        ),
        columns={"action": ("actions",), **({"proprio": proprio} if proprio else {})},
        grippers=(-1,),
        gripper_range=GripperRange(closed=1.0, opened=-1.0),
        rotate_images=True,
        robot="libero",
    )
