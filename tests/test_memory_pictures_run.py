"""Memory suite from pictures: its steps, its trainings, and all of it end to end."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from train import configs, memory_pictures, memory_suite
from train.memory_pictures import MemoryPicturesConfig
from train.pretrain import PretrainConfig
from vla_jax import files
from vla_jax.acting.agent import AgentConfig
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.config import save, to_dict
from vla_jax.data.dataset import ACTION_MASK, episode_starts
from vla_jax.data.readers import reader
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.envs.memory_table import tasks
from vla_jax.policies import policy, trunks

CONFIG = MemoryPicturesConfig()


def test_the_steps_of_a_task_depend_on_each_other_in_the_order_of_the_work():
    steps = [step for task in CONFIG.tasks for step in memory_pictures.make_steps(CONFIG, task)]
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) == len(CONFIG.tasks) * (2 + 2 * len(CONFIG.decoders))
    for number, step in enumerate(steps):
        assert set(step.after) <= set(names[:number])
        assert all(CONFIG.tasks[number // 10] in before for before in step.after)


def test_one_task_of_each_suite():
    assert {tasks.get(task).suite for task in CONFIG.tasks} == set(tasks.SUITES)


@pytest.mark.parametrize("decoder", CONFIG.decoders)
def test_a_training_remembers_whole_episodes_of_its_world(decoder):
    config = memory_pictures.make_policy(CONFIG, "lit", decoder)
    fields = config.agent.policy.decoder
    assert fields.window_size == tasks.max_steps(config.world)
    assert config.agent.mode in trunks.get(decoder).modes
    assert config.world.image_size == config.agent.policy.backbone.image_size
    assert config.optim.warmup_steps < config.loop.num_updates


def test_a_small_chance_is_not_zero_in_the_table(monkeypatch):
    monkeypatch.setattr(memory_pictures, "_rate", lambda *names: "50 %")
    table = memory_pictures.make_table(MemoryPicturesConfig(tasks=("path", "lit")))
    assert list(table.columns[2].cells) == ["0.2 %", "25 %"]


def test_names_in_the_table_are_whole_in_a_terminal_of_80_columns(monkeypatch):
    monkeypatch.setattr(memory_pictures, "_rate", lambda *names: "77.5 % [69.2 – 84.1 %]")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(memory_pictures.make_table(MemoryPicturesConfig()))
    text = console.export_text()
    assert "…" not in text
    assert all(name in text for name in ("permanence", "sequence", "gru", "84.1 %]"))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown name 'lsmt' in decoders"):
        MemoryPicturesConfig(decoders=("lsmt",))
    with pytest.raises(ValueError, match="in tasks"):
        MemoryPicturesConfig(tasks=("lid",))


def test_the_suite_with_pictures_runs_these_steps_alone(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(memory_pictures, "memory_pictures", given.append)
    config = memory_suite.MemorySuiteConfig(pictures=True, delay=5, run_dir=str(tmp_path / "run"))
    memory_suite.memory_suite(config)
    assert given == [MemoryPicturesConfig(delay=5, run_dir=f"{tmp_path}/run/pictures")]


def test_features_of_a_run_take_the_place_of_a_pre_trained_encoder(tmp_path):
    """The trainings have the backbone of the run, and start when its tokens are stored."""
    backbone = PerceiverConfig(num_latents=3, image_size=32)
    agent = AgentConfig(policy.connect(backbone, configs.SMALL_LSTM))
    files.write_json(tmp_path / "agent.json", to_dict(agent))
    config = dataclasses.replace(CONFIG, tasks=("lit",), decoders=("gru",), features=str(tmp_path))
    steps = memory_pictures.make_steps(config, "lit")
    assert [step.name for step in steps[:2]] == ["lit: record", "lit: features"]
    assert steps[2].after == ["lit: record", "lit: features"]
    trained = memory_pictures.make_policy(config, "lit", "gru")
    assert trained.agent.policy.backbone == backbone
    assert trained.agent.policy.decoder.num_tokens == 5  # with proprioception and words
    assert trained.world.image_size == 32
    save(PretrainConfig(backbone=backbone), tmp_path / "pretrained" / "config.json")
    config = dataclasses.replace(config, features=str(tmp_path / "pretrained"))
    assert memory_pictures.read_backbone(config) == backbone
    with pytest.raises(FileNotFoundError, match="missing; train first"):
        dataclasses.replace(config, features=str(tmp_path / "none"))


@pytest.mark.slow
@pytest.mark.sampled
def test_demonstrations_are_recorded_masked_learned_and_evaluated_by_group(tmp_path):
    pytest.importorskip("mujoco")
    pytest.importorskip("av")
    config = MemoryPicturesConfig(
        tasks=("blinks",), decoders=("gru",), delay=4, num_demonstrations=6, pretrain_updates=1,
        num_updates=1, hidden_size=8, num_episodes=3, num_videos=1, run_dir=str(tmp_path),
    )  # fmt: skip
    page = memory_pictures.memory_pictures(config)
    dataset = reader.read_dataset(
        DatasetConfig(str(tmp_path / "blinks" / "demonstrations")),
        cameras=("image_primary",), image_size=(64, 64),
    )  # fmt: skip
    acts = dataset.columns[ACTION_MASK]
    starts = episode_starts(dataset.episode_ends)
    assert not np.any(acts[starts])  # the robot first watches
    assert np.all(acts[dataset.episode_ends - 1])  # then it acts
    folder = tmp_path / "blinks" / "gru" / "evaluation" / "gru"
    groups = json.loads((folder / "summary.json").read_text())["summary"]["tasks"]
    assert groups.keys() <= {f"blinks {count}" for count in range(1, 5)}
    assert len(list(folder.glob("*.mp4"))) == 1
    assert "<a href='blinks/index.html'>" in page.read_text()
    assert "<h3>gru</h3>" in (tmp_path / "blinks" / "index.html").read_text()
