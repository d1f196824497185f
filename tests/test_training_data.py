"""Numbers, grippers and images that are made from a raw data set for training."""

import json
import pickle

import numpy as np
import pytest
import tiny_demos
import tiny_raw

from train.mixture import read_mixture
from vla_jax.data import raw_frames
from vla_jax.data.frame_cache import FrameCache
from vla_jax.data.raw import Lazy
from vla_jax.data.raw_frames import RawFrames
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.fields import FieldMap, choose_fields
from vla_jax.data.readers.training_data import hold_grippers, make_dataset


@pytest.fixture
def raw(tmp_path):
    return tiny_raw.make_raw(tiny_raw.make_episodes(), tmp_path)


def test_a_column_is_read_once_for_each_episode(raw, monkeypatch):
    counts = {}
    get = Lazy.__getitem__

    def counted(self, key):
        counts[key] = counts.get(key, 0) + 1
        return get(self, key)

    monkeypatch.setattr(Lazy, "__getitem__", counted)
    data = make_dataset(raw, tiny_raw.FIELDS, DatasetConfig(), cameras=())
    assert counts == dict.fromkeys(["action", "observation/joints", "observation/hand"], 4)
    assert len(data.columns["action"]) == sum(tiny_raw.LENGTHS)


def test_stated_grippers_stay_unless_the_config_has_others(raw):
    stated = tiny_raw.FIELDS._replace(gripper_only_open=True)
    assert choose_fields(stated, raw, DatasetConfig()).gripper_only_open
    other = DatasetConfig(gripper="open_one_closed_zero")
    assert not choose_fields(stated, raw, other).gripper_only_open
    assert not choose_fields(stated, raw, DatasetConfig(gripper_range=(0, 1))).gripper_only_open
    only = DatasetConfig(gripper="open_one_else_closed")
    assert choose_fields(tiny_raw.FIELDS, raw, only).gripper_only_open


def test_changes_of_a_gripper_become_states_and_nan_stays():
    changes = np.array([0, 0.05, -1, 0, np.nan, 0, 1, 0])
    held = hold_grippers(changes[:, None], FieldMap(grippers=(0,)))
    np.testing.assert_array_equal(held[:, 0], [1, 1, -1, -1, np.nan, -1, 1, 1])


@pytest.mark.parametrize("limit", [2, 100])
def test_cameras_of_few_episodes_stay_open(raw, monkeypatch, limit):
    monkeypatch.setattr(raw_frames, "MAX_OPENED", limit)
    frames = RawFrames(raw, "observation/top", FrameCache(0), episodes=np.arange(4))
    whole = np.concatenate([episode.images["observation/top"][:] for episode in raw.episodes])
    for rows in np.random.default_rng(0).integers(0, len(whole), (9, 6)):
        np.testing.assert_array_equal(frames[rows], whole[rows])
        assert len(frames._opened) <= limit
    assert not pickle.loads(pickle.dumps(frames))._opened


def test_data_sets_of_a_mixture_share_the_cache_and_the_folder_of_the_file(tmp_path):
    for name in "ab":
        (tmp_path / name / "meta").mkdir(parents=True)
        (tmp_path / name / "meta/info.json").write_text("{}")
    entries = [{"path": "a", "decoded_dir": "images"}, {"path": "b", "cache_bytes": 5}]
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"datasets": entries}))
    config = tiny_demos.imitation("", tmp_path / "run", mixture=str(path))
    first, second = (part.dataset for part in read_mixture(config))
    assert (first.path, first.decoded_dir) == (str(tmp_path / "a"), str(tmp_path / "images"))
    assert first.cache_bytes == config.dataset.cache_bytes // 2
    assert (second.cache_bytes, second.decoded_dir) == (5, None)
