"""The estimate of memory agrees with what the compiler reports."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from vla_jax.training import memory_estimate, optim, parallel, update
from vla_jax.training.optim import OptimConfig

L, D, ROWS, T = 4, 32, 16, 64
PARAMS = {
    "layers": {
        "up": jax.ShapeDtypeStruct((L, D, 4 * D), jnp.float32),
        "down": jax.ShapeDtypeStruct((L, 4 * D, D), jnp.float32),
    },
    "head": {"kernel": jax.ShapeDtypeStruct((D, 8), jnp.float32)},
}
BATCH = jax.ShapeDtypeStruct((ROWS, T, D), jnp.float32)
PLAIN = OptimConfig(warmup_steps=0, ema_decay=0.9)
FROZEN = OptimConfig(
    warmup_steps=0, freeze=("layers/*",), train=("*/up",), accumulation_steps=2
)  # fmt: skip
RULES = (("layers/*", PartitionSpec(None, "fsdp")),)


def make_loss(*, remat):
    def layer(x, params):
        return x + jnp.tanh(jnp.tanh(x @ params["up"]) @ params["down"]), None

    body = jax.checkpoint(layer, prevent_cse=False) if remat else layer

    def loss_fn(params, batch, key):
        del key
        features, _ = jax.lax.scan(body, batch, params["layers"])
        return jnp.mean(jnp.square(features @ params["head"]["kernel"] - 1)), {}

    return loss_fn


def estimate(config, mesh, *, remat=False, rules=(), batch=BATCH):
    optimizer = optim.make_optimizer(config, 10, PARAMS)
    return memory_estimate.estimate(
        make_loss(remat=remat), PARAMS, optimizer, batch, config, mesh=mesh, rules=rules
    )


def compiled_memory(config, mesh, *, remat=False, rules=()):
    optimizer, ema = optim.make_optimizer(config, 10, PARAMS), config.ema_decay is not None
    frozen = {"freeze": config.freeze, "train": config.train}
    state = jax.eval_shape(
        lambda params: update.init_train_state(params, optimizer, ema=ema, **frozen), PARAMS
    )
    step = update.make_update(
        make_loss(remat=remat), optimizer, ema_decay=config.ema_decay, **frozen
    )
    shardings = parallel.make_shardings(state, mesh, rules)
    step = parallel.jit_update(step, mesh, shardings)
    return step.lower(state, BATCH, jax.random.key(0)).compile().memory_analysis()


@pytest.mark.parametrize(
    ("config", "num_devices", "remat"),
    [(PLAIN, 1, False), (PLAIN, 1, True), (FROZEN, 1, True), (PLAIN, 4, False)],
    ids=["one device", "remat", "frozen, accumulated, remat", "fsdp"],
)
def test_the_estimate_agrees_with_the_compiled_update(config, num_devices, remat):
    mesh = parallel.make_mesh(f"data=1,fsdp={num_devices}")
    rules = RULES if num_devices > 1 else ()
    found = estimate(config, mesh, remat=remat, rules=rules)
    compiled = compiled_memory(config, mesh, remat=remat, rules=rules)
    batch = BATCH.size * 4 // num_devices
    state = found.params + found.optimizer + found.ema
    counter, key = 4, 8  # bytes of num_updates; the key of the update is not used
    assert 0 <= compiled.argument_size_in_bytes - state - batch - counter <= key
    temporary = found.gradients + found.activations - batch
    assert 0.6 < temporary / compiled.temp_size_in_bytes < 1.4


def test_the_parts_follow_from_the_config():
    mesh = parallel.make_mesh("data=1")
    whole, frozen = estimate(PLAIN, mesh), estimate(FROZEN, mesh)
    num_params = 2 * L * 4 * D * D + 8 * D
    trained = num_params - L * 4 * D * D
    assert whole[:2] == (4 * num_params, 4 * num_params)
    assert whole.ema == 4 * num_params
    assert frozen[:2] == (4 * num_params, 4 * trained)
    assert frozen.ema == 0
    assert 0 <= whole.optimizer - 8 * num_params < 64  # two moments and counters
    assert 0 <= frozen.optimizer - 12 * trained < 64  # and accumulated gradients
    assert whole.total == sum(whole)
    assert whole.total - whole.least == whole.activations // 2


def test_several_trainings_take_several_times_the_memory():
    one = memory_estimate.MemoryEstimate(1, 2, 3, 4, None)
    assert one.times(3) == (3, 6, 9, 12, None)
    assert one._replace(activations=5).times(2).total == 30


def test_rematerialisation_stores_less():
    mesh = parallel.make_mesh("data=1")
    stored, again = (estimate(PLAIN, mesh, remat=remat).activations for remat in (False, True))
    frame = ROWS * T * D * 4
    assert stored >= L * (1 + 4) * frame  # two activations of each layer, of D and 4D features
    assert again < (L + 1) * frame + stored / L + frame  # inputs of the layers, and one layer


def test_a_batch_is_divided_and_activations_are_unknown_without_one():
    one, four = (estimate(PLAIN, parallel.make_mesh(f"data={n}")) for n in (1, 4))
    assert four._replace(activations=0) == one._replace(activations=0)
    assert four.activations == one.activations // 4
    unknown = estimate(PLAIN, parallel.make_mesh("data=1"), batch=None)
    assert unknown.activations is None
    assert unknown.total == unknown.least == one.total - one.activations


def test_the_limit_of_a_device_comes_first_and_the_hosts_memory_second():
    gpu = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 24 * 10**9})
    assert memory_estimate.available_bytes(gpu) == 24 * 10**9
    free = pathlib.Path("/proc/meminfo")
    kilobytes = int(re.search(r"MemTotal:\s+(\d+)", free.read_text())[1]) if free.exists() else 0
    for statistics in (None, {}):
        device = types.SimpleNamespace(memory_stats=lambda statistics=statistics: statistics)
        found = memory_estimate.available_bytes(device)
        assert (found is not None) == free.exists()  # Linux
        if found is not None:
            assert kilobytes // 100 < found * jax.local_device_count() // 1024 < kilobytes


def test_intermediate_results_count_while_they_are_needed():
    x, kernel = (jax.ShapeDtypeStruct((64, size), jnp.float32) for size in (64, 256))
    block = 64 * 64 * 4

    def chain(x, kernel):
        wide = x @ kernel  # 4 blocks
        return (wide * 2) @ kernel.T + x  # 4 blocks more, then 1

    # kernel.T, 2 * wide and the product at the end; x and kernel are arguments
    assert memory_estimate.forward_bytes(chain, x, kernel) == 4 * block + 4 * block + block

    def loop(x, kernel):
        return jax.lax.scan(lambda x, _: (chain(x, kernel), None), x, length=9)[0]

    # the carry of the loop, and one step
    assert memory_estimate.forward_bytes(loop, x, kernel) == 9 * block


def test_an_unknown_limit_is_none(monkeypatch, tmp_path):
    device = types.SimpleNamespace(memory_stats=lambda: None)
    monkeypatch.setattr(memory_estimate, "_MEMINFO", tmp_path / "absent")
    assert memory_estimate.available_bytes(device) is None
    monkeypatch.setattr(memory_estimate, "_MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\n")
    assert memory_estimate.available_bytes(device) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8 kB\n")
    assert memory_estimate.available_bytes(device) == 8 * 1024 // jax.local_device_count()
