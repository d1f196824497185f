"""One update: gradient step, random key per update, EMA, metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vla_jax import trees
from vla_jax.training import optim, update
from vla_jax.training.optim import OptimConfig

RATE = 0.1
BATCH = np.arange(8, dtype=np.float32).reshape(4, 2)


def make_params():
    return {"backbone": {"kernel": jnp.array([2.0, -1.0])}, "head": {"bias": jnp.array([0.5])}}


def loss_fn(params, batch, key):
    """Mean square of x·w + b, where w is the kernel; no randomness."""
    outputs = batch @ params["backbone"]["kernel"] + params["head"]["bias"]
    return jnp.mean(outputs**2).astype(jnp.bfloat16), {"mean": jnp.mean(outputs)}


def noisy_loss_fn(params, batch, key):
    noise = jax.random.normal(key, batch.shape)
    return loss_fn(params, batch + noise, key)[0].astype(jnp.float32), {"noise": noise[0, 0]}


def run(num_updates, *, loss=loss_fn, ema_decay=None, freeze=(), compiled=True):
    optimizer = optax.sgd(RATE)
    step = update.make_update(loss, optimizer, ema_decay=ema_decay, freeze=freeze)
    step = jax.jit(step) if compiled else step
    state = update.init_train_state(make_params(), optimizer, ema=ema_decay is not None)
    history = []
    for _ in range(num_updates):
        state, metrics = step(state, BATCH, jax.random.key(7))
        history.append(metrics)
    return state, history


def closed_form_gradient(kernel, bias):
    outputs = BATCH @ kernel + bias
    return 2 * BATCH.T @ outputs / 4, np.array([2 * outputs.mean()])


def test_one_update_takes_one_gradient_step_and_counts_it():
    state, [metrics] = run(1)
    kernel_grad, bias_grad = closed_form_gradient(np.array([2.0, -1.0]), 0.5)
    expected = {
        "backbone": {"kernel": np.array([2.0, -1.0]) - RATE * kernel_grad},
        "head": {"bias": np.array([0.5]) - RATE * bias_grad},
    }
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.01, atol=1e-6), state.params, expected
    )
    assert (int(state.num_updates), state.num_updates.dtype) == (1, jnp.int32)
    assert set(metrics) == {"loss", "grad_norm", "mean"}
    norm = np.sqrt(np.sum(kernel_grad**2) + np.sum(bias_grad**2))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=0.01)
    assert metrics["loss"].dtype == jnp.float32


def test_frozen_params_are_unchanged_and_not_part_of_the_norm():
    state, [metrics] = run(1, freeze=("backbone/*",))
    _, bias_grad = closed_form_gradient(np.array([2.0, -1.0]), 0.5)
    np.testing.assert_array_equal(state.params["backbone"]["kernel"], [2.0, -1.0])
    np.testing.assert_allclose(metrics["grad_norm"], abs(bias_grad[0]), rtol=0.01)


def test_the_key_of_an_update_is_folded_with_its_count():
    _, history = run(3, loss=noisy_loss_fn)
    keys = [jax.random.fold_in(jax.random.key(7), n) for n in range(3)]
    expected = [jax.random.normal(key, BATCH.shape)[0, 0] for key in keys]
    np.testing.assert_array_equal([metrics["noise"] for metrics in history], expected)
    assert len(set(map(float, expected))) == 3


def test_the_ema_starts_at_the_params_and_follows_them():
    state, _ = run(1, ema_decay=0.9)
    start, moved = make_params(), state.params
    expected = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, start, moved)  # decay 1/10 at n = 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.ema_params, expected
    )


def test_the_ema_has_its_own_buffers():
    state = update.init_train_state(make_params(), optax.sgd(RATE), ema=True)
    for param, ema in zip(*map(jax.tree.leaves, (state.params, state.ema_params)), strict=True):
        assert param.unsafe_buffer_pointer() != ema.unsafe_buffer_pointer()


def test_jit_changes_nothing():
    pair = (run(2, ema_decay=0.9), run(2, ema_decay=0.9, compiled=False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *pair)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_an_ema_decay_without_ema_params_or_vice_versa_is_refused(decay):
    step = update.make_update(loss_fn, optax.sgd(RATE), ema_decay=decay)
    state = update.init_train_state(make_params(), optax.sgd(RATE), ema=decay is None)
    with pytest.raises(ValueError, match=f"ema_decay is {decay}, but ema_params are"):
        step(state, BATCH, jax.random.key(0))


def test_a_loss_can_depend_on_the_number_of_updates():
    def counted_loss_fn(params, counted, key):
        loss, metrics = loss_fn(params, counted.batch, key)
        return loss, {**metrics, "done": counted.num_updates}

    optimizer = optax.sgd(RATE)
    step = jax.jit(update.with_count(update.make_update(counted_loss_fn, optimizer)))
    state, history = update.init_train_state(make_params(), optimizer), []
    for _ in range(3):
        state, metrics = step(state, BATCH, jax.random.key(7))
        history.append(int(metrics["done"]))
    assert history == [0, 1, 2]
    jax.tree.map(np.testing.assert_array_equal, state.params, run(3)[0].params)


SIZE, FREEZE, TRAIN = 128, ("backbone/*",), ("*/lora",)
ROWS = np.ones((4, SIZE), np.float32)


def make_adapted_params(dtype):
    """Params of which one in ten is trained; the others are of the given dtype."""
    kernels = {f"layer_{i}": jnp.full((SIZE, SIZE), 0.01, dtype) for i in range(9)}
    return {"backbone": {**kernels, "lora": jnp.ones((SIZE, 1))}, "head": jnp.ones((SIZE, SIZE))}


def adapted_loss_fn(params, batch, key):
    del key
    hidden = batch * params["backbone"]["lora"][None, :, 0]
    for i in range(9):
        hidden = jnp.tanh(hidden @ params["backbone"][f"layer_{i}"].astype(jnp.float32))
    return jnp.mean(jnp.square(hidden @ params["head"] - 1.0)), {}


def compile_adapted(freeze, train, dtype=jnp.float32):
    params = make_adapted_params(dtype)
    config = OptimConfig(warmup_steps=0, freeze=freeze, train=train)
    optimizer = optim.make_optimizer(config, 10, params)
    step = update.make_update(adapted_loss_fn, optimizer, ema_decay=0.5, freeze=freeze, train=train)
    state = update.init_train_state(params, optimizer, ema=True, freeze=freeze, train=train)
    compiled = jax.jit(step, donate_argnums=0).lower(state, ROWS, jax.random.key(0)).compile()
    return state, compiled


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def peak_bytes(compiled):
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def test_frozen_params_take_no_memory_for_gradients_moments_and_ema():
    state, compiled = compile_adapted(FREEZE, TRAIN)
    params = state.params
    trained = num_bytes([params["head"], params["backbone"]["lora"]])
    counters = num_bytes(state.opt_state) - 2 * trained  # Adam has two moments
    assert 0 <= counters < 64
    assert num_bytes(state.ema_params) == trained

    whole_state, whole = compile_adapted((), ())
    frozen = num_bytes(params) - trained
    assert num_bytes(whole_state) - num_bytes(state) == 3 * frozen
    assert peak_bytes(whole) - peak_bytes(compiled) >= 4 * frozen  # with the gradients


def test_frozen_params_of_another_dtype_are_unchanged_and_not_averaged():
    state, compiled = compile_adapted(FREEZE, TRAIN, jnp.bfloat16)
    before = trees.leaves_by_path(jax.tree.map(np.asarray, state.params))
    state, _ = compiled(state, ROWS, jax.random.key(0))
    for path, leaf in trees.leaves_by_path(state.params).items():
        assert leaf.dtype == before[path].dtype
        is_frozen = path.startswith("backbone/layer")
        assert np.array_equal(np.asarray(leaf), before[path]) is is_frozen, path
    averaged = update.averaged_params(state)
    assert averaged["head"] is state.ema_params["head"]
    assert averaged["backbone"]["layer_0"] is state.params["backbone"]["layer_0"]


def test_without_an_ema_the_params_are_for_acting():
    state = update.init_train_state(make_params(), optax.sgd(RATE))
    assert update.averaged_params(state) is state.params
