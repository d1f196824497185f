"""Conventions of known Open X-Embodiment data sets, and a guess for the others.

`frame` is for the reader of this table; nothing computes with it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vla_jax.data.raw import RawDataset, RawEpisode
from vla_jax.data.readers.fields import FieldMap, GripperRange
from vla_jax.data.readers.rlds.rlds_layout import read_version


class OpenXConvention(NamedTuple):
    """Conventions of a data set that are not in its files."""

    names: str  # regular expression of the data set's name
    fps: float  # control rate, Hz
    fields: FieldMap
    frame: str  # what the action means
    source: str  # where this is taken from


_OPENVLA = "openvla (c8f03f4), prismatic/vla/datasets/rlds/oxe/{configs,transforms}.py"
_OCTO = "octo, octo/data/oxe/oxe_{dataset_configs,standardization_transforms}.py"
_XYZ_RPY = "displacement of the end effector (m) and of its roll, pitch, yaw (rad), robot's base"

OPEN_X: dict[str, OpenXConvention] = {
    "bridge": OpenXConvention(  # from the project's page; the first action of an episode is zero
        names=r"bridge_(dataset|orig).*",
        fps=5.0,
        fields=FieldMap(
            cameras={
                "image_primary": "observation/image_0",
                "image_secondary": "observation/image_1",
            },
            columns={"proprio": ("observation/state",), "action": ("action",)},
            grippers=(6,),
            gripper_range=GripperRange(closed=0.0, opened=1.0),
            robot="bridge",
        ),
        frame=_XYZ_RPY,
        source=f"{_OPENVLA}: bridge_orig; rate: Open X-Embodiment's table of data sets",
    ),
    "bridge_oxe": OpenXConvention(  # as part of Open X-Embodiment
        names=r"bridge(_oxe)?",
        fps=5.0,
        fields=FieldMap(
            cameras={"image_primary": "observation/image"},
            columns={
                "proprio": ("observation/state",),
                "action": ("action/world_vector", "action/rotation_delta", "action/open_gripper"),
            },
            grippers=(6,),
            gripper_range=GripperRange(closed=0.0, opened=1.0),
            robot="bridge_oxe",
        ),
        frame=_XYZ_RPY,
        source=f"{_OPENVLA}: bridge_oxe; rate: Open X-Embodiment's table of data sets",
    ),
    "fractal": OpenXConvention(
        names=r"fractal20220817_data|rt_?1.*",
        fps=3.0,
        fields=FieldMap(
            cameras={"image_primary": "observation/image"},
            columns={
                "proprio": ("observation/base_pose_tool_reached", "observation/gripper_closed"),
                "action": (
                    "action/world_vector",
                    "action/rotation_delta",
                    "action/gripper_closedness_action",
                ),
            },
            grippers=(6,),
            gripper_range=GripperRange(closed=1.0, opened=-1.0),
            gripper_keeps_at_zero=True,
            robot="fractal",
        ),
        frame=_XYZ_RPY,
        source=f"{_OPENVLA}: rt1_dataset_transform; rate: Open X-Embodiment's table of data sets",
    ),
    "droid": OpenXConvention(
        names=r"(r2d2|droid)(_.*)?",
        fps=15.0,
        fields=FieldMap(
            cameras={
                "image_primary": "observation/exterior_image_1_left",
                "image_secondary": "observation/exterior_image_2_left",
                "image_wrist": "observation/wrist_image_left",
            },
            columns={
                "proprio": ("observation/cartesian_position", "observation/gripper_position"),
                "action": ("action_dict/cartesian_velocity", "action_dict/gripper_position"),
            },
            grippers=(6,),
            gripper_range=GripperRange(closed=1.0, opened=0.0),
            robot="droid",
        ),
        frame="normalised velocity of the end effector (position, Euler angles), robot's base",
        source=f"{_OPENVLA}: droid_baseact_transform; schema and rate: droid-dataset.github.io",
    ),
    "libero": OpenXConvention(  # frames without motion are left out, images are upright
        names=r"libero_.*",
        fps=20.0,
        fields=FieldMap(
            cameras={
                "image_primary": "observation/image",
                "image_wrist": "observation/wrist_image",
            },
            columns={"proprio": ("observation/state",), "action": ("action",)},
            grippers=(6,),
            gripper_range=GripperRange(closed=1.0, opened=-1.0),
            robot="libero",
        ),
        frame="normalised displacement of robosuite's OSC_POSE controller (position, axis-angle)",
        source=f"{_OPENVLA}: libero_dataset_transform, regenerate_libero_dataset.py",
    ),
}

_ACTION_PARTS = (  # as RT-X names them, in the order of the concatenated action
    "world_vector", "rotation_delta", "gripper_closedness_action", "open_gripper",
)  # fmt: skip
_PROPRIO = ("state", "proprio", "robot_state", "joint_pos", "joint_position")
_WRIST = re.compile(r"wrist|hand|gripper|in_hand|arm_cam", re.IGNORECASE)
_NUMBERS = ("bool", "int", "uint", "float", "bfloat")
_NUM_SAMPLES = 4  # episodes in which the generic guess looks for grippers


def known_rate(name: str) -> float | None:
    """Returns the control rate of a known data set in Hz, None for others."""
    rates = [each.fps for each in OPEN_X.values() if re.fullmatch(each.names, name)]
    return rates[0] if rates else None


def fields(raw: RawDataset) -> FieldMap:
    """Returns the fields of a known data set, or a guess from names and values.

    A known data set is recognised by its name, and by having all keys of its entry in `OPEN_X`.
    """
    name = read_version(raw.path).name
    for convention in OPEN_X.values():
        fields = convention.fields
        keys = [key for keys in fields.columns.values() for key in keys]
        has_keys = all(key in raw.columns for key in keys)
        has_cameras = all(key in raw.images for key in fields.cameras.values())
        if re.fullmatch(convention.names, name) and has_keys and has_cameras:
            return fields
    return _guess(raw)


def _guess(raw: RawDataset) -> FieldMap:
    """Returns fields by the usual names; grippers and their range from the first episodes."""
    action = _action_keys(raw)
    proprio = [k for k in _PROPRIO if _is_vector(raw, f"observation/{k}")][:1]
    columns = {"action": action} if action else {}
    if proprio:
        columns["proprio"] = (f"observation/{proprio[0]}",)
    grippers, gripper_range = _guess_grippers(raw, action)
    return FieldMap(_guess_cameras(raw), columns, grippers, gripper_range)


def _action_keys(raw: RawDataset) -> tuple[str, ...]:
    """Returns the keys whose concatenation is the action."""
    if _is_vector(raw, "action"):
        return ("action",)
    parts = tuple(f"action/{part}" for part in _ACTION_PARTS if f"action/{part}" in raw.columns)
    if parts:
        return parts
    return tuple(
        key
        for key in raw.columns
        if key.startswith("action/") and _is_vector(raw, key) and "terminate" not in key
    )


def _is_vector(raw: RawDataset, key: str) -> bool:
    feature = raw.columns.get(key)
    if feature is None or not feature.dtype.startswith(_NUMBERS):
        return False
    return len(feature.shape) <= 1 and -1 not in feature.shape


def _guess_cameras(raw: RawDataset) -> Mapping[str, str]:
    """Returns the cameras: the first that is not at the wrist is the primary one."""
    wrist = [key for key in raw.images if _WRIST.search(key.rpartition("/")[2])]
    others = [key for key in raw.images if key not in wrist]
    order = [*others[:1], *wrist[:1]] if others else wrist[:1]
    cameras: dict[str, str] = dict(zip(("image_primary", "image_wrist"), order, strict=False))
    for key in raw.images:
        if key not in order:
            name = key.rpartition("/")[2].removeprefix("image_")
            unique = name if f"image_{name}" not in cameras else key.replace("/", "_")
            cameras[f"image_{unique}"] = key
    return cameras


def _guess_grippers(raw: RawDataset, keys: tuple[str, ...]) -> tuple[tuple[int, ...], GripperRange]:
    """Returns indices and range of the numbers that are (nearly) always at one of two ends.

    Only the last number, and with 14 numbers that in the middle, can be a gripper.
    """
    default = GripperRange(-1.0, 1.0)
    sizes = [int(np.prod(raw.columns[key].shape, dtype=np.int64)) for key in keys]
    total = sum(sizes)
    sampled = [raw.episodes[e] for e in range(min(len(raw.lengths), _NUM_SAMPLES))]
    if total < 2 or not sampled or not raw.lengths[:_NUM_SAMPLES].sum():
        return (), default
    action = np.concatenate([_joined(each, keys, sizes) for each in sampled])
    candidates = [total // 2 - 1, total - 1] if total == 14 else [total - 1]
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        found = tuple(
            index
            for index in candidates
            if action[:, index].min() >= low - 1e-3
            and action[:, index].max() <= high + 1e-3
            and np.mean(np.minimum(abs(action[:, index] - low), abs(action[:, index] - high)) < 0.1)
            > 0.8
        )
        if found:
            return found, GripperRange(low, high)
    return (), default


def _joined(episode: RawEpisode, keys: Sequence[str], sizes: Sequence[int]) -> np.ndarray:
    """Returns `[T, A]` float64, the columns of an episode side by side."""
    steps = len(episode.timestamps)
    parts = [episode.columns[k].reshape(steps, size) for k, size in zip(keys, sizes, strict=True)]
    return np.concatenate(parts, axis=1).astype(np.float64)
