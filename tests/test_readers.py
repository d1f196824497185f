"""Laws of data set readers, with a toy format added from outside of the library."""

import functools
import pathlib

import numpy as np
import pytest
import tiny_demos
import tiny_lerobot

from train.imitate import imitate
from vla_jax.backbones import word_hashing
from vla_jax.data import normalize
from vla_jax.data.dataset import Episode, from_episodes
from vla_jax.data.raw_arrays import ArrayEpisode, make_raw
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.fields import FieldMap
from vla_jax.data.readers.lerobot import writer
from vla_jax.data.readers.reader import READERS, Reader, read_dataset
from vla_jax.data.windows import WindowConfig, Windows
from vla_jax.envs.table import rules
from vla_jax.runs import load_run

LENGTHS = (9, 6, 8)
SIZES = {"proprio": rules.PROPRIO_SIZE, "environment_state": rules.STATE_SIZE}


def make_episodes():
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        observation = {name: rng.normal(size=(length, size)) for name, size in SIZES.items()}
        observation["image_wrist"] = rng.integers(0, 256, (length, 4, 4, 3), np.uint8)
        yield Episode(observation, rng.uniform(-1, 1, (length, 7)), "lift the red block")


def write_npz(folder):
    """Writes one file per episode, the toy format."""
    for index, episode in enumerate(make_episodes()):
        fields = {**episode.observation, "action": episode.action}
        np.savez(folder / f"{index}.npz", instruction=episode.instruction, **fields)
    return folder


def probe_npz(path: pathlib.Path) -> bool:
    return bool(list(path.glob("*.npz")))


def open_npz(path, *, split=None):
    episodes = []
    for file in sorted(path.glob("*.npz")):
        fields = dict(np.load(file))
        text, images = str(fields.pop("instruction")), {"wrist": fields.pop("image_wrist")}
        episodes.append(ArrayEpisode(fields, images, [text] * len(fields["action"])))
    return make_raw("npz", path, episodes, fps=10)


def npz_fields(raw):
    columns = {name: (name,) for name in raw.columns}
    return FieldMap(cameras={"image_wrist": "wrist"}, columns=columns, grippers=(-1,))


@pytest.fixture
def npz(monkeypatch, tmp_path):
    """Writes a folder of the toy format and registers its reader."""
    monkeypatch.setitem(READERS, "npz", Reader(probe_npz, open_npz, npz_fields))
    (tmp_path / "npz").mkdir()
    return write_npz(tmp_path / "npz")


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory):
    root = tmp_path_factory.mktemp("lerobot") / "data"
    return writer.write(root, tiny_lerobot.make_episodes(), fps=10)


def make_windows(dataset):
    stats = normalize.compute_norm_stats(dataset)
    config = WindowConfig(window_size=4, action_horizon=2)
    tokenize = functools.partial(word_hashing.tokenize, max_words=12, vocab_size=2048)
    return Windows(dataset, config, tokenize=tokenize, norm_stats=stats)


def assert_same_data(one, other):
    assert one.fingerprint == other.fingerprint
    assert one.instructions == other.instructions
    np.testing.assert_array_equal(one.episode_ends, other.episode_ends)
    for field in ("columns", "frames"):
        assert getattr(one, field).keys() == getattr(other, field).keys()
        for name in getattr(one, field):
            np.testing.assert_array_equal(
                np.asarray(getattr(one, field)[name][:]), np.asarray(getattr(other, field)[name][:])
            )


def test_read_by_kind_equals_read_by_probe(npz, lerobot):
    for kind, path in (("npz", npz), ("lerobot_v3", lerobot)):
        by_kind = read_dataset(DatasetConfig(str(path), kind=kind))
        by_probe = read_dataset(DatasetConfig(str(path)))
        assert_same_data(by_kind, by_probe)


def test_windows_of_a_read_data_set_equal_those_of_its_episodes(npz):
    read = make_windows(read_dataset(DatasetConfig(str(npz))))
    built = make_windows(from_episodes(make_episodes(), fps=10))
    assert {**read.identity, "dataset": ""} == {**built.identity, "dataset": ""}
    rows = np.arange(len(built))
    for field in ("action", "action_mask", "timestep_mask"):
        np.testing.assert_array_equal(getattr(read[rows], field), getattr(built[rows], field))
    for field in (*SIZES, "image_wrist", "instruction"):
        one, other = (getattr(source[rows].observation, field) for source in (read, built))
        np.testing.assert_array_equal(one, other)


def test_a_policy_trains_on_an_added_format(npz, tmp_path):
    run_dir = imitate(tiny_demos.imitation(npz, tmp_path / "run"))
    assert load_run(run_dir).step == tiny_demos.LOOP.num_updates


def test_cameras_are_not_read_when_none_are_requested(npz, lerobot):
    for path in (npz, lerobot):
        assert not read_dataset(DatasetConfig(str(path)), cameras=()).frames


def test_no_reader_accepts_the_folder_of_another(npz, lerobot):
    for kind, path in (("npz", npz), ("lerobot_v3", lerobot)):
        assert [k for k, reader in READERS.items() if reader.probe(pathlib.Path(path))] == [kind]


def test_a_path_that_is_too_long_is_missing():
    with pytest.raises(FileNotFoundError, match=r"data set é+ is missing"):
        read_dataset(DatasetConfig("é" * 300))


def test_a_missing_path_is_refused_and_an_interrupted_recording_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data set .*nowhere is missing; record it first"):
        read_dataset(DatasetConfig(str(tmp_path / "nowhere")))
    (tmp_path / "demos.tmp").mkdir()
    with pytest.raises(FileNotFoundError, match=r"interrupted \(.*demos\.tmp remains\)"):
        read_dataset(DatasetConfig(str(tmp_path / "demos")))


def test_a_folder_that_no_reader_recognises_is_refused_with_the_kinds(tmp_path):
    with pytest.raises(ValueError, match=r"no reader recognises the data set .*lerobot_v3.*kind"):
        read_dataset(DatasetConfig(str(tmp_path)))


def test_a_folder_that_several_readers_recognise_is_refused_with_their_kinds(npz, monkeypatch):
    monkeypatch.setitem(READERS, "other", Reader(lambda path: True, open_npz, npz_fields))
    with pytest.raises(ValueError, match=r"several readers \(npz, other\); choose one with"):
        read_dataset(DatasetConfig(str(npz)))
    assert read_dataset(DatasetConfig(str(npz), kind="npz")).fps == 10


def test_an_unknown_kind_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"unknown dataset\.kind 'lerobot_3'; .*'lerobot_v3'\?"):
        read_dataset(DatasetConfig(str(tmp_path), kind="lerobot_3"))
