"""A small raw data set in memory, of any content, for tests of what is built on readers."""

import pathlib
from functools import partial

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.data.raw import Feature, Lazy, LazyEpisodes, RawDataset, RawEpisode
from vla_jax.data.readers.fields import FieldMap, GripperRange
from vla_jax.data.readers.reader import Reader
from vla_jax.data.still_images import StillImages

LENGTHS = (12, 7, 15, 1)
TASKS = ("put the red block on the plate", "open the drawer")
FPS = 10.0
FIELDS = FieldMap(
    cameras={"image_primary": "observation/top", "image_wrist": "observation/wrist"},
    columns={"action": ("action",), "proprio": ("observation/joints", "observation/hand")},
    grippers=(-1,),
    gripper_range=GripperRange(0.0, 1.0),
)


def draw(length, height, width, seed):
    """Returns smooth images `[T, h, w, 3]` that change at every step."""
    t, y, x = np.mgrid[:length, :height, :width].astype(np.float64)
    waves = [120 + 80 * np.sin(x / 9 + y / (7 + c) + 0.8 * t + seed) for c in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def make_columns(length, seed):
    """Returns the columns of an episode: all dtypes, nested keys, a matrix, texts."""
    rng = np.random.default_rng(seed)
    action = rng.normal(size=(length, 4)).astype(np.float32)
    action[:, -1] = rng.integers(0, 2, length)
    return {
        "action": action,
        "observation/joints": rng.normal(size=(length, 3)),
        "observation/hand": rng.normal(size=length).astype(np.float32),
        "observation/matrix": rng.normal(size=(length, 2, 3)).astype(np.float32),
        "is_last": np.arange(length) == length - 1,
        "count": np.arange(length, dtype=np.int32),
        "phase": np.array([f"phase {i // 4} ü" for i in range(length)]),
    }


def make_episodes(lengths=LENGTHS):
    """Returns episodes as dicts of columns, images, instructions and timestamps."""
    return [
        {
            "name": f"demo_{i}",
            "columns": make_columns(length, i),
            "images": {
                "observation/top": draw(length, 32, 32, i),
                "observation/wrist": draw(length, 24, 40, i + 5),
            },
            "instructions": [TASKS[(i + (t > 8)) % 2] for t in range(length)],
            "timestamps": np.arange(length) / FPS,
        }
        for i, length in enumerate(lengths)
    ]


def make_raw(episodes, path, *, fps=FPS, kind="tiny"):
    """Returns the raw data set of episodes as of `make_episodes`."""
    first = episodes[0]
    lengths = np.array([len(episode["timestamps"]) for episode in episodes])
    return RawDataset(
        kind=kind,
        path=pathlib.Path(path),
        episodes=LazyEpisodes(len(episodes), partial(_episode, episodes)),
        lengths=lengths,
        columns={key: _feature(value) for key, value in first["columns"].items()},
        images={key: Feature("uint8", v.shape[1:]) for key, v in first["images"].items()},
        fps=fps,
        fingerprint=digest(*(_fixed(episode["columns"]) for episode in episodes)),
    )


def reader(episodes, *, fields=FIELDS, fps=FPS):
    """Returns a reader that gives these episodes for every folder with a file "tiny"."""
    return Reader(
        probe=lambda path: (path / "tiny").exists(),
        open=lambda path, *, split: make_raw(episodes, path, fps=fps),
        fields=lambda raw: fields,
    )


def _fixed(columns):
    """Returns the columns of a fixed shape: NumPy cannot hash the bytes of objects."""
    return {key: column for key, column in columns.items() if column.dtype != object}


def _feature(column):
    is_text = column.dtype.kind == "U"
    return Feature("str" if is_text else column.dtype.name, column.shape[1:])


def _episode(episodes, index):
    episode = episodes[index]
    if isinstance(episode, Exception):
        raise episode
    return RawEpisode(
        episode["name"],
        Lazy(list(episode["columns"]), episode["columns"].__getitem__),
        Lazy(list(episode["images"]), partial(_images, episode["images"])),
        episode["instructions"],
        episode["timestamps"],
    )


def _images(images, key):
    frames = images[key]
    return StillImages(len(frames), frames.shape[1:3], frames.__getitem__)
