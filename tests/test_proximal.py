"""The equations of PPO: agreement with rlax and with loops written out; passes over a rollout."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vla_jax.rl import passes, policy_gradient, proximal
from vla_jax.rl.passes import PassesConfig
from vla_jax.training.update import init_train_state, make_update

CLIP = 0.2
T, A = 60, 3
RANDOM = np.random.default_rng(0)
NEW, OLD = (RANDOM.normal(-1, 0.3, T).astype(np.float32) for _ in range(2))
ADVANTAGE, VALUE, OLD_VALUE, RETURN = RANDOM.normal(size=(4, T)).astype(np.float32)
WEIGHT = (RANDOM.random(T) < 0.8).astype(np.float32)


def test_the_clipped_loss_equals_a_loop():
    total, num_clipped = 0.0, 0
    for new, old, advantage, weight in zip(NEW, OLD, ADVANTAGE, WEIGHT, strict=True):
        ratio = np.exp(new - old)
        limited = min(max(ratio, 1 - CLIP), 1 + CLIP)
        total -= weight * min(ratio * advantage, limited * advantage)
        num_clipped += weight * (ratio != limited)
    found = proximal.clipped_loss(NEW, OLD, ADVANTAGE, WEIGHT, CLIP)
    np.testing.assert_allclose(found, total / T, rtol=1e-5)
    fraction = proximal.clipped_fraction(NEW, OLD, WEIGHT, CLIP)
    np.testing.assert_allclose(fraction, num_clipped / T, rtol=1e-6)
    assert 0.2 < fraction < 0.8


def test_the_clipped_value_loss_equals_a_loop():
    total, num_limited = 0.0, 0
    for value, old, return_, weight in zip(VALUE, OLD_VALUE, RETURN, WEIGHT, strict=True):
        limited = old + min(max(value - old, -CLIP), CLIP)
        total += weight * max((return_ - value) ** 2, (return_ - limited) ** 2)
        num_limited += (return_ - limited) ** 2 > (return_ - value) ** 2
    found = proximal.clipped_value_loss(VALUE, OLD_VALUE, RETURN, WEIGHT, CLIP)
    np.testing.assert_allclose(found, total / T, rtol=1e-5)
    assert num_limited > 5
    unlimited = proximal.clipped_value_loss(VALUE, OLD_VALUE, RETURN, WEIGHT, 1e6)
    expected = policy_gradient.baseline_loss(VALUE, RETURN, WEIGHT)
    np.testing.assert_allclose(unlimited, expected, rtol=1e-6)


def test_the_values_equal_those_of_rlax(golden):
    with np.load(golden / "rlax_ppo.npz") as file:
        of = {name: file[name] for name in file.files}
    # rlax has no weights: all steps are real.
    ones = np.ones_like(of["in.advantage"])
    for i, one in enumerate(ones):
        new, old = (
            policy_gradient.log_probability(of[f"in.{name}"][i], of["in.action"][i])
            for name in ("logits", "old_logits")
        )
        found = proximal.clipped_loss(new, old, of["in.advantage"][i], one, CLIP)
        np.testing.assert_allclose(found, of["out.clipped_loss"][i], atol=1e-6)
        by_new = jax.grad(proximal.clipped_loss)(new, old, of["in.advantage"][i], one, CLIP)
        np.testing.assert_allclose(by_new, of["out.gradient"][i], atol=1e-6)


def test_at_equal_policies_the_gradient_is_that_of_reinforce():
    loss = jax.value_and_grad(proximal.clipped_loss)
    value, found = loss(OLD, OLD, ADVANTAGE, WEIGHT, CLIP)
    expected = jax.grad(policy_gradient.score_loss)(OLD, ADVANTAGE, WEIGHT)
    np.testing.assert_allclose(found, expected, atol=1e-7)
    np.testing.assert_allclose(value, -np.mean(WEIGHT * ADVANTAGE), rtol=1e-5)
    assert proximal.divergence(OLD, OLD, WEIGHT) == 0
    assert proximal.clipped_fraction(OLD, OLD, WEIGHT, CLIP) == 0


@pytest.mark.parametrize(("advantage", "shift"), list(itertools.product((1.0, -1.0), (0.5, -0.5))))
def test_only_a_ratio_that_left_in_the_advantages_direction_has_no_gradient(advantage, shift):
    one = jnp.ones(1)
    found = jax.grad(proximal.clipped_loss)(shift * one, 0 * one, advantage * one, one, CLIP)
    assert (found == 0).all() == (advantage * shift > 0)


def test_advantages_are_normalised_over_the_real_steps():
    found = np.asarray(proximal.normalise(ADVANTAGE, WEIGHT))
    real = WEIGHT > 0
    np.testing.assert_allclose([found[real].mean(), found[real].std()], [0, 1], atol=1e-5)
    assert not found[~real].any()
    assert not np.asarray(proximal.normalise(jnp.ones(3), jnp.ones(3))).any()
    assert not np.asarray(proximal.normalise(jnp.ones(3), jnp.zeros(3))).any()


def test_the_divergence_estimates_the_kl_divergence():
    logits, old_logits = jnp.array([0.3, -0.2, 0.5]), jnp.array([0.1, 0.4, 0.2])
    old = jax.nn.log_softmax(old_logits)
    exact = jnp.sum(jnp.exp(old) * (old - jax.nn.log_softmax(logits)))
    action = jax.random.categorical(jax.random.key(0), old_logits, shape=(200_000,))
    new, old = (
        policy_gradient.log_probability(jnp.broadcast_to(part, (len(action), A)), action)
        for part in (logits, old_logits)
    )
    found = proximal.divergence(new, old, jnp.ones(len(action)))
    np.testing.assert_allclose(found, exact, rtol=0.02)


def squared(params, batch, key):
    """Mean squared error of a linear model, with the batch's size as a metric."""
    del key
    (inputs, targets), _ = batch
    error = jnp.mean(jnp.square(inputs @ params["kernel"] - targets))
    return error, {"rows": jnp.float32(len(inputs))}


def run_passes(config):
    """Train state and metrics after one rollout of eight environments."""
    optimizer = optax.sgd(0.1)
    state = init_train_state({"kernel": jnp.ones((3, 1))}, optimizer)
    random = np.random.default_rng(1)
    batch = jnp.asarray(random.normal(size=(8, 3))), jnp.asarray(random.normal(size=(8, 1)))
    return passes.run(make_update(squared, optimizer), config, state, batch, jax.random.key(0))


def test_one_minibatch_takes_the_gradient_of_the_whole_batch():
    once, _ = run_passes(PassesConfig())
    twice, metrics = run_passes(PassesConfig(num_epochs=2))
    assert metrics["rows"] == 8
    assert int(once.num_updates) == int(twice.num_updates) == 1
    optimizer = optax.sgd(0.1)
    state = init_train_state({"kernel": jnp.ones((3, 1))}, optimizer)
    random = np.random.default_rng(1)
    batch = random.normal(size=(8, 3)), random.normal(size=(8, 1))
    update = make_update(squared, optimizer)
    for expected in (once, twice):
        state, _ = update(state, (batch, 0), jax.random.key(0))
        np.testing.assert_allclose(expected.params["kernel"], state.params["kernel"], rtol=1e-5)


def test_minibatches_hold_every_environment_once_per_epoch():
    config = PassesConfig(num_epochs=3, num_minibatches=4)
    envs = np.asarray(passes.draw(config, 8, key=jax.random.key(0)))
    assert envs.shape == (12, 2)
    epochs = envs.reshape(3, 8)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(8), (3, 1)))
    assert (epochs[0] != epochs[1]).any()
    state, metrics = run_passes(config)
    assert metrics["rows"] == 2
    assert int(state.num_updates) == 1


def test_passes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_epochs must be at least 1, got 0"):
        PassesConfig(num_epochs=0)
    with pytest.raises(ValueError, match="num_minibatches must divide num_envs = 6, got 4"):
        passes.check(PassesConfig(num_minibatches=4), 6)
