"""The optimiser agrees with AdamW in NumPy; freezing and learning-rate factors by path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax import trees
from vla_jax.training import freezing, optim
from vla_jax.training.optim import OptimConfig

NUM_UPDATES = 20
KERNEL, BIAS, BACKBONE = "decoder/layer_0/kernel", "decoder/layer_0/bias", "backbone/embed/kernel"


def make_params():
    draw = np.random.default_rng(0)
    return {
        "backbone": {"embed": {"kernel": jnp.asarray(draw.normal(size=(2, 3)), jnp.float32)}},
        "decoder": {
            "layer_0": {
                "kernel": jnp.asarray(draw.normal(size=(3, 2)), jnp.float32),
                "bias": jnp.asarray(draw.normal(size=(2,)), jnp.float32),
            }
        },
    }


def make_grads(seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), make_params()
    )


def flat(tree):
    return jax.tree.map(np.asarray, trees.leaves_by_path(tree))


def descend(config, grads_list):
    """Returns the params by path after one update per element of `grads_list`."""
    params = make_params()
    optimizer = optim.make_optimizer(config, NUM_UPDATES, params)
    opt_state, step = optimizer.init(params), jax.jit(optimizer.update)
    for grads in grads_list:
        updates, opt_state = step(grads, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return flat(params)


def descend_by_hand(config, grads_list, *, frozen=()):
    """The same in NumPy: clipping, Adam with bias correction, weight decay on kernels, schedule."""
    params = flat(make_params())
    trained = [path for path in params if path not in frozen]
    mean = {path: np.zeros_like(params[path]) for path in trained}
    square = {path: np.zeros_like(params[path]) for path in trained}
    for n, grads in enumerate(grads_list):
        grads = {path: flat(grads)[path] for path in trained}
        if config.max_grad_value is not None:
            limits = -config.max_grad_value, config.max_grad_value
            grads = {path: np.clip(g, *limits) for path, g in grads.items()}
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
        for path in trained:
            g = grads[path] * min(1.0, config.max_grad_norm / norm)
            mean[path] = config.b1 * mean[path] + (1 - config.b1) * g
            square[path] = config.b2 * square[path] + (1 - config.b2) * g**2
            step = mean[path] / (1 - config.b1 ** (n + 1))
            step = step / (np.sqrt(square[path] / (1 - config.b2 ** (n + 1))) + 1e-8)
            if path.endswith("kernel"):
                step = step + config.weight_decay * params[path]
            params[path] = params[path] - learning_rate_by_hand(config, n) * step
    return params


def learning_rate_by_hand(config, n):
    if n < config.warmup_steps:
        return config.learning_rate * (n + 1) / (config.warmup_steps + 1)
    done = min((n - config.warmup_steps) / (NUM_UPDATES - config.warmup_steps), 1.0)
    cosine = 0.5 * (1 + np.cos(np.pi * done))
    return config.learning_rate * (config.end_factor + (1 - config.end_factor) * cosine)


def assert_close(one, other):
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_allclose(one[path], other[path], rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_the_schedule_rises_to_the_peak_and_falls_to_the_floor(warmup_steps):
    config = OptimConfig(learning_rate=0.1, warmup_steps=warmup_steps, end_factor=0.2)
    schedule = optim.make_schedule(config, NUM_UPDATES)
    for n in [0, 1, 3, 4, 5, 11, 19, 20, 30]:
        np.testing.assert_allclose(schedule(n), learning_rate_by_hand(config, n), rtol=1e-5)
    assert schedule(0) > 0


def test_three_updates_equal_clipped_adamw_in_numpy():
    config = OptimConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.3, max_grad_norm=0.5)
    grads = [make_grads(seed) for seed in range(3)]
    assert_close(descend(config, grads), descend_by_hand(config, grads))


def test_gradients_are_clipped_by_value_before_they_are_clipped_by_norm():
    """Gradients clipped to ±0.3 still have a norm above 0.5, so that the order matters."""
    config = OptimConfig(learning_rate=0.1, warmup_steps=2, max_grad_value=0.3, max_grad_norm=0.5)
    grads = [make_grads(seed) for seed in range(3)]
    assert_close(descend(config, grads), descend_by_hand(config, grads))
    uncut = descend(dataclasses.replace(config, max_grad_value=None), grads)
    assert np.abs(uncut[KERNEL] - descend(config, grads)[KERNEL]).max() > 1e-3


def test_frozen_params_are_unchanged_without_optimiser_state_and_outside_the_norm():
    config = OptimConfig(learning_rate=0.1, warmup_steps=2, freeze=("backbone/*",))
    grads = [make_grads(seed) for seed in range(3)]
    assert_close(descend(config, grads), descend_by_hand(config, grads, frozen=[BACKBONE]))
    opt_state = optim.make_optimizer(config, NUM_UPDATES, make_params()).init(make_params())
    sizes = {np.shape(leaf) for leaf in jax.tree.leaves(opt_state)}
    assert sizes == {(), (3, 2), (2,)}


def test_the_last_matching_factor_scales_the_learning_rate():
    factors = (("decoder/*", 0.5), ("*/bias", 0.1))
    config = OptimConfig(learning_rate=0.1, warmup_steps=2, lr_factors=factors)
    plain = OptimConfig(learning_rate=0.1, warmup_steps=2)
    start, grads = flat(make_params()), [make_grads(0)]
    moved, unscaled = descend(config, grads), descend(plain, grads)
    for path, factor in {KERNEL: 0.5, BIAS: 0.1, BACKBONE: 1.0}.items():
        expected = factor * (unscaled[path] - start[path])
        np.testing.assert_allclose(moved[path] - start[path], expected, atol=1e-6)


def test_a_scaled_learning_rate_is_another_learning_rate():
    rates, grads = (1e-3, 5e-3), [make_grads(seed) for seed in range(3)]
    config = OptimConfig(learning_rate=rates[0], warmup_steps=1, weight_decay=0.1)
    first, second = make_params(), make_params()
    scaled = optim.scale_learning_rate(
        optim.make_optimizer(config, NUM_UPDATES, first), rates[1] / rates[0]
    )
    other = dataclasses.replace(config, learning_rate=rates[1])
    expected = optim.make_optimizer(other, NUM_UPDATES, second)
    states = [scaled.init(first), expected.init(second)]
    for each in grads:
        updates, states[0] = scaled.update(each, states[0], first)
        first = jax.tree.map(jnp.add, first, updates)
        updates, states[1] = expected.update(each, states[1], second)
        second = jax.tree.map(jnp.add, second, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), first, second)


def test_accumulated_updates_equal_one_update_with_the_mean_gradient():
    config = OptimConfig(learning_rate=0.1, warmup_steps=0, accumulation_steps=2)
    plain = OptimConfig(learning_rate=0.1, warmup_steps=0)
    grads = [make_grads(0), make_grads(1)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    assert_close(descend(config, grads), descend(plain, [mean]))
    assert_close(descend(config, grads[:1]), flat(make_params()))


def test_the_schedule_counts_batches_under_accumulation():
    config = OptimConfig(learning_rate=0.1, warmup_steps=0, end_factor=0.0, accumulation_steps=2)
    grads = [make_grads(0)] * NUM_UPDATES
    before, after = descend(config, grads), descend(config, [*grads, *grads[:2]])
    assert_close(before, after)  # the floor is reached after NUM_UPDATES updates, not twice that


def test_an_exception_to_freezing_is_trained():
    freeze, train = ("*/kernel",), ("decoder/*/kernel",)
    config = OptimConfig(learning_rate=0.1, warmup_steps=2, freeze=freeze, train=train)
    grads = [make_grads(seed) for seed in range(3)]
    assert_close(descend(config, grads), descend_by_hand(config, grads, frozen=[BACKBONE]))


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_gradients_of_frozen_params_may_be_absent(accumulation_steps):
    config = OptimConfig(
        warmup_steps=0, freeze=("backbone/*",), accumulation_steps=accumulation_steps
    )
    params = make_params()
    optimizer = optim.make_optimizer(config, NUM_UPDATES, params)
    (trained, _), (grads, _) = (
        freezing.split(tree, config.freeze) for tree in (params, make_grads(0))
    )
    updates, opt_state = optimizer.update(grads, optimizer.init(params), trained)
    expected, whole_state = optimizer.update(make_grads(0), optimizer.init(params), params)
    assert flat(updates).keys() == {KERNEL, BIAS}
    assert_close(flat(opt_state), flat(whole_state))
    assert_close(flat(updates), {path: flat(expected)[path] for path in (BIAS, KERNEL)})


@pytest.mark.parametrize(("n", "decay_by_hand"), [(0, 0.1), (2, 0.25), (1000, 0.9)])
def test_the_ema_decay_is_smaller_at_first(n, decay_by_hand):
    ema, new = {"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([3.0, -2.0])}
    averaged = optim.update_ema(ema, new, jnp.asarray(n), decay=0.9)
    expected = decay_by_hand * np.array([1.0, 2.0]) + (1 - decay_by_hand) * np.array([3.0, -2.0])
    np.testing.assert_allclose(averaged["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize("field", ["freeze", "train", "lr_factors"])
def test_a_glob_without_a_match_is_refused_with_the_nearest_path(field):
    value = (("bakbone/*", 0.1),) if field == "lr_factors" else ("bakbone/*",)
    with pytest.raises(ValueError, match=rf"matches 'bakbone/\*' of {field}; did you mean 'bac"):
        optim.make_optimizer(OptimConfig(**{field: value}), 1000, make_params())


def test_freezing_all_params_is_refused():
    with pytest.raises(ValueError, match="leaves nothing to train"):
        optim.make_optimizer(OptimConfig(freeze=("*",)), 1000, make_params())


def test_a_warmup_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match="warmup_steps must be below num_updates = 20, got 30"):
        optim.make_schedule(OptimConfig(warmup_steps=30), NUM_UPDATES)


OUT_OF_RANGE = {
    "learning_rate": 0.0,
    "warmup_steps": -1,
    "end_factor": 1.5,
    "b1": 1.0,
    "b2": -0.1,
    "weight_decay": -1.0,
    "max_grad_norm": 0.0,
    "max_grad_value": 0.0,
    "accumulation_steps": 0,
    "ema_decay": 1.0,
}


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE.items(), ids=OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
        OptimConfig(**{field: value})
