"""Preparation of a data set for training: frames, bounds, and checks before reading."""

import dataclasses

import numpy as np
import pytest
import tiny_demos

from train import imitate
from train.setup import compute_norm_stats, make_windows, read_dataset
from vla_jax import runs
from vla_jax.actions.reference_frames import ToolFrame
from vla_jax.data import normalize
from vla_jax.data.loader import LoaderConfig
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.tool_frame import in_tool_frame
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig

FRAME = ToolFrame(orientation=(5, 6, 3), radians=0.1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    demos = tiny_demos.write(tmp_path_factory.mktemp("demos") / "table")
    return tiny_demos.imitation(demos, "")


def test_by_default_actions_are_unchanged_and_bounds_come_from_the_data(config):
    dataset = read_dataset(config)
    found, expected = compute_norm_stats(config, dataset), normalize.compute_norm_stats(dataset)
    assert normalize.to_json(found) == normalize.to_json(expected)
    np.testing.assert_array_equal(found["action"].max, dataset.columns["action"].max(axis=0))


def test_an_agent_in_the_tool_frame_is_trained_on_actions_in_that_frame(config):
    agent = dataclasses.replace(config.agent, tool_frame=FRAME)
    turned = read_dataset(dataclasses.replace(config, agent=agent))
    expected = in_tool_frame(read_dataset(config), FRAME)
    assert turned.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(turned.columns["action"], expected.columns["action"])


def test_configured_action_bounds_clip_the_actions_of_windows(config):
    config = dataclasses.replace(config, action_bounds=(-0.25, 0.25))
    dataset = read_dataset(config)
    norm_stats = compute_norm_stats(config, dataset)
    with pytest.warns(UserWarning, match="values of action lie outside"):
        windows = make_windows(config, dataset, norm_stats, window_size=1, action_horizon=1)
    action = windows[np.arange(len(windows))].action[:, 0, 0]
    raw = dataset.columns["action"]
    np.testing.assert_allclose(action[:, :6], np.clip(raw[:, :6] / 0.25, -1, 1), atol=1e-6)
    np.testing.assert_array_equal(action[:, 6], raw[:, 6])


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"optim": OptimConfig(warmup_steps=100), "loop": LoopConfig(num_updates=80)},
            ValueError,
            "warmup_steps must be below num_updates = 80, got 100",
        ),
        (
            {"loader": LoaderConfig(batch_size=6)},
            ValueError,
            "batch_size must be a multiple of the 4 devices over which it is split, got 6",
        ),
        (
            {"loop": LoopConfig(mesh="data=99")},
            ValueError,
            "the product of the sizes of mesh must be at most 4",
        ),
        (
            {"backbone_from": "nowhere"},
            FileNotFoundError,
            "backbone_from must be a run folder with checkpoints, or the folder of a vision-",
        ),
        (
            {"decoder_from": "nowhere"},
            FileNotFoundError,
            "decoder_from must be a run folder with checkpoints, or an output of vla_jax.convert",
        ),
        (
            {"optim": OptimConfig(warmup_steps=0, freeze=("bakbone/*",))},
            ValueError,
            r"bakbone/\*",
        ),
        (
            {"dataset": DatasetConfig("nowhere")},
            FileNotFoundError,
            "data set nowhere is missing",
        ),
    ],
)
def test_invalid_configs_are_refused_before_data_are_read(
    config, changes, error, sentence, tmp_path, monkeypatch
):
    monkeypatch.setattr(imitate, "read_training_inputs", refuse_to_read)
    changed = dataclasses.replace(config, run_dir=str(tmp_path / "run"), **changes)
    with pytest.raises(error, match=sentence):
        imitate.imitate(changed)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_config_is_refused_before_data_are_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr(imitate, "read_training_inputs", refuse_to_read)
    first = dataclasses.replace(config, run_dir=str(tmp_path))
    folder = runs.open_run(first.run_dir, first, overwrite=False)
    (folder / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(ValueError, match="seed"):
        imitate.imitate(dataclasses.replace(first, seed=5))


def test_a_converted_folder_is_refused_as_backbone_before_data_are_read(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(imitate, "read_training_inputs", refuse_to_read)
    (tmp_path / "conversion.json").write_text("{}")
    run_dir = str(tmp_path / "run")
    wrong = dataclasses.replace(config, run_dir=run_dir, backbone_from=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="backbone_from must be a run folder"):
        imitate.imitate(wrong)


def test_another_action_dim_than_the_data_is_refused(config):
    decoder = dataclasses.replace(config.agent.policy.decoder, action_dim=6)
    parts = dataclasses.replace(config.agent.policy, decoder=decoder)
    agent = dataclasses.replace(config.agent, policy=parts)
    with pytest.raises(ValueError, match=r"action_dim must be 7 .* got 6; use --action-dim 7"):
        read_dataset(dataclasses.replace(config, agent=agent))


def refuse_to_read(config):
    raise AssertionError("the data set was read")
