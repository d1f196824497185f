"""A training starts and resumes on its devices: sharded, and in several processes."""

import dataclasses
import shutil

import jax
import numpy as np
import optax
import pytest
import tiny_demos
import tiny_vlm
from jax.sharding import PartitionSpec
from processes import run_together
from test_train_vlm import TOKENIZER, VLM

from train import setup
from train.imitate import imitate
from vla_jax import backbones
from vla_jax.acting.agent import AgentConfig
from vla_jax.data import token_files
from vla_jax.policies import policy
from vla_jax.runs import load_run
from vla_jax.training import checkpoint, optim, parallel
from vla_jax.training.logs import read_metrics
from vla_jax.training.loop import LoopConfig
from vla_jax.training.update import init_train_state
from vla_jax.trees import leaves_by_path

LOOP = LoopConfig(num_updates=2, log_every=1, save_every=1)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return tiny_demos.write(tmp_path_factory.mktemp("demos") / "table")


def training(demos, run_dir, **options):
    """Config of two updates of a tiny vision-language model with an LSTM."""
    frozen = options.pop("frozen_backbone", False)
    vlm = dataclasses.replace(VLM, options=dataclasses.replace(VLM.options, readout="image_mean"))
    decoder = dataclasses.replace(tiny_demos.DECODER, window_size=2, dropout=0.0)
    config = tiny_demos.imitation(demos, run_dir, frozen_backbone=frozen)
    return dataclasses.replace(
        config,
        agent=AgentConfig(policy.connect(vlm, decoder)),
        loop=dataclasses.replace(LOOP, **options),
        loader=dataclasses.replace(config.loader, batch_size=4),
    )


def make_start(config):
    settings = setup.make_optim_config(config)
    optimizer = optim.make_optimizer(settings, 2, setup.param_shapes(config))
    return setup.make_start(jax.random.key(0), config, optimizer), optimizer


def make_shardings(config, shapes):
    mesh = parallel.make_mesh(config.loop.mesh)
    return parallel.make_shardings(shapes, mesh, setup.sharding_rules(config))


def test_a_state_is_made_sharded_and_equals_that_of_one_device():
    config = training("", "", mesh="data=2,fsdp=2")
    start, optimizer = make_start(config)
    state = start.make(make_shardings(config, start.shapes))
    kernel = "backbone/language/layers/gate/kernel"
    leaves = leaves_by_path(state)
    kernels = [leaf for path, leaf in leaves.items() if path.endswith(kernel)]
    assert len(kernels) == 4  # params, two moments, EMA
    for leaf in kernels:
        assert leaf.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        assert leaf.addressable_shards[0].data.shape[1] == leaf.shape[1] // 2
    params = setup.init_params(jax.random.key(0), config)
    expected = leaves_by_path(init_train_state(params, optimizer, ema=True))
    assert leaves.keys() == expected.keys()
    for path, leaf in leaves.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.sampled
def test_resuming_restores_to_the_devices_and_makes_no_other_state(demos, tmp_path, monkeypatch):
    config = training(demos, tmp_path / "run", mesh="data=2,fsdp=2")
    imitate(config)
    start, _ = make_start(config)
    shardings = make_shardings(config, start.shapes)
    shapes = parallel.with_shardings(start.shapes, shardings)
    restored, _ = checkpoint.restore(tmp_path / "run/checkpoints", shapes)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings
    whole, _ = checkpoint.restore(tmp_path / "run/checkpoints", start.shapes)
    jax.tree.map(np.testing.assert_array_equal, whole, restored)
    monkeypatch.setattr(setup, "_read_params", None)
    monkeypatch.setattr(setup, "init_train_state", refuse_arrays)
    assert imitate(config) == tmp_path / "run"


def refuse_arrays(params, *args, **options):
    assert all(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params))
    return init_train_state(params, *args, **options)


@pytest.mark.slow
def test_a_frozen_backbone_is_stored_once_and_read_with_every_checkpoint(demos, tmp_path):
    config = training(demos, tmp_path / "run", mesh="data=1", frozen_backbone=True)
    run_dir = imitate(config)
    stored = run_dir / "checkpoints/frozen"
    assert {path.stat().st_nlink for path in stored.rglob("*") if path.is_file()} == {2}
    shutil.move(stored, tmp_path / "moved")
    assert checkpoint.restore_params(run_dir / "checkpoints").keys() == {"decoder"}
    shutil.move(tmp_path / "moved", stored)
    expected = setup.init_params(jax.random.split(jax.random.key(0))[0], config)["backbone"]
    jax.tree.map(np.testing.assert_array_equal, load_run(run_dir).params["backbone"], expected)
    again = dataclasses.replace(config, backbone_from=str(run_dir), run_dir=str(tmp_path / "next"))
    jax.tree.map(
        np.testing.assert_array_equal, load_run(imitate(again)).params["backbone"], expected
    )


def train_on(run_dir, demos, mesh):
    """Trains two updates on a mesh; returns the run's folder."""
    return imitate(training(demos, run_dir, mesh=mesh))


@pytest.fixture(scope="module")
def alone(demos, tmp_path_factory):
    return train_on(tmp_path_factory.mktemp("alone") / "run", demos, "data=1")


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(
    "mesh", ["data=2,tensor=2", "data=4", "data=2,fsdp=2", "fsdp=4", "fsdp=2,tensor=2"]
)
def test_every_mesh_trains_what_one_device_does(mesh, alone, demos, tmp_path):
    assert_same_training(train_on(tmp_path / "run", demos, mesh), alone)


@pytest.fixture(scope="module")
def sharded(demos, tmp_path_factory):
    return train_on(tmp_path_factory.mktemp("sharded") / "run", demos, "data=2,fsdp=2")


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("mesh", ["data=1", "tensor=2,data=1", "fsdp=4", "data=2,tensor=2"])
def test_a_training_resumes_on_other_devices_and_another_mesh(mesh, sharded, demos, tmp_path):
    run_dir = shutil.copytree(sharded, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints/2")
    start, _ = make_start(training(demos, run_dir))
    placed = [
        parallel.with_shardings(
            start.shapes, make_shardings(training("", "", mesh=m), start.shapes)
        )
        for m in ("data=2,fsdp=2", mesh)
    ]
    first, other = (checkpoint.restore(run_dir / "checkpoints", shapes)[0] for shapes in placed)
    jax.tree.map(np.testing.assert_array_equal, first, other)
    train_on(run_dir, demos, mesh)  # the second update
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (run_dir, sharded))
    assert [line["step"] for line in lines] == [1, 2]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(lines[1][name], expected[1][name], rtol=2e-6)
    assert_same_training(run_dir, sharded)


RESUME = """
from test_train_sharded import descend
descend(*args)
"""


def descend(run_dir, demos, mesh):
    """Trains two updates by gradient descent, whose params have errors as small as the gradients.

    Adam would scale rounding to the learning rate where a gradient is nearly 0.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "make_optimizer", lambda *_: optax.sgd(0.1, momentum=0.9))
        return train_on(run_dir, demos, mesh)


@pytest.fixture(scope="module")
def descended(demos, tmp_path_factory):
    return descend(tmp_path_factory.mktemp("descended") / "run", demos, "data=2,fsdp=2")


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(
    ("num_devices", "mesh"),
    [(1, "data=1"), (2, "fsdp=2"), (8, "data=2,fsdp=2,tensor=2"), (8, "fsdp=4,tensor=2")],
)
def test_a_checkpoint_of_four_devices_resumes_on_1_2_and_8(
    num_devices, mesh, descended, demos, tmp_path
):
    run_dir = shutil.copytree(descended, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints/2")
    run_together(RESUME, run_dir, demos, mesh, num_processes=1, num_devices=num_devices)
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (run_dir, descended))
    assert [line["step"] for line in lines] == [1, 2]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(lines[1][name], expected[1][name], rtol=1e-6)
    before = restored(descended, step=1)
    found, whole = (restored(folder, step=2) for folder in (run_dir, descended))
    for path, leaf in whole.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-6, err_msg=path)
    assert max(np.abs(leaf - before[path]).max() for path, leaf in whole.items()) > 1e-2


def restored(run_dir, step):
    return leaves_by_path(checkpoint.restore_params(run_dir / "checkpoints", step=step))


# --- two processes ------------------------------------------------------------------------------

PROGRAM = """
import pathlib
from test_train_sharded import train_both
folder, demos, model = args
written = train_both(demos, pathlib.Path(folder), model, mesh="data=2,fsdp=2")
print(*written)
"""


def train_both(demos, folder, model, **options):
    """Trains end to end, then on cached tokens; returns the shards that this process wrote."""
    write_shard, written = token_files.write_shard, []

    def write(path, shard, *args):
        written.append(shard)
        write_shard(path, shard, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "write_shard", write)
        patch.setattr(token_files, "SHARD_BYTES", 10_000)
        for name, frozen in (("whole", False), ("cached", True)):
            config = training(demos, folder / name, frozen_backbone=frozen, **options)
            config = dataclasses.replace(config, backbone_from=str(model))
            imitate(config)
            imitate(config)  # resumes the finished run
    return written


@pytest.mark.slow
@pytest.mark.sampled
def test_two_processes_train_and_cache_what_one_does(demos, tmp_path):
    model = tmp_path / "model"
    backbones.export(model, VLM, tiny_vlm.params(VLM))
    shutil.copy(TOKENIZER, model)
    without = shutil.ignore_patterns(".tokens")  # caches of other tests
    data = [shutil.copytree(demos, tmp_path / name, ignore=without) for name in ("shared", "alone")]
    outputs = run_together(PROGRAM, tmp_path / "two", data[0], model)
    written = [lines.splitlines()[-1].split() for lines, _ in outputs]  # Gloo prints too
    one = train_both(data[1], tmp_path / "one", model, mesh="data=1")
    assert one == list(range(len(one)))
    assert [list(map(int, shards)) for shards in written] == [one[::2], one[1::2]]
    caches = [next(path for path in folder.glob(".tokens/*") if path.is_dir()) for folder in data]
    assert caches[0].name == caches[1].name
    for shard in one:
        files = [folder / f"shard_{shard:05d}/tokens.npy" for folder in caches]
        np.testing.assert_allclose(*map(np.load, files), atol=1e-5)
    for name in ("whole", "cached"):
        assert_same_training(tmp_path / "two" / name, tmp_path / "one" / name)


def assert_same_training(one, other):
    assert_same_metrics(one, other)
    assert_close(*(leaves_by_path(load_run(folder).params) for folder in (one, other)))


def assert_same_metrics(one, other):
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (one, other))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [line[name] for line in first], [line[name] for line in second], rtol=1e-5
        )


def assert_close(first, second):
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        # Adam scales rounding to the learning rate where a gradient is nearly 0: in single numbers
        # of a kernel, and in the bias of the keys, on which a softmax does not depend.
        difference = np.abs(leaf - second[path])
        assert difference.max() <= 1e-2, path
        if not path.endswith("key/bias"):
            assert np.mean(difference > 1e-4) <= 0.01, path
