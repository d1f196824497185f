"""Names of cameras as fields of a `Dataset`, for the HDF5 layouts."""

from collections.abc import Iterable

WRIST = ("wrist", "eye_in_hand", "gripper", "hand")
SUFFIXES = ("_image", "_rgb", "_color")


def camera_fields(keys: Iterable[str], primary: tuple[str, ...] = ()) -> dict[str, str]:
    """Returns a field name for every camera.

    The primary camera is the first of `primary` that exists, else the first that is not on a
    wrist; `image_wrist` is the first on a wrist. Others keep their name: `image_<name>`.

    Args:
      keys: keys of the cameras, in the source's order.
      primary: preferred keys of the primary camera.
    """
    keys = list(keys)
    wrists = [key for key in keys if any(word in key.rpartition("/")[2] for word in WRIST)]
    fronts = [key for key in primary if key in keys] + [k for k in keys if k not in wrists]
    fields = {}
    if fronts or wrists:
        fields["image_primary"] = (fronts or wrists)[0]
    wrists = [key for key in wrists if key not in fields.values()]
    if wrists:
        fields["image_wrist"] = wrists[0]
    for key in keys:
        if key not in fields.values():
            fields[_unused(f"image_{_short(key)}", fields)] = key
    return fields


def _short(key: str) -> str:
    name = key.rpartition("/")[2]
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name.removeprefix("image_") or "camera"


def _unused(name: str, used: Iterable[str]) -> str:
    number = 2
    free = name
    while free in used:
        free, number = f"{name}_{number}", number + 1
    return free
