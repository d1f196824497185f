"""A small LeRobot v3.0 data set for tests, and ways to damage it."""

import json

import numpy as np
import pyarrow.parquet as pq

from vla_jax.data.dataset import Episode
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.reader import read_dataset

LENGTHS = (7, 3, 12)
TASKS = ("lift the red block", "touch the blue block", "lift the red block")
NAMES = {"action": ["dx", "gripper"], "proprio": ["x", "y", "z"]}
CAMERAS = {"image_primary": "observation.images.primary", "image_wrist": "observation.images.wrist"}


def draw(length, rng):
    """Returns images `[T, 32, 32, 3]` of small coloured blocks that move over a shaded table."""
    y, x = np.mgrid[:32, :32]
    table = np.stack([150 + x / 2, 140 + y / 2, 120 + 0 * x], axis=-1)
    images = np.repeat(table[None], length, axis=0)
    for colour in ([200, 30, 30], [40, 60, 210], [230, 200, 40]):
        r, c = rng.integers(0, 20, 2)
        for t in range(length):
            images[t, r : r + 4, c + t // 2 : c + 6 + t // 2] = colour
    return images.astype(np.uint8)


def make_episodes():
    """Yields three episodes with two cameras."""
    rng = np.random.default_rng(0)
    for length, task in zip(LENGTHS, TASKS, strict=True):
        action = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
        action[:, -1] = np.sign(action[:, -1])
        observation = {
            "image_primary": draw(length, rng),
            "image_wrist": draw(length, rng),
            "proprio": rng.normal(size=(length, 3)).astype(np.float32),
            "environment_state": rng.normal(size=(length, 1)).astype(np.float32),
        }
        yield Episode(observation, action, task)


def change_info(root, **fields):
    """Overwrites fields of `meta/info.json`."""
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, **fields}))


def change_table(path, name, change):
    """Replaces a column of a Parquet file by `change(column)`."""
    table = pq.read_table(path)
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, change(table[name])), path)


def read(root, *, cameras=None, image_size=None, decode="whole", config_cameras=(), **fields):
    """Reads the data set with the fields of `DatasetConfig`."""
    config = DatasetConfig(str(root), decode=decode, cameras=config_cameras, **fields)
    return read_dataset(config, cameras=cameras, image_size=image_size)


def data_path(root):
    """Returns the path of the only data file."""
    return root / "data/chunk-000/file-000.parquet"
