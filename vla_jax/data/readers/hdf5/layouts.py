"""Recognition of the layout of HDF5 files, from their first file."""

import pathlib
from typing import Any

from vla_jax.data.readers.hdf5.demo_groups import env_args, member
from vla_jax.data.readers.hdf5.hdf5_files import hdf5_paths, open_file

FALLBACK = "robomimic"  # its reader explains what is wrong with a file
LIBERO_ATTRIBUTES = ("problem_info", "bddl_file_name", "bddl_file_content")


def layout_of(path: pathlib.Path) -> str | None:
    """Returns the layout of HDF5 files, a key of READERS; None if there are none.

    A damaged or unknown file has robomimic's layout, whose reader raises the error.
    """
    try:
        files = hdf5_paths(path)
    except OSError:  # opening the path raises the error
        return None
    if not files:
        return None
    try:
        with open_file(files[0]) as file:
            return _layout(file, files[0])
    except (ImportError, OSError, ValueError, LookupError, TypeError, RuntimeError,
            AttributeError, MemoryError):  # fmt: skip
        return FALLBACK


def _layout(file: Any, path: pathlib.Path) -> str:
    if "action" in file and "observations" in file:
        return "aloha"
    if "data" not in file:
        names = list(file)[:2]
        inner = [name for each in names for name in (each, *list(file[each])[:2])]
        return "robomme" if any(name.startswith("episode_") for name in inner) else FALLBACK
    data = file["data"]
    if any(name in data.attrs for name in LIBERO_ATTRIBUTES):
        return "libero"
    demo = next((data[name] for name in data), {})
    observations = demo.get("obs", {})
    if "agentview_rgb" in observations or "eye_in_hand_rgb" in observations:
        return "libero"
    is_nested = any(hasattr(item, "keys") for item in observations.values())
    states = demo.get("states")
    if is_nested or "initial_state" in demo or hasattr(states, "keys"):
        return "isaac_lab"
    return "isaac_lab" if member(env_args(data, path), "type") == 2 else FALLBACK
