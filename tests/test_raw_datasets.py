"""Law 10: a data set read by us is equal to what the original tool reads.

A format is a folder of `tests/datasets` and an entry of `FORMATS`.
"""

import concurrent.futures
import hashlib
import json
import pathlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest

from vla_jax.data import readers
from vla_jax.data.readers.reader import READERS

DATASETS = pathlib.Path(__file__).parent / "datasets"


def libero_texts(expected):
    return {
        f"{file['number']}/{episode['demo']}": file["instruction"]
        for file in expected["files"]
        for episode in file["episodes"]
    }


def robomimic_texts(expected):
    return {episode["demo"]: "" for episode in expected["episodes"]}


def calvin_texts(expected):
    return {
        f"{name}/segment{segment['segment']}": segment["instruction"]
        for name, split in expected["splits"].items()
        for segment in split["segments"]
    }


def lerobot_texts(expected):
    return {str(e["episode_index"]): e["instruction"] for e in expected["episodes"]}


def rlds_texts(expected):
    return {
        f"{episode['split']}/{episode['stored_order']}": episode["instruction"]
        for episode in expected["episodes"]
    }


class Format(NamedTuple):
    kind: str
    texts: Callable[[Any], Mapping[str, Any]]  # expected.json -> episode -> text, or one per step
    fps: float | None
    mean: float = 0.0  # largest mean difference of images
    maximum: int = 0  # largest difference of images


FORMATS = {
    "calvin": Format("calvin", calvin_texts, 30.0),
    "lerobot_v21": Format("lerobot_v2", lerobot_texts, 10.0, 1.0, 255),
    "lerobot_v30": Format("lerobot_v3", lerobot_texts, 10.0, 1.0, 255),
    "libero": Format("libero", libero_texts, 20.0),
    "rlds": Format("rlds", rlds_texts, None, mean=1.1, maximum=4),
    "robomimic": Format("robomimic", robomimic_texts, 20.0),
}


@pytest.fixture(scope="module", params=sorted(FORMATS))
def case(request):
    """Format, source, and episode -> key -> expected array."""
    folder = DATASETS / request.param
    source = readers.open(folder / "dataset")
    names = [episode.name for episode in source.episodes]
    expected: dict = {name: {} for name in names}
    with np.load(folder / "expected.npz") as arrays:
        for key in arrays.files:
            name = max((n for n in names if key.startswith(f"{n}/")), key=len)
            expected[name][key[len(name) + 1 :]] = arrays[key]
        order = list(
            dict.fromkeys(n for key in arrays.files for n in names if key.startswith(f"{n}/"))
        )
    assert order == names
    return (
        FORMATS[request.param],
        source,
        expected,
        json.loads((folder / "expected.json").read_text()),
    )


def assert_same(form, actual, expected):
    assert actual.dtype == np.uint8
    assert actual.shape == expected.shape
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max(initial=0) <= form.maximum
    assert not difference.size or difference.mean() <= form.mean


def test_the_reader_is_found_and_gives_types(case):
    form, source, _, _ = case
    assert source.kind == form.kind
    assert source.fps == form.fps
    assert [len(e.timestamps) for e in source.episodes] == source.lengths.tolist()
    for key, feature in source.columns.items():
        column = source.episodes[0].columns[key]
        assert ("str" if column.dtype.kind == "U" else column.dtype.name) == feature.dtype
        assert column.shape[1:] == feature.shape or -1 in feature.shape
    for key, feature in source.images.items():
        assert source.episodes[0].images[key].shape[1:] == feature.shape


def test_columns_are_equal_with_their_types(case):
    _, source, expected, _ = case
    for episode in source.episodes:
        keys = {key.partition("@")[0] for key in expected[episode.name]}
        assert keys <= {*episode.columns, *episode.images}
        for key, value in expected[episode.name].items():
            if key in episode.columns:
                column = episode.columns[key]
                assert column.dtype == value.dtype, key
                np.testing.assert_array_equal(column, value, key)


def test_images_are_equal(case):
    form, source, expected, _ = case
    for episode in source.episodes:
        for key, value in expected[episode.name].items():
            if key.endswith("@sha256"):
                images = episode.images[key.removesuffix("@sha256")]
                digest = hashlib.sha256(images[:].tobytes()).hexdigest()
                assert [digest, str(images.shape)] == value.tolist()
            elif key in episode.images:
                assert_same(form, episode.images[key][:], value)


def test_images_are_indexed_like_an_array(case):
    _, source, _, _ = case
    episode = source.episodes[0]
    for images in episode.images.values():
        whole = images[:]
        assert images.shape == whole.shape
        for index in (slice(4, 9), slice(None, None, -2), 2, -1, [3, -1, 3], np.array([[0, 1]])):
            np.testing.assert_array_equal(images[index], whole[index])
        small = images.read(np.array([0, 3]), (8, 10))
        assert small.shape == (2, 8, 10, 3)
        assert images.read(np.array([], int), (8, 10)).shape == (0, 8, 10, 3)
        with pytest.raises(IndexError):
            images[len(images)]


def test_every_step_has_its_instruction(case):
    form, source, _, record = case
    texts = form.texts(record)
    for episode, length in zip(source.episodes, source.lengths, strict=True):
        text = texts[episode.name]
        assert list(episode.instructions) == ([text] * length if isinstance(text, str) else text)


def test_timestamps_are_seconds_from_the_first_step(case):
    form, source, _, _ = case
    for episode, length in zip(source.episodes, source.lengths, strict=True):
        assert episode.timestamps.dtype == np.float64
        np.testing.assert_allclose(
            episode.timestamps, np.arange(length) / (form.fps or 1.0), atol=1e-6
        )


def test_a_pickled_copy_and_two_threads_read_the_same(case):
    _, source, _, _ = case
    copy = pickle.loads(pickle.dumps(source))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for key in source.columns:
            both = pool.map(lambda e, key=key: e.columns[key], (copy.episodes[1], copy.episodes[1]))
            for column in both:
                np.testing.assert_array_equal(column, source.episodes[1].columns[key])
        for key in source.images:
            for images in pool.map(lambda e, key=key: e.images[key][:3], [copy.episodes[0]] * 2):
                np.testing.assert_array_equal(images, source.episodes[0].images[key][:3])


def test_the_proposed_fields_exist(case):
    _, source, _, _ = case
    reader = READERS[source.kind]
    assert reader.fields
    found = reader.fields(source)
    assert set(found.cameras.values()) <= set(source.images)
    assert "image_primary" in found.cameras
    keys = {key.partition("[")[0] for keys in found.columns.values() for key in keys}
    assert keys <= set(source.columns)
    assert "action" in found.columns


def test_the_fingerprint_does_not_depend_on_the_place(case, tmp_path):
    _, source, _, _ = case
    (tmp_path / "moved").symlink_to(source.path.resolve(), target_is_directory=True)
    assert readers.open(tmp_path / "moved").fingerprint == source.fingerprint
