"""A run folder is read completely, or refused with one sentence."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_demos
import tiny_run

from vla_jax import backbones, runs
from vla_jax import config as configs
from vla_jax.acting import mixture_robots
from vla_jax.acting.agent import AgentConfig, read_instruction
from vla_jax.acting.mixture_robots import MixtureRobot
from vla_jax.actions.action_layout import ActionLayout
from vla_jax.evaluate import EvaluateConfig, evaluate
from vla_jax.policies import policy
from vla_jax.training import checkpoint

MODEL = pathlib.Path(__file__).parent / "golden" / "robovlms" / "kosmos_lstm" / "vlm"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return tiny_run.write(tmp_path_factory.mktemp("run"), steps=(3, 10))


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("step", "expected"), [(None, 10), (3, 3)])
def test_a_run_is_read_as_written(folder, step, expected):
    run = runs.load_run(folder, step=step)
    assert (run.agent, run.world, run.step) == (tiny_run.AGENT, tiny_run.WORLD, expected)
    jax.tree.map(np.testing.assert_array_equal, run.params, tiny_run.params(expected))
    jax.tree.map(np.testing.assert_array_equal, run.norm_stats, tiny_run.norm_stats())


def test_the_ema_params_are_loaded_if_present(tmp_path):
    run = runs.load_run(tiny_run.write(tmp_path, ema=tiny_run.params(seed=99)))
    jax.tree.map(np.testing.assert_array_equal, run.params, tiny_run.params(99))


def test_a_run_without_a_world_can_be_read(folder):
    (folder / "world.json").unlink()
    assert runs.load_run(folder).world is None


def change(name, **fields):
    def damage(folder):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | fields))

    return damage


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


FAULTS = {  # name -> (change of the folder, error, sentence)
    "no folder": (shutil.rmtree, FileNotFoundError, "run folder .* is missing"),
    "no agent": (
        lambda f: (f / "agent.json").unlink(),
        FileNotFoundError,
        r"agent\.json is missing",
    ),
    "cut agent": (write("agent.json", '{"pol'), ValueError, r"agent\.json is not valid JSON"),
    "unknown field": (change("agent.json", modus=1), ValueError, "Did you mean 'mode'"),
    "no statistics": (
        lambda f: (f / "norm_stats.json").unlink(),
        FileNotFoundError,
        r"norm_stats\.json is missing: expected statistics",
    ),
    "cut statistics": (write("norm_stats.json", "{"), ValueError, "is not valid JSON"),
    "listed statistics": (write("norm_stats.json", "[]"), ValueError, "must hold a JSON object"),
    "empty statistics": (
        write("norm_stats.json", '{"action": {}}'),
        ValueError,
        r"norm_stats\.json of action must have exactly",
    ),
    "unknown world": (
        write("world.json", '{"kind": "table_jacks"}'),
        ValueError,
        "unknown world 'table_jacks'; choose from .* Did you mean 'table_jax'",
    ),
    "no checkpoint": (
        lambda f: shutil.rmtree(f / "checkpoints"),
        FileNotFoundError,
        "no checkpoint in",
    ),
}


@pytest.mark.parametrize(("damage", "error", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_run_raises_one_sentence(folder, damage, error, sentence):
    damage(folder)
    with pytest.raises(error, match=sentence) as caught:
        runs.load_run(folder)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_shape_is_refused(folder):
    data = json.loads((folder / "agent.json").read_text())
    data["policy"]["decoder"]["hidden_size"] = 16
    (folder / "agent.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="does not fit the policy: decoder/"):
        runs.load_run(folder)


def test_a_missing_step_is_refused(folder):
    with pytest.raises(FileNotFoundError, match=r"no step 4 in .*; choose from 3, 10"):
        runs.load_run(folder, step=4)


@pytest.mark.parametrize("fault", ["shape", "name"])
def test_a_damaged_ema_is_not_replaced_by_the_raw_params(fault, tmp_path):
    ema = tiny_run.params(seed=99)
    if fault == "shape":
        ema = jax.tree.map(lambda leaf: leaf[..., None], ema)
    else:
        ema["decoder"] = {}
    folder = tiny_run.write(tmp_path, ema=ema)
    with pytest.raises(ValueError, match="does not fit the policy"):
        runs.load_run(folder)


def test_check_run_refuses_what_open_run_would_refuse(tmp_path):
    config = tiny_demos.imitation("demos", tmp_path / "run")
    runs.check_run(config.run_dir, config, overwrite=False)
    assert list(tmp_path.iterdir()) == []
    runs.open_run(config.run_dir, config, overwrite=False)
    runs.check_run(config.run_dir, config, overwrite=False)
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(ValueError, match="another config: seed was 0 and is 1"):
        runs.check_run(config.run_dir, other, overwrite=False)
    runs.check_run(config.run_dir, other, overwrite=True)
    assert (tmp_path / "run" / "config.json").exists()


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    config = tiny_demos.imitation("demos", tmp_path / "file" / "run")
    with pytest.raises(OSError, match=r"file/run cannot be written; choose another --run-dir"):
        runs.check_run(config.run_dir, config, overwrite=False)


def test_a_written_run_can_be_read(folder, tmp_path):
    run = runs.load_run(folder)
    config = tiny_demos.imitation("demos", tmp_path / "run")
    metadata = runs.make_metadata(config, run.agent, run.norm_stats)
    runs.write_acting(folder, run.agent, run.norm_stats, run.world)
    again = runs.load_run(folder)
    assert (again.agent, again.world) == (run.agent, run.world)
    jax.tree.map(np.testing.assert_array_equal, again.norm_stats, run.norm_stats)
    assert metadata.keys() == {"config", "agent", "norm_stats", "robots", "files"}


def test_a_run_holds_a_copy_of_its_tokenizer(tmp_path, monkeypatch):
    folder, config = tmp_path / "run", tiny_demos.imitation("demos", tmp_path / "run")
    model = shutil.copytree(MODEL, tmp_path / "model")
    backbone = backbones.load_config(model)
    agent = AgentConfig(policy.connect(backbone, tiny_run.DECODER))
    ids = read_instruction(agent, "open the drawer")
    runs.write_acting(folder, agent, tiny_run.norm_stats(), None)
    metadata = runs.make_metadata(config, agent, tiny_run.norm_stats())
    params = policy.init(jax.random.key(0), agent.policy)
    checkpoints = checkpoint.open_checkpoints(folder / "checkpoints")
    checkpoint.save(checkpoints, 0, {"params": params}, metadata)
    checkpoint.close(checkpoints)
    shutil.rmtree(model)
    moved = folder.rename(tmp_path / "moved")
    data = json.loads((moved / "agent.json").read_text())
    assert data["policy"]["backbone"]["options"]["tokenizer"] == "tokenizer.json"
    monkeypatch.chdir(tmp_path)
    run = runs.load_run("moved")
    assert run.agent.policy.backbone.options.tokenizer == "moved/tokenizer.json"
    np.testing.assert_array_equal(read_instruction(run.agent, "open the drawer"), ids)
    runs.write_acting(moved, run.agent, run.norm_stats, None)  # onto itself
    assert runs.load_run("moved").agent == run.agent
    with open(moved / "tokenizer.json", "a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"tokenizer\.json must be as in the metadata of the ch"):
        runs.load_run("moved")
    (moved / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing, which backbone 'kos"):
        runs.load_run(moved)
    with pytest.raises(
        FileNotFoundError, match=r"model/tokenizer\.json is missing, which backbone"
    ):
        runs.write_acting(tmp_path / "other", agent, tiny_run.norm_stats(), None)


def test_the_robot_of_a_mixture_is_chosen_when_a_run_is_loaded(folder):
    stats = {name: each for name, each in tiny_run.norm_stats().items() if name != "proprio"}
    layout = ActionLayout(4, (0,), -1.0, 2.0)
    robots = {
        "arm": MixtureRobot(tiny_run.norm_stats(), ActionLayout(7, (6,)), ()),
        "small.v2": MixtureRobot(stats, layout, ()),
    }
    with pytest.raises(ValueError, match=r"robot must be None for .* one data set, got 'arm'"):
        runs.load_run(folder, robot="arm")
    mixture_robots.write(folder, {"arm": robots["arm"]})
    assert runs.load_run(folder).robot == "arm"  # the only one
    mixture_robots.write(folder, robots)
    run = runs.load_run(folder, robot="small.v2")
    assert run.robot == "small.v2"
    assert run.agent == dataclasses.replace(
        tiny_run.AGENT, action_layout=layout, missing_parts=("proprio",)
    )
    jax.tree.map(np.testing.assert_array_equal, run.norm_stats, stats)
    for wrong, got in ((None, "none"), ("large", "'large'")):
        with pytest.raises(ValueError, match=rf"robot must be one of arm, small.v2, .* got {got}"):
            runs.load_run(folder, robot=wrong)
    jax.tree.map(np.testing.assert_array_equal, runs.load_params(folder), run.params)
    with pytest.raises(ValueError, match="got none; choose with --robot"):
        evaluate(folder, EvaluateConfig(num_episodes=1))
    with pytest.raises(ValueError, match=r"robot must be small.v2 as in the loaded run, got arm"):
        evaluate(run, EvaluateConfig(robot="arm"))
    (folder / "parts" / "arm.json").write_text("{}")
    with pytest.raises(ValueError, match=r"arm.json must have norm_stats, action_layout and"):
        runs.load_run(folder, robot="arm")


def test_a_world_that_differs_from_the_checkpoint_is_refused(tmp_path):
    folder, world = tmp_path / "run", tiny_run.WORLD
    config = tiny_demos.imitation("demos", folder)
    metadata = runs.make_metadata(config, tiny_run.AGENT, tiny_run.norm_stats(), world=world)
    runs.write_acting(folder, tiny_run.AGENT, tiny_run.norm_stats(), world)
    checkpoints = checkpoint.open_checkpoints(folder / "checkpoints")
    state = {"params": tiny_run.params(), "ema_params": None}
    checkpoint.save(checkpoints, 3, state, metadata)
    checkpoint.close(checkpoints)
    assert runs.load_run(folder).world == runs.read_world(folder) == world
    change("world.json", max_steps=6)(folder)
    for read in (runs.load_run, runs.read_world):
        with pytest.raises(ValueError, match=r"world\.json must be as .* max_steps was 5 and is 6"):
            read(folder)
    (folder / "world.json").unlink()
    assert runs.load_run(folder).world == runs.read_world(folder) == world


@pytest.mark.parametrize("change_of_world", [{"kind": "table_jacks"}, {"max_step": 6}])
@pytest.mark.parametrize("has_file", [False, True])
def test_a_wrong_world_is_that_of_the_checkpoint(folder, monkeypatch, has_file, change_of_world):
    if not has_file:
        (folder / "world.json").unlink()
    saved = {"world": configs.to_dict(tiny_run.WORLD) | change_of_world}
    monkeypatch.setattr(checkpoint, "read_metadata", lambda *_: saved)
    with pytest.raises(ValueError, match=f"^metadata of the checkpoint in {folder}"):
        runs.read_world(folder)
