"""Every training script on a mesh of devices, and in two processes, trains what one device does."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import test_finetune
import test_learning_loop
import test_train_scan
import tiny_demos
import tiny_run
from processes import run_together

from train import deep_sarsa, ppo, reinforce, scan
from train.finetune import finetune
from train.imitate import imitate
from train.pretrain import pretrain
from vla_jax.training import checkpoint, parallel
from vla_jax.training.logs import read_metrics
from vla_jax.training.loop import LoopConfig
from vla_jax.trees import leaves_by_path

REWARD = {"deep_sarsa": deep_sarsa, "ppo": ppo, "reinforce": reinforce}
NAMES = {"deep_sarsa": "sarsa"}  # those of test_learning_loop
PART = {"finetune": "learning"}  # folder of the checkpoints in the folder of the run


def loop_of(mesh):
    return LoopConfig(num_updates=2, log_every=1, save_every=2, mesh=mesh)


def train_imitate(folder, inputs, mesh):
    config = tiny_demos.imitation(inputs / "demos", folder)
    return imitate(dataclasses.replace(config, loop=loop_of(mesh)))


def train_pretrain(folder, inputs, mesh):
    config = tiny_demos.pretraining(inputs / "demos", folder)
    return pretrain(dataclasses.replace(config, loop=loop_of(mesh)))


def train_scan(folder, inputs, mesh):
    del inputs
    return scan.train(test_train_scan.tiny(folder, loop=loop_of(mesh)))


def train_finetune(folder, inputs, mesh):
    config = test_finetune.config_of(inputs / "cloned", folder)
    return finetune(dataclasses.replace(config, loop=loop_of(mesh))) / PART["finetune"]


def train_from_reward(name, folder, inputs, mesh):
    del inputs
    config_type, _ = test_learning_loop.MAKERS[NAMES.get(name, name)]
    parts = test_learning_loop.PARTS
    return REWARD[name].train(config_type(run_dir=str(folder), loop=loop_of(mesh), **parts))


TRAININGS = {
    "imitate": train_imitate,
    "pretrain": train_pretrain,
    "scan": train_scan,
    "finetune": train_finetune,
    **{
        name: lambda folder, inputs, mesh, name=name: train_from_reward(name, folder, inputs, mesh)
        for name in REWARD
    },
}


def train(name, folder, inputs, mesh):
    """Trains with a script; returns the folder of its checkpoints, and the axes of its params."""
    make_shardings, axes = parallel.make_shardings, set()

    def record(tree, mesh, rules=()):
        shardings = make_shardings(tree, mesh, rules)
        for sharding in jax.tree.leaves(shardings):
            axes.update(filter(None, sharding.spec))
        return shardings

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_shardings", record)
        return TRAININGS[name](pathlib.Path(folder), pathlib.Path(inputs), mesh), axes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder of demonstrations and of a cloned policy."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_demos.write(folder / "demos")
    (folder / "cloned").mkdir()
    tiny_run.write(folder / "cloned")
    return folder


@pytest.fixture(scope="module", params=TRAININGS)
def alone(request, inputs, tmp_path_factory):
    """Name of a script, and the folder of its training on one device."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, train(request.param, folder, inputs, "data=1")[0]


@pytest.mark.slow
@pytest.mark.sampled
def test_a_script_on_a_mesh_trains_what_one_device_does(alone, inputs, tmp_path):
    name, expected = alone
    found, axes = train(name, tmp_path / "run", inputs, "data=2,fsdp=2")
    assert "fsdp" in axes
    assert_same_training(found, expected)


PROGRAM = """
from test_scripts_sharded import train
name, folder, inputs = args
assert "fsdp" in train(name, folder, inputs, "fsdp=4")[1]
"""


@pytest.mark.slow
@pytest.mark.sampled
def test_a_script_in_two_processes_with_a_part_of_the_params_each(alone, inputs, tmp_path):
    """The number of processes changes no bit, if their collectives are the same (Gloo)."""
    name, expected = alone
    run_together(PROGRAM, name, tmp_path / "two", inputs)
    run_together(PROGRAM, name, tmp_path / "one", inputs, num_processes=1, num_devices=4)
    two, one = (tmp_path / each / PART.get(name, "") for each in ("two", "one"))
    assert_same_training(two, expected)
    assert_equal_training(two, one)


def assert_same_training(found, expected):
    for name in ("loss", "grad_norm"):
        one, other = (
            [line[name] for line in read_metrics(folder / "metrics.jsonl")]
            for folder in (found, expected)
        )
        assert len(one) == 2
        assert one[0] != one[1]  # the first update changed something
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)
    first, second = (params_of(folder / "checkpoints") for folder in (found, expected))
    assert first.keys() == second.keys() != set()
    for path, leaf in first.items():
        # a softmax does not depend on it: its gradient is rounding, which Adam scales up
        if not path.endswith("key/bias"):
            np.testing.assert_allclose(leaf, second[path], rtol=0, atol=1e-5, err_msg=path)


def assert_equal_training(found, expected):
    for name in ("step", "loss", "grad_norm"):
        one, other = (
            [line[name] for line in read_metrics(folder / "metrics.jsonl")]
            for folder in (found, expected)
        )
        assert one == other
    first, second = (params_of(folder / "checkpoints") for folder in (found, expected))
    assert first.keys() == second.keys() != set()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], err_msg=path)


def params_of(directory):
    """Params of the latest checkpoint, by path; of all seeds where there are some."""
    path = directory / str(checkpoint.latest_step(directory))
    stored, record = checkpoint._stored(path)
    if "train_state" not in stored:
        return leaves_by_path(checkpoint.restore_params(directory))
    target = {"train_state": {"params": stored["train_state"]["params"]}}
    loaded = checkpoint._load(path, checkpoint._as_numpy(target), record)
    return leaves_by_path(loaded["train_state"]["params"])
