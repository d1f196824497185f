"""Data sets in memory."""

import numpy as np
import pytest

from vla_jax.data import dataset
from vla_jax.data.dataset import Episode


def make_episode(length, seed=0, **changes):
    rng = np.random.default_rng(seed)
    fields = {
        "proprio": rng.normal(size=(length, 3)).astype(np.float32),
        "image_primary": rng.integers(0, 256, (length, 4, 6, 3), np.uint8),
    }
    return Episode({**fields, **changes}, rng.normal(size=(length, 2)), f"task {seed}")


def test_episodes_are_concatenated():
    episodes = [make_episode(n, n) for n in (3, 1, 2)]
    data = dataset.from_episodes(episodes, fps=10, names={"proprio": ["x", "y", "z"]})
    assert data.episode_ends.tolist() == [3, 4, 6]
    assert dataset.episode_starts(data.episode_ends).tolist() == [0, 3, 4]
    assert data.instructions == ("task 1", "task 2", "task 3")
    assert dataset.episode_instructions(data) == ("task 3", "task 1", "task 2")
    assert data.instruction_index.tolist() == [2, 2, 2, 0, 1, 1]
    assert data.names == {"proprio": ("x", "y", "z")}
    for e, episode in enumerate(episodes):
        rows = slice((0, 3, 4)[e], data.episode_ends[e])
        np.testing.assert_array_equal(data.columns["proprio"][rows], episode.observation["proprio"])
        np.testing.assert_array_equal(data.columns["action"][rows], np.float32(episode.action))
        image = episode.observation["image_primary"]
        np.testing.assert_array_equal(data.frames["image_primary"][rows], image)


@pytest.mark.parametrize("changed", ["proprio", "image_primary", "instruction", "fps"])
def test_the_fingerprint_identifies_the_content(changed):
    before = dataset.from_episodes([make_episode(3)], fps=10)
    assert before.fingerprint == dataset.from_episodes([make_episode(3)], fps=10).fingerprint
    episode = make_episode(3)
    if changed in episode.observation:
        episode.observation[changed][1, 0] += 1
    elif changed == "instruction":
        episode = episode._replace(instruction="another")
    after = dataset.from_episodes([episode], fps=11 if changed == "fps" else 10)
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_with_its_position(value):
    episodes = [make_episode(3), make_episode(4, 1)]
    episodes[1].observation["proprio"][2, 1] = value
    message = "proprio must be finite, got NaN or infinity in episode 1 at step 2; repair"
    with pytest.raises(ValueError, match=message):
        dataset.from_episodes(episodes, fps=10)


def test_invalid_episodes_are_skipped_with_one_warning_that_counts_them():
    episodes = [make_episode(n, n) for n in (3, 2, 4)]
    episodes[1].observation["proprio"][0, 0] = np.nan
    episodes[1].action[1, 1] = np.nan
    with pytest.warns(UserWarning, match=r"left out 1 of 3 episodes .*: \[1\]") as caught:
        data = dataset.from_episodes(episodes, fps=10, on_bad="skip")
    assert len(caught) == 1
    good = dataset.from_episodes([episodes[0], episodes[2]], fps=10)
    assert data.episode_ends.tolist() == [3, 7]
    assert data.fingerprint == good.fingerprint
    images = data.frames["image_primary"]
    np.testing.assert_array_equal(images, good.frames["image_primary"])
    episodes[0].action[0], episodes[2].action[0] = np.nan, np.nan
    with pytest.raises(ValueError, match="every episode holds NaN or infinity"):
        dataset.from_episodes(episodes, fps=10, on_bad="skip")


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (make_episode(2, depth=np.zeros((2, 4))), r"must have the fields .*got .*'depth'"),
        (make_episode(2, proprio=np.zeros((2, 4))), r"proprio of episode 1 .*\(2, 3\).*\(2, 4\)"),
        (make_episode(2, proprio=np.zeros((3, 3))), r"proprio of episode 1 .*\(2, 3\).*\(3, 3\)"),
        (make_episode(0), r"proprio of episode 1 .* at least one step, got \(0, 3\)"),
        (
            make_episode(2, image_primary=np.zeros((2, 4, 6, 3))),
            r"image_primary must be uint8 \[T, h, w, 3\], got float64",
        ),
    ],
)
def test_an_episode_with_other_fields_than_the_first_is_refused(episode, message):
    with pytest.raises(ValueError, match=message):
        dataset.from_episodes([make_episode(3), episode], fps=10)


def test_an_empty_data_set_and_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="at least one episode, got none"):
        dataset.from_episodes([], fps=10)
    with pytest.raises(ValueError, match=r"observation field must be .*'depth' in episode 0"):
        dataset.from_episodes([make_episode(2, depth=np.zeros((2, 4)))], fps=10)
