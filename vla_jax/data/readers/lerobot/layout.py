"""Layout of a LeRobot v3.0 folder: paths and feature keys.

A folder holds `meta/info.json`, `meta/stats.json`, `meta/tasks.parquet`, `meta/episodes/`,
`data/` and `videos/<camera>/`; the last three contain `chunk-000/file-000` files with many
episodes each.
"""

VERSION = "v3.0"
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
INDEX_KEYS = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # in every set
FEATURE_KEYS = {  # field -> the feature's key on disk
    "image_primary": "observation.images.primary",
    "image_wrist": "observation.images.wrist",
    "proprio": "observation.state",
    "environment_state": "observation.environment_state",
    "action": "action",
    # lerobot takes every key that begins with "action" for an action of the robot
    "action_mask": "is_acting",
}
