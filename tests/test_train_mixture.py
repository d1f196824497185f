"""Trainings on two robots, of which one lacks a camera and numbers of proprio and action."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_demos

from train import data_parts
from train.cache import cache
from train.imitate import imitate
from vla_jax.data.dataset import Episode
from vla_jax.data.readers.lerobot import writer
from vla_jax.training import checkpoint

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


def test_a_mixture_on_cached_tokens_trains_as_with_the_backbone_frozen(mixture, tmp_path):
    config = imitation(mixture("whole", "small"), tmp_path / "cached", frozen_backbone=True)
    folders = cache(config)
    assert [folder.parents[1].name for folder in folders] == ["whole", "small"]
    before = [path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()]
    # the cache belongs to the data set: another mixture uses it too
    assert cache(dataclasses.replace(config, mixture=mixture("small", "whole"))) == folders[::-1]
    cached = imitate(config)
    assert [path.stat().st_mtime_ns for f in folders for path in f.iterdir()] == before
    check_resumed(imitate, config, cached, tmp_path, 4)
    optim = dataclasses.replace(config.optim, freeze=("backbone/*",))
    config = imitation(config.mixture, tmp_path / "encoded")
    encoded = imitate(dataclasses.replace(config, optim=optim))
    np.testing.assert_allclose(losses(cached), losses(encoded), atol=1e-5)


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
