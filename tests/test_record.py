"""Demonstrations on disk: successful episodes, labelled with the expert's own action."""

import dataclasses
import multiprocessing

import jax
import numpy as np
import pytest

from train import record as module
from train.record import RecordConfig, record
from vla_jax.data.dataset import episode_instructions, episode_starts
from vla_jax.data.instruction_table import instruction_table
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.reader import read_dataset
from vla_jax.data.windows import WindowConfig, cut
from vla_jax.envs.demonstrations import collect
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.mujoco_memory import MujocoMemoryConfig
from vla_jax.envs.table import jax_env, mujoco_env
from vla_jax.types import SimulatorStep

TWIN = jax_env.JaxTableConfig(image_size=0, max_steps=20)


@pytest.mark.slow
def test_the_jax_table_is_recorded_as_played(tmp_path, capsys):
    config = RecordConfig(str(tmp_path / "demos"), TWIN, num_episodes=12)
    assert record(config) == tmp_path / "demos"
    data = read_dataset(DatasetConfig(config.dataset), cameras=())
    played = collect(jax_env.make(TWIN), jax.random.key(0), 12)
    success = np.array(played.success)
    assert 0 < success.sum() < 12  # 20 steps are too few for some tasks
    assert f"kept {success.sum()} of 12 episodes" in capsys.readouterr().err
    lengths = np.array(played.length)[success]
    np.testing.assert_array_equal(np.diff(data.episode_ends, prepend=0), lengths)
    for name, expected in [
        ("action", played.action),
        ("proprio", played.observation.proprio),
        ("environment_state", played.observation.environment_state),
    ]:
        steps = [np.array(e)[:n] for e, n in zip(expected[success], lengths, strict=True)]
        np.testing.assert_allclose(data.columns[name], np.concatenate(steps), atol=1e-6)
        assert len(data.names[name]) == data.columns[name].shape[1]
    sentences = jax_env.make(TWIN).instructions
    assert episode_instructions(data) == tuple(
        sentences[i] for i in np.array(played.instruction[:, 0])[success]
    )
    assert data.fps == 10


@pytest.mark.slow
def test_chunks_limit_the_memory_and_no_episode_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 20 * 4 * 37)  # five episodes of 20 steps
    config = RecordConfig(str(tmp_path / "demos"), TWIN, num_episodes=12)
    chunks = []

    def counting_collect(env, key, num_episodes, *, noise=0.0, wander_steps=0):
        chunks.append(num_episodes)
        return collect(env, key, num_episodes, noise=noise, wander_steps=wander_steps)

    monkeypatch.setattr(module, "collect", counting_collect)
    episodes = list(module._in_parallel(jax_env.make(TWIN), config))
    assert chunks == [1, 5, 5, 5]  # the first one only for the shapes
    assert len(episodes) == 12
    first = [e.observation["environment_state"][0].tobytes() for e in episodes if e]
    assert len(set(first)) == len(first)


@pytest.mark.slow
def test_images_are_recorded_if_the_world_has_them(tmp_path):
    world = dataclasses.replace(TWIN, image_size=16)
    record(RecordConfig(str(tmp_path / "demos"), world, num_episodes=4))
    data = read_dataset(DatasetConfig(str(tmp_path / "demos")))
    assert {name: frames.shape[1:] for name, frames in data.frames.items()} == {
        "image_primary": (16, 16, 3),
        "image_wrist": (16, 16, 3),
    }


def test_recording_mujoco_equals_playing_in_one_process(tmp_path):
    world = mujoco_env.MujocoTableConfig(image_size=0)
    config = RecordConfig(str(tmp_path / "demos"), world, num_episodes=3, num_processes=1)
    record(config)
    data = read_dataset(DatasetConfig(config.dataset), cameras=())
    simulator = mujoco_env.TableMujoco(world)
    played = [
        module.demonstrate(simulator, seed, config.noise, config.disturbance) for seed in range(3)
    ]
    episodes = [episode for episode in played if episode]
    assert episode_instructions(data) == tuple(e.instruction for e in episodes)
    actions = np.concatenate([e.action for e in episodes])
    np.testing.assert_allclose(data.columns["action"], actions, atol=1e-6)


@pytest.mark.slow
def test_a_killed_process_ends_a_recording_with_one_sentence(tmp_path):
    world = mujoco_env.MujocoTableConfig(image_size=0)
    config = RecordConfig(str(tmp_path / "demos"), world, num_episodes=100, num_processes=1)

    def kill(count):
        if count == 1:
            multiprocessing.active_children()[0].kill()

    with pytest.raises(RuntimeError, match=r"was killed.*record again with fewer --num-processes"):
        record(config, on_episode=kill)
    assert list(tmp_path.iterdir()) == []


def test_a_disturbance_makes_the_motion_differ_from_the_labels():
    simulator = mujoco_env.TableMujoco(mujoco_env.MujocoTableConfig(image_size=0))

    def fraction_against_label(disturbance):  # share of steps whose motion opposes
        played = [module.demonstrate(simulator, seed, 0.0, disturbance) for seed in range(8)]
        off = []
        for episode in filter(None, played):
            moved = np.diff(episode.observation["proprio"][:, :2], axis=0) / 0.03
            off.append((moved * episode.action[:-1, :2]).min(axis=1) < -0.1)
        return np.concatenate(off).mean()

    assert fraction_against_label(0.0) < 0.02
    assert fraction_against_label(0.1) > 0.05


def test_a_failed_episode_is_not_recorded():
    simulator = mujoco_env.TableMujoco(mujoco_env.MujocoTableConfig(image_size=0, max_steps=2))
    assert module.demonstrate(simulator, seed=0, noise=0.0, disturbance=0.0) is None


def test_a_recording_with_other_settings_is_not_taken_for_this_one(tmp_path):
    config = RecordConfig(str(tmp_path / "demos"), TWIN, num_episodes=12)
    assert not module.is_recorded(config)
    record(config)
    assert module.is_recorded(dataclasses.replace(config, num_processes=2, overwrite=True))
    other = dataclasses.replace(config, num_episodes=13)
    with pytest.raises(ValueError, match="other settings: num_episodes was 12 and is 13; choose"):
        module.is_recorded(other)
    (tmp_path / "demos" / module.SETTINGS).unlink()
    with pytest.raises(ValueError, match=r"must have the record\.json of a recording, got none"):
        module.is_recorded(config)


def test_a_data_set_has_the_settings_of_its_recording_or_is_absent(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.configs, "save", killed)
    config = RecordConfig(str(tmp_path / "demos"), TWIN, num_episodes=12)
    with pytest.raises(KeyboardInterrupt):
        record(config)
    assert not list(tmp_path.iterdir())
    assert not module.is_recorded(config)


def test_an_existing_data_set_is_replaced_only_with_overwrite(tmp_path):
    config = RecordConfig(str(tmp_path / "demos"), TWIN, num_episodes=12)
    record(config)
    with pytest.raises(FileExistsError, match="exists; choose another folder or overwrite it"):
        record(config)
    assert record(dataclasses.replace(config, overwrite=True)) == tmp_path / "demos"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_episodes": 0}, "num_episodes must be at least 1, got 0"),
        ({"num_processes": -1}, "num_processes must be at least 0, got -1"),
        ({"noise": -0.1}, "noise must be >= 0 units of action, got -0.1"),
        ({"disturbance": 1.5}, r"disturbance must be in \[0, 1\] per step, got 1.5"),
    ],
)
def test_invalid_numbers_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        RecordConfig(**fields)


@pytest.mark.parametrize("table", [JaxMemoryConfig, MujocoMemoryConfig])
def test_actions_of_the_watched_part_of_a_memory_task_are_masked(tmp_path, table):
    world = table(task="lit", delay=4)
    config = RecordConfig(str(tmp_path / "demos"), world, num_episodes=3, num_processes=1)
    record(config)
    data = read_dataset(DatasetConfig(config.dataset), cameras=())
    real = data.columns["action_mask"][:, 0] > 0.5
    starts = episode_starts(data.episode_ends)
    for start, end in zip(starts, data.episode_ends, strict=True):
        first = start + np.argmax(real[start:end])
        assert first - start in range(4 + 3, 4 + 5 + 1)  # a block is lit, then a delay of 3 … 5
        assert np.all(real[first:end])
    # windows over the watched part keep their steps, so that the carry runs over them
    windows = cut(
        data,
        WindowConfig(window_size=4, action_horizon=2),
        0,
        3,
        instructions=instruction_table(data, lambda text: np.zeros(1, np.int32)),
    )
    assert windows.timestep_mask.all()
    assert not windows.action_mask.any()
    assert not windows.action.any()


class Watching:
    """A simulator whose robot watches for two steps; its expert always sends the same action."""

    instruction = "wait, then move"

    def __init__(self):
        self.executed, self.is_acting = [], False

    def reset(self, seed):
        return {"proprio": np.zeros(1)}

    def expert(self):
        return np.array([0.5, -0.5, 1.0])

    def step(self, action):
        self.executed.append(action)
        self.is_acting = len(self.executed) >= 2
        return SimulatorStep({"proprio": np.zeros(1)}, 0.0, len(self.executed) == 12, False, True)


def test_a_random_motion_replaces_the_first_actions_but_not_their_labels():
    counts = []
    for seed in range(20):
        simulator = Watching()
        episode = module.demonstrate(simulator, seed, 0.0, 0.0, wander_steps=3)
        np.testing.assert_array_equal(episode.action, np.tile(simulator.expert(), (12, 1)))
        np.testing.assert_array_equal(episode.action_mask, [False] * 2 + [True] * 10)
        executed = np.array(simulator.executed)
        np.testing.assert_array_equal(executed[:, 2], 1.0)  # the gripper is the expert's
        wanders = np.any(executed[:, :2] != simulator.expert()[:2], axis=1)
        counts.append(int(wanders[2:].sum()))  # steps at which the robot acts
        assert np.all(wanders[2 : 2 + counts[-1]])
        assert np.all(executed[wanders] == executed[:1])
    assert set(counts) == {0, 1, 2, 3}
