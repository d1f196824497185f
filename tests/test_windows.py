"""Windows of episodes: steps, chunk masks, instructions, tokens, statistics."""

import functools
import pickle
import tempfile

import jax
import numpy as np
import pytest

from vla_jax.backbones import word_hashing
from vla_jax.data import dataset, normalize, shared_arrays, windows
from vla_jax.data.instruction_table import instruction_table
from vla_jax.data.window_index import window_index
from vla_jax.data.windows import WindowConfig, Windows
from vla_jax.types import Tokens

LENGTHS = (5, 1, 9)


@pytest.fixture
def data():
    """Three episodes whose values encode their position: 100 · episode + step."""
    episodes = []
    for e, length in enumerate(LENGTHS):
        place = 100.0 * e + np.arange(length)
        images = np.zeros((length, 2, 2, 3), np.uint8) + np.uint8(place % 251)[:, None, None, None]
        action = np.stack([place, -place, np.ones(length)], axis=1)
        observation = {"proprio": place[:, None], "image_wrist": images}
        episodes.append(dataset.Episode(observation, action, f"lift block {e}"))
    return dataset.from_episodes(episodes, fps=10)


tokenize = functools.partial(word_hashing.tokenize, max_words=12, vocab_size=2048)


def cut_window(data, config, episode, last, **options):
    table = instruction_table(data, tokenize)
    return windows.cut(data, config, episode, last, instructions=table, **options)


@pytest.mark.parametrize("stride", [1, 2, 4, 20])
def test_windows_end_at_the_last_step_and_every_stride_before(data, stride):
    expected = [
        (e, last)
        for e, length in enumerate(LENGTHS)
        for last in sorted(range(length - 1, -1, -stride))
    ]
    index = window_index(data.episode_ends, stride)
    assert [tuple(map(int, index.place(number))) for number in range(len(expected))] == expected
    assert index.place(-1) == expected[-1]
    with pytest.raises(IndexError, match=f"within {len(expected)}"):
        index.place(len(expected))


def test_with_a_large_stride_each_episode_is_one_window(data):
    episode, last = window_index(data.episode_ends, 9).place(slice(None))
    assert (episode.tolist(), last.tolist()) == ([0, 1, 2], [4, 0, 8])


@pytest.mark.parametrize("window_size", [1, 4, 12])
@pytest.mark.parametrize("horizon", [1, 3, 12])
def test_a_window_equals_a_loop_over_its_steps(data, window_size, horizon):
    config = WindowConfig(window_size=window_size, action_horizon=horizon)
    for episode, last in zip(*window_index(data.episode_ends, 1).place(slice(None)), strict=True):
        batch = cut_window(data, config, episode, last)
        for j in range(window_size):
            step = last - window_size + 1 + j
            place = 100 * episode + max(step, 0)  # padding repeats the first observation
            assert batch.timestep_mask[j] == (step >= 0)
            assert batch.observation.proprio[j] == place
            assert (batch.observation.image_wrist[j] == place % 251).all()
            for k in range(horizon):
                exists = step >= 0 and step + k < LENGTHS[episode]
                place = 100 * episode + step + k
                assert batch.action_mask[j, k] == exists
                assert batch.action[j, k].tolist() == ([place, -place, 1] if exists else [0, 0, 0])


@pytest.mark.parametrize(("window_size", "horizon"), [(9, 1), (9, 4), (12, 10), (16, 1)])
def test_chunk_masks_count_the_real_targets(data, window_size, horizon):
    config = WindowConfig(window_size=window_size, action_horizon=horizon, stride=window_size)
    index = window_index(data.episode_ends, config.stride).place(slice(None))
    batch = cut_window(data, config, *index)
    real = sum(min(horizon, length - step) for length in LENGTHS for step in range(length))
    assert batch.action_mask.sum() == real
    assert batch.timestep_mask.sum() == sum(LENGTHS)


def test_a_batch_of_windows_equals_the_stacked_windows(data):
    config = WindowConfig(window_size=4, action_horizon=2)
    index = window_index(data.episode_ends, config.stride).place(slice(None))
    batch = cut_window(data, config, *index)
    for i, (episode, last) in enumerate(zip(*index, strict=True)):
        one = cut_window(data, config, episode, last)
        np.testing.assert_array_equal(batch.action[i], one.action)
        np.testing.assert_array_equal(batch.observation.instruction[i], one.observation.instruction)
        np.testing.assert_array_equal(batch.observation.image_wrist[i], one.observation.image_wrist)
    assert batch.observation.image_primary is None
    assert batch.observation.environment_state is None
    assert batch.tokens is None


@pytest.mark.parametrize("instruction_steps", [1, 3, -1])
def test_the_instruction_is_visible_at_the_first_steps_of_the_episode(data, instruction_steps):
    config = WindowConfig(window_size=4, instruction_steps=instruction_steps)
    ids = tokenize("lift block 2")
    for last in range(9):
        shown = cut_window(data, config, 2, last).observation.instruction
        for j in range(4):
            step = max(last - 3 + j, 0)
            visible = instruction_steps == -1 or step < instruction_steps
            np.testing.assert_array_equal(shown[j], ids if visible else np.zeros(12))


def test_a_task_that_changes_within_an_episode_is_given_where_it_begins(data):
    index = data.instruction_index.copy()
    index[8:11] = 1  # steps 2 … 4 of the last episode have the second episode's task
    data = data._replace(instruction_index=index)
    table = instruction_table(data, tokenize)
    config = windows.WindowConfig(window_size=7, instruction_steps=1)
    batch = cut_window(data, config, 2, 6)
    texts = ["lift block 2", "", "lift block 1", "", "", "lift block 2", ""]
    expected = np.stack([tokenize(text) for text in texts])
    np.testing.assert_array_equal(batch.observation.instruction, expected)
    assert table.age(np.arange(6, 13)).tolist() == [0, 1, 0, 1, 2, 0, 1]


def test_tokens_replace_images(data, tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(15 * 2 * 3, dtype=np.float32).reshape(15, 2, 3))
    mask = np.random.default_rng(0).random((15, 2)) < 0.5
    for array in (np.load(path), np.load(path, mmap_mode="r")):
        tokens = Tokens(array, mask)
        batch = cut_window(data, WindowConfig(window_size=3), 2, 1, tokens=tokens)
        assert batch.observation.image_wrist is None
        np.testing.assert_array_equal(batch.tokens.tokens, array[[6, 6, 7]])
        np.testing.assert_array_equal(batch.tokens.mask, mask[[6, 6, 7]])
        assert type(batch.tokens.tokens) is np.ndarray


def make_source(data, **options):
    stats = normalize.compute_norm_stats(data)
    config = WindowConfig(window_size=4)
    return Windows(data, config, tokenize=tokenize, norm_stats=stats, **options)


def test_windows_are_normalised_and_can_be_indexed(data):
    methods = normalize.NormalizeConfig(action="bounds", proprio="bounds")
    source = make_source(data, normalization=methods)
    assert len(source) == 15
    one, three = source[14], source[np.array([0, 14, 14])]
    assert one.action.shape == (4, 1, 3)
    np.testing.assert_array_equal(three.action[2], one.action)
    low, high = data.columns["proprio"].min(), data.columns["proprio"].max()
    expected = 2 * (np.array([205, 206, 207, 208]) - low) / (high - low) - 1
    np.testing.assert_allclose(one.observation.proprio[:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(one.action[:, 0, 2], np.ones(4))


def test_windows_are_pickled_without_copying_memory_maps(data, tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (15, 64, 64, 3), np.uint8))
    frames = {"image_wrist": np.load(path, mmap_mode="r")}
    np.save(tmp_path / "tokens.npy", np.zeros((15, 64, 64), np.float32))
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    tokens = Tokens(tokens, np.ones(tokens.shape[:2], bool))
    for source in (make_source(data._replace(frames=frames)), make_source(data, tokens=tokens)):
        packed = pickle.dumps(source)
        assert len(packed) < 20_000
        there = pickle.loads(packed)
        before, after = source[np.arange(15)], there[np.arange(15)]
        for name in ("image_wrist", "proprio", "instruction"):
            ours, theirs = getattr(before.observation, name), getattr(after.observation, name)
            np.testing.assert_array_equal(ours, theirs)
        jax.tree.map(np.testing.assert_array_equal, before.tokens, after.tokens)


def test_windows_are_pickled_without_copying_large_arrays(data, monkeypatch, tmp_path):
    monkeypatch.setattr(shared_arrays, "MIN_BYTES", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = make_source(data)
    packed = pickle.dumps(source)
    assert packed == pickle.dumps(source)
    # Action, proprio, images, index of the instructions; a kill would leave no file.
    assert len(source._shared._files) == 4
    assert not list(tmp_path.iterdir())
    there = pickle.loads(pickle.dumps(pickle.loads(packed)))  # a map is not written again
    assert isinstance(there.dataset.columns["action"], np.memmap)
    assert not there._shared._files
    before, after = (jax.tree.leaves(each[np.arange(15)]) for each in (source, there))
    for ours, theirs in zip(before, after, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_without_space_for_a_file_arrays_are_copied(data, monkeypatch, tmp_path):
    monkeypatch.setattr(shared_arrays, "MIN_BYTES", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    there = pickle.loads(pickle.dumps(make_source(data)))
    assert not isinstance(there.dataset.columns["action"], np.memmap)


def test_windows_keep_no_second_copy_of_the_numbers(data):
    source = make_source(data)
    assert source.dataset.columns["action"] is data.columns["action"]
    arrays = [*source.index[:2], source.instructions.starts]
    assert max(map(len, arrays)) == len(LENGTHS)


def test_arguments_that_do_not_fit_the_data_set_are_refused(data):
    with pytest.raises(ValueError, match=r"tokens must be \[15, N, D\], .*got \(14, 2"):
        make_source(data, tokens=Tokens(np.zeros((14, 2, 3)), np.ones((14, 2), bool)))
    stats = normalize.compute_norm_stats(data)
    norm_stats = {"proprio": stats["proprio"]}
    with pytest.raises(ValueError, match=r"norm_stats must cover .*\['action'\] missing"):
        Windows(data, WindowConfig(), tokenize=tokenize, norm_stats=norm_stats)


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("window_size", 0, 1),
        ("action_horizon", 0, 1),
        ("stride", 0, 1),
        ("instruction_steps", -2, -1),
    ],
)
def test_an_invalid_size_is_refused(field, value, least):
    with pytest.raises(ValueError, match=f"{field} must be at least {least}, got {value}"):
        WindowConfig(**{field: value})


def test_a_stride_beyond_every_episode_is_refused():
    with pytest.raises(ValueError, match=r"stride must be at most 7, .*longest episode, got 8"):
        windows._check_stride(8, np.array([3, 10]))
    windows._check_stride(7, np.array([3, 10]))
