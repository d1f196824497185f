"""Description of the features of a LeRobot v3.0 data set, and of its totals: `meta/info.json`."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vla_jax.data.raw import Feature
from vla_jax.data.readers.lerobot import layout, shards


def features_json(
    columns: Mapping[str, Feature], images: Mapping[str, Feature], fps: float
) -> dict[str, dict[str, Any]]:
    """Returns `features` of info.json: dtype, shape and names of every per-frame value.

    Args:
      columns: key -> type of a column, with lerobot's dtypes.
      images: key -> type of a camera, of shape (h, w, 3).
      fps: Hz.
    """
    features = {
        key: {
            "dtype": feature.dtype,
            "shape": list(feature.shape),
            "names": list(feature.names) or None,
        }
        for key, feature in columns.items()
    }
    features |= {key: _video(feature.shape, fps) for key, feature in images.items()}
    for key in layout.INDEX_KEYS:
        dtype = "float32" if key == "timestamp" else "int64"
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def write_description(
    root: pathlib.Path,
    features: Mapping[str, Any],
    tasks: Sequence[str],
    totals: Mapping[str, Any],
    *,
    num_episodes: int,
    num_frames: int,
    fps: float,
    robot_type: str,
) -> None:
    """Writes `meta/info.json`, `meta/stats.json` and `meta/tasks.parquet`.

    Args:
      root: folder of the data set.
      features: from `features_json`.
      tasks: all texts, in the order of their index.
      totals: statistics per feature.
      num_episodes: E.
      num_frames: F.
      fps: Hz.
      robot_type: name of the robot.
    """
    import pyarrow.parquet as pq

    info = {
        "codebase_version": layout.VERSION,
        "robot_type": robot_type,
        "total_episodes": num_episodes,
        "total_frames": num_frames,
        "total_tasks": len(tasks),
        "chunks_size": shards.CHUNK_FILES,
        "data_files_size_in_mb": shards.DATA_MB,
        "video_files_size_in_mb": shards.VIDEO_MB,
        "fps": _rate(fps),
        "splits": {"train": f"0:{num_episodes}"},
        "data_path": layout.DATA_PATH,
        "video_path": layout.VIDEO_PATH,
        "features": features,
    }
    pq.write_table(_task_table(tasks), root / layout.TASKS_PATH)
    (root / layout.STATS_PATH).write_text(json.dumps(totals, indent=4))
    (root / layout.INFO_PATH).write_text(json.dumps(info, indent=4))


def _video(shape: tuple[int, ...], fps: float) -> dict[str, Any]:
    height, width, channels = shape
    return {
        "dtype": "video",
        "shape": [height, width, channels],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.channels": channels,
            "video.codec": shards.CODEC_NAME,
            "video.pix_fmt": shards.PIXELS,
            "video.is_depth_map": False,
            "video.fps": _rate(fps),
            "has_audio": False,
        },
    }


def _rate(fps: float) -> int | float:
    return int(fps) if float(fps).is_integer() else float(fps)


def _task_table(tasks: Sequence[str]) -> Any:
    """Returns the task table that lerobot reads: the text is the index of a pandas frame."""
    import pyarrow as pa

    def column(name: str, pandas_type: str, numpy_type: str) -> dict[str, Any]:
        types = {"pandas_type": pandas_type, "numpy_type": numpy_type}
        return {"name": name, "field_name": name, **types, "metadata": None}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table(
        {
            "task_index": pa.array(range(len(tasks)), pa.int64()),
            "task": pa.array(tasks, pa.string()),
        }
    )
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
