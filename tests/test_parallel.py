"""Law 6: one device = many devices = many processes, and jit = pmap."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from processes import run_together

from vla_jax import config, trees
from vla_jax.command_line import command_line
from vla_jax.training import checkpoint, optim, parallel, update
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig

OPTIM = OptimConfig(learning_rate=0.01, warmup_steps=2, ema_decay=0.9)
NUM_UPDATES = 3


def make_params():
    kernel = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
    return {"head": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros((1, 2))}}


def make_batch(seed):
    draw = np.random.default_rng(seed)
    mask = draw.random(8) > 0.4  # the devices get different numbers of real rows
    return {"x": draw.normal(size=(8, 3)).astype(np.float32), "mask": mask, "absent": None}


def masked_loss(params, batch, key, axis_name=None):
    """Mean over the real rows of all devices; no randomness."""
    error = jnp.square(batch["x"] @ params["head"]["kernel"] + params["head"]["bias"] - 1.0)
    sums = (jnp.sum(error * batch["mask"][:, None]), jnp.sum(batch["mask"]))
    total, count = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    return total / count, {"num_real": count.astype(jnp.float32)}


def plain_loss(params, batch, key, axis_name=None):
    """Mean over the rows of this device; averaging over devices is left to the update."""
    return masked_loss(params, {**batch, "mask": jnp.ones(len(batch["x"]))}, key)


def dropout_loss(params, batch, key):
    keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return masked_loss(params, {**batch, "x": batch["x"] * keep}, key)


def rows_of_this_process(batch):
    size = 8 // jax.process_count()
    first = size * jax.process_index()
    return jax.tree.map(lambda rows: rows[first : first + size], batch)


def run_jit(num_devices, key, *, loss_fn=masked_loss, optim_config=OPTIM):
    mesh = parallel.make_mesh(f"data={num_devices}")
    params = make_params()
    optimizer = optim.make_optimizer(optim_config, 10, params)
    step = update.make_update(loss_fn, optimizer, ema_decay=optim_config.ema_decay)
    step = parallel.jit_update(step, mesh)
    state = parallel.replicate(update.init_train_state(params, optimizer, ema=True), mesh)
    for seed in range(NUM_UPDATES):
        batch = parallel.shard_batch(rows_of_this_process(make_batch(seed)), mesh)
        state, metrics = step(state, batch, key)
    return state, metrics


def run_pmap(num_devices, key, *, loss_fn):
    params = make_params()
    optimizer = optim.make_optimizer(OPTIM, 10, params)
    step = update.make_update(
        functools.partial(loss_fn, axis_name="data"),
        optimizer,
        ema_decay=OPTIM.ema_decay,
        axis_name="data",
    )
    step = parallel.pmap_update(step, parallel.make_mesh(f"data={num_devices}"))
    state = update.init_train_state(params, optimizer, ema=True)
    for seed in range(NUM_UPDATES):
        state, metrics = step(state, make_batch(seed), key)
    return state.params, state.ema_params, metrics["loss"], metrics["grad_norm"]


def run_sharded(mesh, rules, key):
    """Runs the updates with kernels `[8, 4]`; returns the params, losses, and shardings."""
    draw = np.random.default_rng(0)
    kernels = [draw.normal(size=size).astype(np.float32) / 4 for size in ((8, 8), (8, 4))]
    layers = [{"kernel": jnp.asarray(k), "bias": jnp.zeros((1, k.shape[1]))} for k in kernels]

    def loss_fn(params, batch, key):
        hidden = jnp.tanh(batch @ params["decoder"][0]["kernel"] + params["decoder"][0]["bias"])
        out = hidden @ params["decoder"][1]["kernel"] + params["decoder"][1]["bias"]
        return jnp.mean(jnp.square(out - 1.0)), {}

    optimizer = optim.make_optimizer(OPTIM, 10, {"decoder": layers})
    state = update.init_train_state({"decoder": layers}, optimizer, ema=True)
    shardings = parallel.make_shardings(state, mesh, rules)
    state = jax.device_put(state, shardings)
    step = update.make_update(loss_fn, optimizer, ema_decay=OPTIM.ema_decay)
    step, losses = parallel.jit_update(step, mesh, shardings), []
    for seed in range(NUM_UPDATES):
        batch = np.random.default_rng(seed).normal(size=(8, 8)).astype(np.float32)
        state, metrics = step(state, parallel.shard_batch(batch, mesh), key)
        losses.append(metrics["loss"])
    return state, jnp.stack(losses)


KERNELS = (("decoder/*/kernel", PartitionSpec("fsdp")),)
COLUMNS_AND_ROWS = (
    ("decoder/0/kernel", PartitionSpec("fsdp", "tensor")),
    ("decoder/1/kernel", PartitionSpec("tensor", "fsdp")),
)
SHARDED = {  # name -> (mesh, rules)
    "tensor": (lambda: parallel.make_mesh("data=2,tensor=2"), COLUMNS_AND_ROWS),
    "fsdp and tensor": (lambda: parallel.make_mesh("fsdp=2,tensor=2"), COLUMNS_AND_ROWS),
    "one axis": (lambda: jax.make_mesh((4,), ("data",), (AxisType.Auto,)), ()),
    "one axis, sharded": (
        lambda: jax.make_mesh((4,), ("data",), (AxisType.Auto,)),
        (("*/kernel", PartitionSpec("data")),),
    ),
    "two axes": (lambda: parallel.make_mesh("data=2,fsdp=2"), ()),
    "two axes, rows sharded": (lambda: parallel.make_mesh("data=2,fsdp=2"), KERNELS),
    "two axes, columns sharded": (
        lambda: parallel.make_mesh("data=1,fsdp=4"),
        (("kernel", PartitionSpec(None, "fsdp")), ("bias", PartitionSpec(None, "fsdp"))),
    ),
}


@pytest.mark.parametrize(("make_mesh", "rules"), SHARDED.values(), ids=SHARDED)
def test_every_sharding_equals_one_device(make_mesh, rules, key):
    expected = run_sharded(parallel.make_mesh("data=1"), (), key)
    state, losses = run_sharded(make_mesh(), rules, key)
    for one, other in zip(jax.tree.leaves((state, losses)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_params_ema_and_optimiser_state_have_the_same_sharding(key):
    state, _ = run_sharded(parallel.make_mesh("data=2,fsdp=2"), KERNELS, key)
    leaves = trees.leaves_by_path(state)
    kernels = {path for path in leaves if path.endswith("decoder/0/kernel")}
    assert len(kernels) == 4  # params, ema_params, mu, nu
    for path, leaf in leaves.items():
        expected = PartitionSpec("fsdp") if path.endswith("kernel") else PartitionSpec()
        assert leaf.sharding.spec == expected, path


def test_a_mesh_may_be_made_of_some_devices():
    devices = jax.devices()[1:]
    assert set(parallel.make_mesh("data=2", devices=devices).devices.flat) == set(devices[:2])
    with pytest.raises(ValueError, match=r"mesh must be at most 3, .*got data=4 \(4\); choose"):
        parallel.make_mesh("data=4", devices=devices)


def test_the_first_matching_rule_applies():
    tree = {"a": {"kernel": np.zeros((4, 4))}, "b": {"kernel": np.zeros((4, 4)), "scale": 1.0}}
    rules = (("b/*", PartitionSpec(None, "fsdp")), ("*kernel", PartitionSpec("fsdp")))
    shardings = parallel.make_shardings(tree, parallel.make_mesh("data=2,fsdp=2"), rules)
    specs = {path: sharding.spec for path, sharding in trees.leaves_by_path(shardings).items()}
    assert specs == {
        "a/kernel": PartitionSpec("fsdp"),
        "b/kernel": PartitionSpec(None, "fsdp"),
        "b/scale": PartitionSpec(),
    }


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            PartitionSpec("model"),
            r"rule for 'a' names the axis 'model', .* has data, fsdp, tensor; change",
        ),
        (PartitionSpec(None, None, "fsdp"), r"a has 3 entries, but its shape is \[3, 2\]; drop"),
    ],
)
def test_an_invalid_rule_is_refused(spec, sentence):
    mesh = parallel.make_mesh("data=2,fsdp=2")
    with pytest.raises(ValueError, match=sentence):
        parallel.make_shardings({"a": np.zeros((3, 2))}, mesh, (("a", spec),))


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        ("", (4, 1, 1)),
        ("fsdp=2", (2, 2, 1)),
        ("data=2, tensor=2", (2, 1, 2)),
        ("data=1", (1, 1, 1)),
    ],
)
def test_data_takes_the_devices_that_remain(mesh, sizes):
    assert tuple(parallel.make_mesh(mesh).shape.values()) == sizes


@pytest.mark.parametrize(
    ("saved", "mesh"),
    [
        ({"num_devices": 0, "fsdp_size": 1}, ""),
        ({"num_devices": 4, "fsdp_size": 2}, "data=2,fsdp=2"),
        ({"num_devices": 0, "fsdp_size": 2}, "fsdp=2"),
        ({"mesh": "data=4"}, "data=4"),
    ],
)
def test_the_devices_of_an_earlier_config_become_a_mesh(saved, mesh):
    assert config.from_dict(LoopConfig, saved).mesh == mesh


def test_an_option_of_an_earlier_version_names_the_one_in_its_place(capsys):
    for option in ("--num-devices=4", "--fsdp_size"):
        with pytest.raises(SystemExit):
            command_line({"only": LoopConfig}, [option, "4"], description="")
        assert re.search("is no longer an option; use --mesh .*", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ("model=2", r"mesh has no axis 'model'; choose from data, fsdp, tensor\. Did you"),
        ("4", "mesh has no axis '4'"),
        ("data=2,data=2", "every axis once, got 'data' twice; drop one"),
        ("fsdp=0", "pairs of axis and size such as data=2,fsdp=4, got 'fsdp=0'; give"),
        ("fsdp", "got 'fsdp'; give"),
        ("fsdp=3", "must split the 4 devices evenly, got fsdp=3; choose sizes"),
        ("data=2,fsdp=4", r"must be at most 4, .*, got data=2,fsdp=4 \(8\); choose"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh, sentence):
    with pytest.raises(ValueError, match=sentence):
        parallel.make_mesh(mesh)


def test_the_axis_tensor_needs_a_rule():
    mesh = parallel.make_mesh("tensor=2")
    params = {"decoder": [{"kernel": np.zeros((8, 8))}, {"kernel": np.zeros((8, 4))}]}
    parallel.check_split_axes(mesh, COLUMNS_AND_ROWS, params)
    odd = {"decoder": [{"kernel": np.zeros((8, 7))}, {"kernel": np.zeros((7, 4))}]}
    for rules, shapes in ((KERNELS, params), (COLUMNS_AND_ROWS, odd)):
        with pytest.raises(ValueError, match="tensor must be 1 for a model of which no param"):
            parallel.check_split_axes(mesh, rules, shapes)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of one of several processes."""

    id: int
    process_index: int
    platform: str = "gpu"


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ("data=2", r"mesh must be 4, the number of devices, got data=2 \(2\)"),
        ("tensor=4", "tensor must divide the number of devices of every process, got tensor=4"),
    ],
)
def test_all_processes_take_part_and_none_shares_its_rows(mesh, sentence, monkeypatch):
    devices = [Device(i, i // 2) for i in range(4)]

    def make(devices, *_, axis_types):
        return types.SimpleNamespace(devices=devices)

    monkeypatch.setattr(parallel, "Mesh", make)
    with pytest.raises(ValueError, match=sentence):
        parallel.make_mesh(mesh, devices=devices)


def test_the_rows_of_a_process_lie_where_its_devices_are_in_the_mesh(monkeypatch):
    devices = np.array([Device(i, process) for i, process in enumerate([1, 1, 0, 0])], object)
    mesh = types.SimpleNamespace(devices=devices.reshape(2, 2, 1))
    for process, part in enumerate([(1, 2), (0, 2)]):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert parallel.row_part(mesh) == part


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), one, other)


@pytest.mark.parametrize("loss_fn", [masked_loss, dropout_loss])
def test_four_devices_equal_one_device(loss_fn, key):
    assert_close(run_jit(1, key, loss_fn=loss_fn), run_jit(4, key, loss_fn=loss_fn))


def test_accumulation_on_four_devices_equals_accumulation_on_one(key):
    changed = dataclasses.replace(OPTIM, accumulation_steps=2)
    assert_close(run_jit(1, key, optim_config=changed), run_jit(4, key, optim_config=changed))


@pytest.mark.parametrize("loss_fn", [masked_loss, plain_loss])
@pytest.mark.parametrize("num_devices", [1, 4])
def test_pmap_equals_jit_for_a_loss_without_randomness(num_devices, loss_fn, key):
    state, metrics = run_jit(1, key, loss_fn=loss_fn)
    expected = (state.params, state.ema_params, metrics["loss"], metrics["grad_norm"])
    assert_close(run_pmap(num_devices, key, loss_fn=loss_fn), expected)


PROGRAM = """
import test_parallel
from vla_jax.training import checkpoint
state, metrics = test_parallel.run_jit(4, jax.random.key(0), loss_fn=test_parallel.dropout_loss)
checkpoints = checkpoint.open_checkpoints(args[0])
checkpoint.save(checkpoints, 3, state, {"loss": float(metrics["loss"])})
checkpoint.close(checkpoints)
restored, _ = checkpoint.restore(args[0], state)
"""


@pytest.mark.slow
def test_two_processes_equal_one_process_and_save_one_checkpoint(key, tmp_path):
    run_together(PROGRAM, tmp_path)
    state, metrics = run_jit(1, key, loss_fn=dropout_loss)
    restored, metadata = checkpoint.restore(tmp_path, state)
    assert_close(restored, state)
    np.testing.assert_allclose(metadata["loss"], metrics["loss"], atol=1e-6)


def test_a_batch_is_sharded_by_rows_and_the_state_is_replicated():
    mesh = parallel.make_mesh("data=4")
    batch = parallel.shard_batch(make_batch(0), mesh)
    assert [shard.data.shape for shard in batch["x"].addressable_shards] == [(2, 3)] * 4
    assert batch["absent"] is None
    params = parallel.replicate(make_params(), mesh)
    assert params["head"]["kernel"].sharding.is_fully_replicated
    assert len(params["head"]["kernel"].addressable_shards) == 4


def test_the_train_state_is_donated():
    mesh, params = parallel.make_mesh("data=4"), make_params()
    optimizer = optim.make_optimizer(OptimConfig(), 1000, params)
    step = parallel.jit_update(update.make_update(masked_loss, optimizer), mesh)
    state = parallel.replicate(update.init_train_state(params, optimizer), mesh)
    step(state, parallel.shard_batch(make_batch(0), mesh), jax.random.key(0))
    assert state.params["head"]["kernel"].is_deleted()


def test_a_batch_that_cannot_be_split_evenly_is_refused():
    mesh = parallel.make_mesh("data=4")
    batch = jax.tree.map(lambda rows: rows[:6], make_batch(0))
    with pytest.raises(ValueError, match="batch size 6 cannot be split evenly over 4 devices"):
        parallel.shard_batch(batch, mesh)
    with pytest.raises(ValueError, match="batch size 6 cannot be split evenly over 4 devices"):
        parallel.pmap_update(lambda *args: args, mesh)(None, batch, None)
