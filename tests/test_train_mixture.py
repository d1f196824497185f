"""Trainings on two robots, of which one lacks a camera and numbers of proprio and action."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_demos

from train import data_parts, pretrain
from train.cache import cache
from train.imitate import imitate
from train.mixture import read_training_inputs
from vla_jax import runs
from vla_jax.acting import mixture_robots
from vla_jax.acting.agent import make_agent, read_instruction
from vla_jax.data import normalize
from vla_jax.data.dataset import Episode
from vla_jax.data.readers.lerobot import writer
from vla_jax.policies import policy
from vla_jax.training import checkpoint
from vla_jax.types import Observation

ROBOTS = {  # cameras, dimensions of proprio and of action
    "whole": (("image_primary", "image_wrist"), 8, 7),
    "small": (("image_primary",), 5, 4),
    "blind": (("image_wrist",), 0, 7),  # to its own state
}


def episode(rng, robot, length):
    cameras, proprio_dim, action_dim = ROBOTS[robot]
    images = {
        camera: np.repeat(rng.integers(0, 256, (length, 2, 2, 3), np.uint8), 8, 1).repeat(8, 2)
        for camera in cameras
    }
    if proprio_dim:
        images["proprio"] = rng.normal(size=(length, proprio_dim)).astype(np.float32)
    action = rng.uniform(-1, 1, (length, action_dim)).astype(np.float32)
    action[:, -1] = np.sign(action[:, -1])
    return Episode(images, action, f"move the {robot} arm")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Writes the data sets; returns a function from names to the path of their mixture."""
    folder = tmp_path_factory.mktemp("mixture")
    for seed, robot in enumerate(ROBOTS):
        rng = np.random.default_rng(seed)
        writer.write(folder / robot, [episode(rng, robot, n) for n in (9, 7)], fps=10)

    def write(*names):
        entries = [{"name": name, "path": name, "weight": n + 1} for n, name in enumerate(names)]
        path = folder / f"{'_'.join(names)}.json"
        path.write_text(json.dumps({"datasets": entries}))
        return str(path)

    return write


def imitation(mixture, run_dir, **options):
    return tiny_demos.imitation(
        "", run_dir, backbone=tiny_demos.PERCEIVER, mixture=mixture, **options
    )


def losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def check_resumed(train, config, whole, tmp_path, step):
    """Checks that a run without its last checkpoint ends the same."""
    again = shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / str(step))
    train(dataclasses.replace(config, run_dir=str(again)))
    states = [checkpoint.restore_params(run / "checkpoints") for run in (whole, again)]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
@pytest.mark.sampled
def test_a_mixture_on_cached_tokens_trains_as_with_the_backbone_frozen(mixture, tmp_path):
    config = imitation(mixture(*ROBOTS), tmp_path / "cached", frozen_backbone=True)
    folders = cache(config)
    assert [folder.parents[1].name for folder in folders] == list(ROBOTS)
    before = [path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()]
    # the cache belongs to the data set: another mixture uses it too
    assert cache(dataclasses.replace(config, mixture=mixture("small", "whole"))) == folders[1::-1]
    cached = imitate(config)
    assert [path.stat().st_mtime_ns for f in folders for path in f.iterdir()] == before
    check_resumed(imitate, config, cached, tmp_path, 4)
    optim = dataclasses.replace(config.optim, freeze=("backbone/*",))
    config = imitation(config.mixture, tmp_path / "encoded")
    encoded = imitate(dataclasses.replace(config, optim=optim))
    np.testing.assert_allclose(losses(cached), losses(encoded), atol=1e-5)
    for robot, (_, proprio_dim, action_dim) in ROBOTS.items():
        stats, layout, cameras = mixture_robots.read(cached, robot)
        assert set(cameras) == set(ROBOTS[robot][0])
        assert layout.dim == action_dim == len(stats["action"].mean)
        assert len(stats["proprio"].mean if proprio_dim else ()) == proprio_dim
        assert ("proprio" in stats) == (proprio_dim > 0)
    check_acting_equals_the_windows(config, runs.load_run(encoded, robot="blind"))


def check_acting_equals_the_windows(config, run):
    """Acts on the robot without proprio and primary camera, from the data of its episode."""
    assert run.agent.missing_parts == ("image_primary", "proprio")
    source = read_training_inputs(config).source
    batch = source[np.array([len(source) - 7 + t for t in range(2)])]
    chunk = jax.jit(policy.apply, static_argnums=1)(
        run.params, run.agent.policy, batch.observation, timestep_mask=batch.timestep_mask
    )
    agent = make_agent(run.agent, run.norm_stats)
    state, step = agent.init(run.params, 1), jax.jit(agent.step)
    words = read_instruction(run.agent, "move the blind arm")[None]
    for t in range(2):
        images = batch.observation.image_wrist[t, -1:]
        seen = Observation(image_wrist=images, instruction=words)
        state, action = step(run.params, state, seen, np.array([t == 0]))
        arm = normalize.denormalize_action(
            np.concatenate([chunk.arm[t, -1:, 0], [[1.0]]], axis=1),
            run.norm_stats["action"],
            run.agent.normalize,
        )
        np.testing.assert_allclose(action[:, :6], arm[:, :6], rtol=1e-4, atol=1e-5)


def test_a_policy_of_other_sizes_than_the_mixture_is_refused_before_encoding(
    mixture, tmp_path, monkeypatch
):
    config = imitation(mixture("small"), tmp_path / "run", frozen_backbone=True)
    with monkeypatch.context() as patch:
        patch.setattr(data_parts, "read_dataset", None)  # actions are compared before any is read
        with pytest.raises(ValueError, match=r"action_dim must be 4 as in .*small.json, got 7"):
            imitate(config)
    decoder = dataclasses.replace(config.agent.policy.decoder, action_dim=4)
    policy = dataclasses.replace(config.agent.policy, decoder=decoder)
    config = dataclasses.replace(config, agent=dataclasses.replace(config.agent, policy=policy))
    with pytest.raises(ValueError, match=r"proprio_dim must be .* which is 5, got 8; use --prop"):
        cache(config)


@pytest.mark.slow
def test_a_backbone_is_pretrained_on_a_mixture_and_resumes_to_the_bit(mixture, tmp_path):
    config = dataclasses.replace(
        tiny_demos.pretraining("", tmp_path / "run"),
        mixture=mixture("whole", "small"),
        target="action",
        loop=tiny_demos.LOOP,
    )
    run_dir = pretrain.pretrain(config)
    check_resumed(pretrain.pretrain, config, run_dir, tmp_path, 4)
    assert np.isfinite(losses(run_dir)).all()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    # 4 batches of 8, of which 2/3 are from the 16 frames of the second data set
    assert json.loads(lines[-1])["epochs small"] == pytest.approx(4 * 8 * 2 / 3 / 16)
    assert mixture_robots.names(run_dir) == ["small", "whole"]
    params = checkpoint.restore_params(run_dir / "checkpoints")
    assert params["readout"]["bias"].shape == (7,)


def test_targets_that_a_robot_lacks_do_not_count(mixture, tmp_path):
    config = tiny_demos.pretraining("", tmp_path / "run")
    config = dataclasses.replace(config, mixture=mixture("whole", "small"), target="action")
    parts = pretrain.read_parts(config)
    source = pretrain.make_source(config, parts)
    batch = source[np.array([0, len(source) - 1])]
    mask = pretrain.target_mask(batch, "action", 7)[:, 0]
    np.testing.assert_array_equal(mask, [[1] * 7, [1, 1, 1, 0, 0, 0, 1]])
    mask = pretrain.target_mask(batch, "proprio", 8)[:, 0]
    np.testing.assert_array_equal(mask, [[1] * 8, [1] * 5 + [0] * 3])
    with pytest.raises(ValueError, match=r"target must be a column of .*blind, got 'proprio'"):
        pretrain.read_parts(
            dataclasses.replace(config, mixture=mixture("whole", "blind"), target="proprio")
        )
