"""ALOHA's recordings: one HDF5 file per episode.

`action` and `observations/qpos` have 14 numbers, two arms of 6 joints and a gripper each. Images
in `observations/images/<camera>` are arrays, or JPEG files padded to one length, whose colours are
those of the JPEG standard, as in openpi's converter. There is no instruction, and no rate in the
file: the recordings have 50 steps per second.

Source: tonyzhaozh/act, `utils.py` and `constants.py` (DT = 0.02); act-plus-plus (`compress_len`);
openpi, `examples/aloha_real/convert_aloha_data_to_lerobot.py`.
"""

import functools
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_jax.data.lazy_lengths import LazyLengths
from vla_jax.data.raw import Feature, RawDataset
from vla_jax.data.readers.fields import FieldMap, GripperRange
from vla_jax.data.readers.hdf5.camera_fields import camera_fields
from vla_jax.data.readers.hdf5.hdf5_files import OpenFiles, hdf5_paths, reading
from vla_jax.data.readers.hdf5.hdf5_objects import (
    MAX_IMAGE_PIXELS,
    MAX_LENGTH,
    check_dataset,
    child,
    num_rows,
    read_steps,
    walk,
)
from vla_jax.data.readers.hdf5.layouts import layout_of
from vla_jax.data.readers.hdf5.stored_episodes import (
    EpisodeContent,
    EpisodeIndex,
    EpisodePlace,
    Storage,
    group_of,
    inspect_group,
    load_column,
    make_source,
)

FPS = 50.0  # Hz
IMAGES = "observations/images/"
PROPRIO = "observations/qpos"


def probe(path: pathlib.Path) -> bool:
    """Returns True for ALOHA's recordings."""
    return layout_of(path) == "aloha"


def open(path: pathlib.Path, *, split: str | None = None) -> RawDataset:
    """Opens the raw view; the episodes are named as their files and sorted by number.

    Args:
      path: folder of files `episode_<i>.hdf5`, or one file.
      split: must be None, the format has no splits.

    Raises:
      FileNotFoundError: there is no HDF5 file.
      ValueError: damaged files.
      ImportError: h5py is missing.
    """
    if split is not None:
        raise ValueError(f"{path}: ALOHA's recordings have no splits, got split {split!r}.")
    files = sorted(hdf5_paths(path), key=_number)
    if not files:
        raise FileNotFoundError(f"{path} must hold HDF5 files (.hdf5, .h5), got none.")
    opened = OpenFiles()
    lengths = functools.partial(_lengths, opened, tuple(files))
    places = [EpisodePlace(file.stem, number, "", "") for number, file in enumerate(files)]
    index = EpisodeIndex(
        "aloha", tuple(files), places, LazyLengths(len(files), lengths), FPS,
        "action", ("compress_len",), opened,
    )  # fmt: skip
    return make_source(path, index, Storage(_inspect, load_column, _load))


def _number(file: pathlib.Path) -> tuple[int, str]:
    digits = file.stem.rpartition("_")[2]
    return (int(digits) if digits.isascii() and digits.isdigit() else 0), file.name


def _lengths(
    opened: OpenFiles, files: Sequence[pathlib.Path], episodes: Sequence[int]
) -> np.ndarray:
    return np.array([_length(opened, files[episode]) for episode in episodes], np.int64)


def _length(opened: OpenFiles, file: pathlib.Path) -> int:
    """Returns the number of steps of a file; 0 if it cannot be read."""
    try:
        length = num_rows(opened.get(file), "action", file)
    except (OSError, ValueError):  # reading the episode raises the error
        return 0
    return length if length < MAX_LENGTH else 0


def _inspect(root: Any, path: pathlib.Path, length: int, index: EpisodeIndex) -> EpisodeContent:
    """Returns the types of an episode's keys; sizes of compressed images are in their files."""
    content = inspect_group(root, path, length, index)
    for key, dataset in walk(root, path, skip=index.skip).items():
        if key.startswith(IMAGES) and key not in content.images and _is_encoded(dataset):
            content.columns.pop(key, None)
            check_dataset(dataset, path)
            first = _decode(read_rows(dataset, np.arange(1), path)[0], path, key, only_size=True)
            content.images[key] = Feature("uint8", (*first.shape[:2], 3))
    return content


def _is_encoded(dataset: Any) -> bool:
    is_padded = dataset.ndim == 2 and dataset.dtype == np.uint8
    return is_padded or (dataset.ndim == 1 and dataset.dtype.kind == "O")


def read_rows(dataset: Any, steps: np.ndarray, path: pathlib.Path) -> Any:
    """Returns rows of padded bytes, or of texts of various lengths."""
    if dataset.dtype.kind != "O":
        return read_steps(dataset, steps, path)
    with reading(path, dataset.name):
        return [dataset[int(step)] for step in steps]


def _load(index: EpisodeIndex, episode: int, key: str, steps: np.ndarray) -> np.ndarray:
    root, path = group_of(index, episode)
    dataset = child(root, key, path)
    check_dataset(dataset, path)
    if not _is_encoded(dataset):
        return read_steps(dataset, steps, path)
    first = _decode(read_rows(dataset, np.arange(1), path)[0], path, key, only_size=True)
    images = np.empty((len(steps), *first.shape[:2], 3), np.uint8)
    for row, (step, data) in enumerate(zip(steps, read_rows(dataset, steps, path), strict=True)):
        image = _decode(data, path, f"{key} at step {step}")
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"{path}: {key} at step {step} must be {images.shape[1:3]} pixels as the first, "
                f"got {image.shape[:2]}; leave the episode out."
            )
        images[row] = image
    return images


def _decode(data: Any, path: pathlib.Path, place: str, *, only_size: bool = False) -> np.ndarray:
    """Returns the image `[h, w, 3]` in JPEG or PNG bytes, which zeros may follow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "reading compressed images needs Pillow; install it with `pip install 'vla-jax[data]'`."
        ) from error
    with reading(path, place), Image.open(io.BytesIO(bytes(data)), formats=("JPEG", "PNG")) as file:
        if file.width * file.height > MAX_IMAGE_PIXELS:
            raise OSError(f"{file.width} x {file.height} pixels are too many")
        if only_size:
            return np.broadcast_to(np.uint8(0), (file.height, file.width, 3))
        return np.asarray(file.convert("RGB"))


def fields(raw: RawDataset) -> FieldMap:
    """Returns the fields of ALOHA: the grippers are the last number of each arm, 0 closed, 1 open.

    Source: tonyzhaozh/act, `constants.py`: gripper positions are normalised to [0, 1].
    """
    size = raw.columns["action"].shape[0] if raw.columns["action"].shape else 1
    columns = {"action": ("action",)}
    if PROPRIO in raw.columns:
        columns["proprio"] = (PROPRIO,)
    preferred = (f"{IMAGES}cam_high", f"{IMAGES}top")
    return FieldMap(
        cameras=camera_fields((k for k in raw.images if k.startswith(IMAGES)), preferred),
        columns=columns,
        grippers=tuple(range(6, size, 7)) if size % 7 == 0 else (),
        gripper_range=GripperRange(closed=0.0, opened=1.0),
        robot="aloha",
    )
