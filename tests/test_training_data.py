"""Numbers, grippers and images that are made from a raw data set for training."""

import json
import pickle

import numpy as np
import pytest
import tiny_demos
import tiny_raw

from train.mixture_file import read_mixture
from vla_jax import config
from vla_jax.data import raw_frames
from vla_jax.data.frame_cache import FrameCache
from vla_jax.data.raw import Blocks, EpisodeBlock, Lazy
from vla_jax.data.raw_frames import RawFrames
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.fields import FieldMap, choose_fields
from vla_jax.data.readers.grippers import hold_grippers
from vla_jax.data.readers.training_data import make_dataset


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


def blocks(raw, ends, broken=()):
    """The episodes of a raw data set in blocks, some of which are refused."""

    def read(start, stop, keys):
        if start in broken:
            raise ValueError("unusual")
        parts = raw.episodes[start:stop]
        texts = [text for part in parts for text in part.instructions]
        return EpisodeBlock(
            "a block",
            {key: np.concatenate([part.columns[key] for part in parts]) for key in keys},
            sorted({*texts, "another"}),
            np.searchsorted(sorted({*texts, "another"}), texts),
            np.concatenate([part.timestamps for part in parts]),
        )

    return raw._replace(blocks=Blocks(np.array(ends), read))


def spoiled(tmp_path, episode, step):
    """A raw data set with NaN in the second number of `observation/joints`."""
    episodes = tiny_raw.make_episodes()
    episodes[episode]["columns"]["observation/joints"][step, 1] = np.nan
    return tiny_raw.make_raw(episodes, tmp_path)


@pytest.mark.parametrize(("ends", "broken"), [((3, 4), ()), ((1, 3, 4), (1,)), ((4,), (0,))])
def test_blocks_of_episodes_give_the_same_as_one_by_one(raw, ends, broken):
    expected = make_dataset(raw, tiny_raw.FIELDS, DatasetConfig(), cameras=())
    found = make_dataset(blocks(raw, ends, broken), tiny_raw.FIELDS, DatasetConfig(), cameras=())
    assert found.fingerprint == expected.fingerprint
    assert found.instructions == expected.instructions
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(found.columns[name], column)


@pytest.mark.parametrize("ends", [None, (3, 4), (1, 2, 3, 4)])
def test_a_bad_episode_is_named_with_column_and_step_or_left_out_and_counted(tmp_path, ends):
    raw = spoiled(tmp_path, 1, 5)
    raw = raw if ends is None else blocks(raw, ends)
    message = (
        r"proprio must be finite, got NaN in number 1 of observation/joints \+ observation/hand at "
        rf"step 5 of episode demo_1 of {tmp_path}; repair"
    )
    with pytest.raises(ValueError, match=message):
        make_dataset(raw, tiny_raw.FIELDS, DatasetConfig(), cameras=())
    with pytest.warns(UserWarning, match=f"left out 1 of 4 episodes of .*{message}"):
        data = make_dataset(raw, tiny_raw.FIELDS, DatasetConfig(skip_bad_episodes=True), cameras=())
    assert data.episode_ends.tolist() == [12, 27, 28]


def test_a_wrong_rate_in_a_block_is_found_in_its_episode(tmp_path):
    episodes = tiny_raw.make_episodes()
    episodes[2]["timestamps"] = episodes[2]["timestamps"] * 2
    raw = blocks(tiny_raw.make_raw(episodes, tmp_path), (4,))
    with pytest.raises(ValueError, match=r"fps of episode demo_2 of .* steps of 0\.2 s"):
        make_dataset(raw, tiny_raw.FIELDS, DatasetConfig(), cameras=())


def test_a_wrong_length_in_an_index_takes_no_memory(raw):
    lengths = np.array([12, 2**50, 15, 1])
    message = r"episode demo_1 of .* must have 1125899906842624 steps .* got \[7, 7, 7, 7\]"
    with pytest.raises(ValueError, match=message):
        make_dataset(raw._replace(lengths=lengths), tiny_raw.FIELDS, DatasetConfig(), cameras=())


def test_a_column_with_another_axis_is_refused(raw):
    chosen = DatasetConfig(feature_keys=(("proprio", "observation/matrix"),))
    message = r"observation/matrix must have one list .* \[T, D\], got \(12, 2, 3\); choose another"
    with pytest.raises(ValueError, match=message):
        make_dataset(raw, tiny_raw.FIELDS, chosen, cameras=())


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
    first, second = (part.dataset for part in read_mixture(config.mixture, config.dataset))
    assert (first.path, first.decoded_dir) == (str(tmp_path / "a"), str(tmp_path / "images"))
    assert first.cache_bytes == config.dataset.cache_bytes // 2
    assert (second.cache_bytes, second.decoded_dir) == (5, None)


def test_the_treatment_of_bad_episodes_in_an_earlier_config_is_kept():
    for on_bad, skipped in (("skip", True), ("error", False)):
        read = config.from_dict(DatasetConfig, {"path": "a", "on_bad": on_bad, "cameras": ["a=b"]})
        assert read == DatasetConfig("a", cameras=("a=b",), skip_bad_episodes=skipped)
