"""Law 6: eight devices train what one does, and their number of processes changes no bit."""

import dataclasses

import pytest
import tiny_demos
from processes import run_together
from test_scripts_sharded import assert_equal_training, assert_same_training

from train.imitate import imitate
from vla_jax.data.image_augment import AugmentConfig
from vla_jax.training import checkpoint
from vla_jax.training.loop import LoopConfig

AUGMENT = AugmentConfig(shift=2, brightness=0.2, contrast=0.2)
PROGRAM = """
import test_process_counts
name, *words, num_updates = args
getattr(test_process_counts, name)(*words, int(num_updates))
"""


def from_state(demos, folder, mesh, num_updates):
    train(tiny_demos.imitation(demos, folder), mesh, num_updates)


def from_images(demos, folder, mesh, num_updates):
    config = tiny_demos.imitation(demos, folder, backbone=tiny_demos.PERCEIVER)
    train(dataclasses.replace(config, augment=AUGMENT), mesh, num_updates)


def train(config, mesh, num_updates):
    loop = LoopConfig(num_updates=num_updates, log_every=1, save_every=1, mesh=mesh)
    imitate(dataclasses.replace(config, loop=loop))


def train_in(num_processes, function, *words):
    """Trains on eight devices."""
    devices = 8 // num_processes
    name = function.__name__
    run_together(PROGRAM, name, *words, num_processes=num_processes, num_devices=devices)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return tiny_demos.write(tmp_path_factory.mktemp("data") / "demos")


@pytest.fixture(scope="module")
def alone(demos, tmp_path_factory):
    """Folder of a training on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    from_state(demos, folder, "data=1", 2)
    return folder


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2"])
def test_eight_devices_train_what_one_does_in_any_number_of_processes(mesh, demos, alone, tmp_path):
    for count in (1, 2, 4):
        train_in(count, from_state, demos, tmp_path / str(count), mesh, 2)
    assert_same_training(tmp_path / "1", alone)
    for count in (2, 4):
        assert_equal_training(tmp_path / str(count), tmp_path / "1")


@pytest.mark.slow
@pytest.mark.sampled
def test_a_training_of_two_processes_continues_in_four_to_the_bit(demos, tmp_path):
    """Images are augmented by the loader of each process."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_in(1, from_images, demos, whole, "data=2,fsdp=4", 2)
    train_in(2, from_images, demos, resumed, "data=2,fsdp=4", 1)
    assert checkpoint.latest_step(resumed / "checkpoints") == 1
    train_in(4, from_images, demos, resumed, "data=2,fsdp=4", 2)
    assert_equal_training(resumed, whole)
