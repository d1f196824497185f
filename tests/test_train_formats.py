"""A policy trains on every data-set format and on a mixture of all, and resumes to the bit."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_demos
import tiny_hdf5

from train.imitate import imitate
from vla_jax.acting import agent as agents
from vla_jax.backbones import word_hashing
from vla_jax.data import normalize
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.reader import READERS, find_reader, read_dataset
from vla_jax.data.windows import WindowConfig, Windows
from vla_jax.runs import load_run
from vla_jax.training import checkpoint

DATASETS = pathlib.Path(__file__).parent / "datasets"
PROPRIO = {  # eight numbers of each, so that all trainings have one shape
    "calvin": "robot_obs[:8]",
    "lerobot_v21": "observation.state",
    "lerobot_v30": "observation.state",
    "libero": "obs/ee_states+obs/gripper_states",
    "rlds": "observation/state",
    "robomimic": "obs/robot0_eef_pos+obs/robot0_eef_quat+obs/robot0_gripper_qpos[:1]",
}
OPTIONS = {"rlds": {"expected_fps": 5.0}, "robomimic": {"instruction": "lift the cube"}}


def dataset(name, folder):
    """Returns the config of a copy of a data set, since reading may write indices beside it."""
    path = shutil.copytree(DATASETS / name / "dataset", folder / name, dirs_exist_ok=True)
    keys = (("proprio", PROPRIO[name]),)
    return DatasetConfig(str(path), feature_keys=keys, **OPTIONS.get(name, {}))


def training(data, run_dir, **options):
    config = tiny_demos.imitation("", run_dir, backbone=tiny_demos.PERCEIVER, **options)
    return dataclasses.replace(config, dataset=data)


def train_and_resume(config, tmp_path):
    """Trains four updates, and two after an interruption; checks that they end the same."""
    whole = imitate(config)
    again = shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "4")
    imitate(dataclasses.replace(config, run_dir=str(again)))
    states = [checkpoint.restore_params(run / "checkpoints") for run in (whole, again)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    return whole


def test_every_stored_data_set_is_trained_on():
    assert PROPRIO.keys() == {path.name for path in DATASETS.iterdir() if path.is_dir()}


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("name", PROPRIO)
def test_a_policy_trains_on_the_format_and_resumes_to_the_bit(name, tmp_path):
    data = dataset(name, tmp_path)
    run_dir = train_and_resume(training(data, tmp_path / "run"), tmp_path)
    run = load_run(run_dir)
    assert run.step == 4
    layout = run.agent.action_layout
    assert (layout.dim, layout.grippers) == (7, (6,))
    sent = agents.robot_action(run.agent, np.array([[0.1, 0, 0, 0, 0, 0, 1]], np.float32))
    np.testing.assert_allclose(sent[0], [0.1, 0, 0, 0, 0, 0, layout.opened], atol=1e-6)
    assert find_reader(data) in READERS.values()


@pytest.mark.slow
def test_a_policy_trains_on_a_mixture_of_all_formats_and_resumes_to_the_bit(tmp_path):
    entries = []
    for weight, name in enumerate(PROPRIO, start=1):
        data = dataset(name, tmp_path)
        fields = {
            "path": name,
            "feature_keys": data.feature_keys,
            "expected_fps": data.expected_fps,
        }
        entries.append({"name": name, "weight": weight, **fields})
    entries[0]["cameras"] = ["wrist=rgb_static"]
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"datasets": entries}))
    config = training(DatasetConfig(), tmp_path / "run", mixture=str(path))
    with pytest.warns(UserWarning, match=r"different rates in Hz, .*'calvin': 30\.0"):
        run_dir = train_and_resume(config, tmp_path)
    assert {file.stem for file in (run_dir / "parts").iterdir()} == PROPRIO.keys()
    first = normalize.from_json(json.loads((run_dir / "norm_stats.json").read_text()))
    jax.tree.map(np.testing.assert_array_equal, load_run(run_dir, robot="calvin").norm_stats, first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"datasets in .* must be a list"),
        ({"datasets": []}, r"must be at least one, with different names"),
        ({"datasets": [{"path": "a"}, {"path": "b", "name": "0"}]}, "with different names"),
        ({"datasets": [{"path": "a", "name": "a/b"}]}, r"names of letters, .*'a/b'"),
        ({"datasets": [{"path": "a", "name": 1.5}]}, "name of data set 0 in .* must be a text"),
        ({"datasets": [{"path": "a", "weight": -1}]}, "weight of '0' .* must be a positive number"),
        ({"datasets": [{"pth": "a"}]}, "'0' in .*pth"),
        ({"datasets": [{"name": "a"}]}, "'a' in .* must have the path of a data set"),
        ({"datasets": [{"path": "nowhere"}]}, "nowhere is missing"),
    ],
)
def test_a_wrong_mixture_is_refused_before_anything_is_read(content, message, tmp_path):
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps(content))
    config = training(DatasetConfig(), tmp_path / "run", mixture=str(path))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        imitate(config)
    assert not (tmp_path / "run").exists()


def test_steps_without_an_action_are_inputs_but_no_targets(tmp_path):
    """RoboMME shows a video before the task: its frames have no action."""
    tiny_hdf5.write_robomme(tmp_path / "record_dataset_BinFill.h5", (6, 5), shown=2)
    data = read_dataset(DatasetConfig(str(tmp_path), grippers=()), image_size=(8, 8))
    real = data.columns["action_mask"][:, 0] > 0.5
    starts = np.concatenate([[0], data.episode_ends[:-1]])
    assert real.any()
    assert not real.all()
    chosen = DatasetConfig(str(tmp_path), grippers=(), columns=("proprio",))
    assert "action_mask" in read_dataset(chosen, cameras=()).columns
    stats = normalize.compute_norm_stats(data)
    expected = data.columns["action"][real].mean(0)
    np.testing.assert_allclose(stats["action"].mean, expected, rtol=1e-4, atol=1e-6)
    tokenize = functools.partial(word_hashing.tokenize, max_words=12, vocab_size=2048)
    windows = Windows(data, WindowConfig(4, 2), tokenize=tokenize, norm_stats=stats)
    batch = windows[np.arange(len(windows))]
    for row, (episode, last) in enumerate(zip(*windows.index.place(slice(None)), strict=True)):
        for j, step in enumerate(range(last - 3, last + 1)):
            for k in range(2):
                frame = starts[episode] + step + k
                exists = step >= 0 and frame < data.episode_ends[episode] and real[frame]
                assert batch.action_mask[row, j, k] == exists
    np.testing.assert_array_equal(batch.action[~batch.action_mask], 0)
    assert batch.timestep_mask[:, -1].all()


def test_further_columns_are_kept_but_not_seen_by_the_policy(tmp_path):
    data = dataset("lerobot_v30", tmp_path)
    keys = (("reward", "next.reward"),)
    read = read_dataset(dataclasses.replace(data, feature_keys=keys), cameras=())
    stats = normalize.compute_norm_stats(read)
    tokenize = functools.partial(word_hashing.tokenize, max_words=12, vocab_size=2048)
    windows = Windows(read, WindowConfig(2, 1), tokenize=tokenize, norm_stats=stats)
    assert windows.dataset.columns["reward"].shape == (39, 1)
    assert windows[0].observation.proprio is not None
