"""Config of a data set on disk, shared by all readers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vla_jax.actions.action_layout import Gripper
from vla_jax.data.dataset import OnBad


@dataclass(frozen=True)
class DatasetConfig:
    """A data set to read."""

    path: str = "demos/table"  # folder of the data set
    kind: str | None = None  # format, a key of READERS such as "lerobot_v3"; None = detect it
    split: str | None = None  # part such as "train", or a filter key; None = all episodes
    # NAME=KEY of each camera, such as primary=observation.images.top; others keep their default
    cameras: tuple[str, ...] = ()
    # (field, key on disk) of columns, such as proprio and observation.state; KEY[a:b] selects
    # dimensions, KEY+KEY concatenates columns
    feature_keys: tuple[tuple[str, str], ...] = ()
    columns: tuple[str, ...] | None = None  # numeric fields to read besides action; None = all
    gripper: Gripper | None = None  # encoding of the gripper on disk; None = the format's usual one
    # values of a closed and of an open gripper on disk, such as 0 100; overrides gripper
    gripper_range: tuple[float, float] | None = None
    # indices of grippers in the action on disk, such as -1 (the last); empty = no gripper; None =
    # what the format or robot usually has
    grippers: tuple[int, ...] | None = None
    rotate_images: bool | None = None  # rotate images by 180 degrees; None = the format's usual way
    # Hz; data of another rate are an error; None = any rate; needed where the data state none
    expected_fps: float | None = None
    instruction: str = ""  # text of the steps that have none
    # "on_demand": decode video frames when indexed; "whole": decode all to disk once
    decode: Literal["on_demand", "whole"] = "on_demand"
    cache_bytes: int = 2**30  # bytes of decoded frames cached by each process (on_demand)
    decoded_dir: str | None = None  # folder for decoded frames (whole); None = .frames in path
    on_bad: OnBad = "error"  # episodes with NaN or infinity: "error" stops, "skip" leaves them out

    # The loader compares the data themselves.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("path", "decode", "cache_bytes", "decoded_dir")

    def __post_init__(self) -> None:
        """Checks the size of the cache and the form of the cameras."""
        if self.cache_bytes < 0:
            raise ValueError(f"dataset.cache_bytes must be at least 0, got {self.cache_bytes}.")
        for text in self.cameras:
            camera_option(text)


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
