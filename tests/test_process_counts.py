"""Law 6: eight devices train what one does, and their number of processes changes no bit."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tiny_demos
from processes import run_together
from test_scripts_sharded import assert_same_training, params_of

from train.imitate import imitate
from vla_jax.training.logs import read_metrics
from vla_jax.training.loop import LoopConfig

MESHES = ("data=8", "fsdp=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2")
RESUMED = "data=2,fsdp=4"
PROGRAM = """
from test_process_counts import train_all
train_all(*args)
"""


def train(demos, folder, mesh, num_updates):
    loop = LoopConfig(num_updates=num_updates, log_every=1, save_every=1, mesh=mesh)
    imitate(dataclasses.replace(tiny_demos.imitation(demos, folder), loop=loop))


def train_all(demos, folder, updates_of_resumed):
    """Trains on every mesh, and once up to a number of updates."""
    for mesh in MESHES:
        train(demos, f"{folder}/{mesh}", mesh, 2)
    train(demos, pathlib.Path(folder).parent / "resumed", RESUMED, int(updates_of_resumed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of trainings on one device, and on eight in one, two and four processes."""
    folder = tmp_path_factory.mktemp("processes")
    demos = tiny_demos.write(folder / "demos")
    train(demos, folder / "alone", "data=1", 2)
    for count, updates_of_resumed in ((2, 1), (4, 2), (1, 2)):
        where = (demos, folder / str(count), updates_of_resumed)
        run_together(PROGRAM, *where, num_processes=count, num_devices=8 // count)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_train_what_one_does_in_any_number_of_processes(folder, mesh):
    assert_same_training(folder / "1" / mesh, folder / "alone")
    for count in (2, 4):
        assert_equal_training(folder / str(count) / mesh, folder / "1" / mesh)


@pytest.mark.slow
def test_a_training_of_two_processes_continues_in_four_to_the_bit(folder):
    assert_same_training(folder / "resumed", folder / "alone")
    assert_equal_training(folder / "resumed", folder / "1" / RESUMED)


def assert_equal_training(found, expected):
    for name in ("loss", "grad_norm"):
        one, other = (
            [line[name] for line in read_metrics(folder / "metrics.jsonl")]
            for folder in (found, expected)
        )
        assert one == other
    first, second = (params_of(folder / "checkpoints") for folder in (found, expected))
    assert first.keys() == second.keys() != set()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], err_msg=path)
