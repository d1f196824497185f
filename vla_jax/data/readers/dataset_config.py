"""Config of a data set on disk, shared by all readers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vla_jax.actions.action_layout import Gripper
from vla_jax.config import LEAST_FLOAT, checked, did_you_mean
from vla_jax.data.readers.robots import ROBOTS


@dataclass(frozen=True)
@checked(grippers=(-4096, 4095), expected_fps=(LEAST_FLOAT, 1e6), cache_bytes=(0, 2**50))
class DatasetConfig:
    """A data set to read."""

    path: str = "demos/table"  # folder of the data set
    kind: str | None = None  # format, a key of READERS such as "lerobot_v3"; None = detect it
    split: str | None = None  # part such as "train", or a filter key; None = all episodes
    # NAME=KEY of each camera, such as primary=observation.images.top; KEY has no other name then,
    # the other cameras keep those of the format
    cameras: tuple[str, ...] = ()
    # (field, key on disk) of columns, such as proprio and observation.state; KEY[a:b] selects
    # dimensions, KEY+KEY concatenates columns
    feature_keys: tuple[tuple[str, str], ...] = ()
    columns: tuple[str, ...] | None = None  # numeric fields to read besides action; None = all
    # grippers and their range are those of a robot by name, such as so100; None = as the data say
    robot: str | None = None
    gripper: Gripper | None = None  # encoding of the gripper on disk; None = the format's usual one
    # values of a closed and of an open gripper on disk, such as 0 100; overrides gripper
    gripper_range: tuple[float, float] | None = None
    # indices of grippers in the action on disk, such as -1 (the last); empty = no gripper; None =
    # what the data set's format, names of dimensions or robot say
    grippers: tuple[int, ...] | None = None
    rotate_images: bool | None = None  # rotate images by 180 degrees; None = the format's usual way
    # Hz; data of another rate are an error; None = any rate; needed where the data state none
    expected_fps: float | None = None
    instruction: str = ""  # text of the steps that have none
    # "on_demand": decode video frames when indexed; "whole": decode all to disk once; "records":
    # read those that train.cache --frames wrote
    decode: Literal["on_demand", "whole", "records"] = "on_demand"
    # bytes of decoded frames in each process, at most: cached (on_demand), or before train.cache
    # --frames writes them
    cache_bytes: int = 2**30
    # folder for decoded frames (whole, records); None = .frames in path
    decoded_dir: str | None = None
    # leave out and count episodes that cannot be read or hold NaN or infinity; False = an error
    skip_bad_episodes: bool = False

    # The loader compares the data themselves.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("path", "decode", "cache_bytes", "decoded_dir")

    def __post_init__(self) -> None:
        """Checks the size of the cache and the form of the cameras."""
        if self.cache_bytes < 0:
            raise ValueError(f"dataset.cache_bytes must be at least 0, got {self.cache_bytes}.")
        if self.robot is not None and self.robot not in ROBOTS:
            raise ValueError(f"dataset.robot is {self.robot!r}; {did_you_mean(self.robot, ROBOTS)}")
        if self.gripper_range and self.gripper_range[0] == self.gripper_range[1]:
            raise ValueError(
                "dataset.gripper_range must be two different values, of a closed and of an open "
                f"gripper, got {self.gripper_range}."
            )
        for text in self.cameras:
            camera_option(text)

    @staticmethod
    def upgrade(data: Any) -> Any:
        """Converts `on_bad` of an earlier version, "error" or "skip", to `skip_bad_episodes`."""
        if not isinstance(data, Mapping) or "on_bad" not in data:
            return data
        data = {"skip_bad_episodes": data["on_bad"] == "skip", **data}
        return {name: value for name, value in data.items() if name != "on_bad"}


def camera_option(text: str) -> tuple[str, str]:
    """Returns field and key of a camera option: `top=KEY` and `image_top=KEY` name `image_top`.

    Raises:
      ValueError: not of the form NAME=KEY.
    """
    name, _, key = text.partition("=")
    if not key or not name.isidentifier():
        raise ValueError(
            "dataset.cameras must be NAME=KEY, such as primary=observation.images.top, got "
            f"{text!r}."
        )
    return name if name.startswith("image_") else f"image_{name}", key


def upgrade_config(data: Any) -> Any:
    """Converts the data set in an older saved training config to the present fields.

    At first `dataset` was a path, `gripper` and `feature_keys` were separate fields, and videos
    were always decoded as a whole. Later `gripper` was "open_positive" unless set; now it is None.

    Args:
      data: a training config as JSON; returned unchanged if it is not an older one.
    """
    if not isinstance(data, Mapping):
        return data
    dataset = data.get("dataset")
    if isinstance(dataset, str):
        moved = {name: data[name] for name in ("gripper", "feature_keys") if name in data}
        data = {name: value for name, value in data.items() if name not in moved}
        dataset = {"path": dataset, "decode": "whole", **moved}
    if not isinstance(dataset, Mapping) or "cameras" in dataset:
        return data
    if dataset.get("gripper") == "open_positive":
        dataset = {**dataset, "gripper": None}
    return {**data, "dataset": dataset}
