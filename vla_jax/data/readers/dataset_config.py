"""Config of a data set on disk, shared by all readers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vla_jax.actions.gripper import Gripper
from vla_jax.data.dataset import OnBad


@dataclass(frozen=True)
class DatasetConfig:
    """A data set to read."""

    path: str = "demos/table"  # folder of the data set
    kind: str | None = None  # format, a key of READERS such as "lerobot_v3"; None = detect it
    feature_keys: tuple[tuple[str, str], ...] = ()  # (field, key on disk) for non-default keys
    columns: tuple[str, ...] | None = None  # numeric fields to read besides action; None = all
    gripper: Gripper = "open_positive"  # encoding of the gripper action on disk
    expected_fps: float | None = None  # Hz; data of another rate are an error; None = any rate
    # "on_demand": decode video frames when indexed; "whole": decode all to disk once
    decode: Literal["on_demand", "whole"] = "on_demand"
    cache_bytes: int = 2**30  # bytes of decoded frames cached by each process (on_demand)
    decoded_dir: str | None = None  # folder for decoded frames (whole); None = .frames in path
    on_bad: OnBad = "error"  # episodes with NaN or infinity: "error" stops, "skip" leaves them out

    def __post_init__(self) -> None:
        """Checks the size of the cache."""
        if self.cache_bytes < 0:
            raise ValueError(f"dataset.cache_bytes must be at least 0, got {self.cache_bytes}.")


def upgrade_config(data: Any) -> Any:
    """Converts a saved training config whose `dataset` is still a path to the present fields.

    Such configs were written before `DatasetConfig` existed. They held `gripper` and
    `feature_keys` as separate fields; videos were always decoded as a whole.

    Args:
      data: a training config as JSON; returned unchanged if its `dataset` is not a string.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("dataset"), str):
        return data
    moved = {name: data[name] for name in ("gripper", "feature_keys") if name in data}
    rest = {name: value for name, value in data.items() if name not in moved}
    return {**rest, "dataset": {"path": data["dataset"], "decode": "whole", **moved}}
