"""A policy that tries things: its probabilities are PyTorch's, its gradients go the right way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from vla_jax.rl import gaussian, policy_gradient
from vla_jax.rl.gaussian import NoiseConfig, Trial
from vla_jax.types import ActionChunk

NOISE = NoiseConfig(arm_std=0.3, gripper_temperature=2.0)


def wish(seed):
    """What a policy would do: arm `[3, 4, 6]`, gripper logit `[3, 4]`."""
    rng = np.random.default_rng(seed)
    arm = np.tanh(rng.normal(size=(3, 4, 6))).astype(np.float32)
    return ActionChunk(arm, rng.normal(size=(3, 4)).astype(np.float32) * 3)


def theirs(mean):
    """PyTorch's distributions of the arm and of the gripper."""
    logits = torch.from_numpy(mean.gripper_logit) / NOISE.gripper_temperature
    return Normal(torch.from_numpy(mean.arm), NOISE.arm_std), Bernoulli(logits=logits)


def test_probability_and_divergence_are_those_of_torch(key):
    mean, other = wish(0), wish(1)
    trial = gaussian.sample(key, mean, NOISE)
    arm, gripper = theirs(mean)
    drawn = torch.tensor(np.array(trial.arm)), torch.tensor(np.array(trial.opens, np.float32))
    expected = arm.log_prob(drawn[0]).sum(-1) + gripper.log_prob(drawn[1])
    found = gaussian.log_probability(mean, trial, NOISE)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
    pairs = zip(theirs(mean), theirs(other), strict=True)
    of_arm, of_gripper = (kl_divergence(ours, reference) for ours, reference in pairs)
    found = gaussian.kl_divergence(mean, other, NOISE)
    np.testing.assert_allclose(found, (of_arm.sum(-1) + of_gripper).numpy(), rtol=1e-4)


def test_trials_are_drawn_as_probable_as_they_are_said_to_be(key):
    mean = ActionChunk(jnp.full((20_000, 2), 0.4), jnp.full(20_000, 1.0))
    trial = gaussian.sample(key, mean, NOISE)
    np.testing.assert_allclose(np.mean(trial.arm, axis=0), 0.4, atol=0.01)
    np.testing.assert_allclose(np.std(trial.arm, axis=0), 0.3, atol=0.01)
    np.testing.assert_allclose(np.mean(trial.opens), 1 / (1 + np.exp(-0.5)), atol=0.01)


def test_a_policy_is_at_no_distance_from_itself_and_nothing_pulls_it_away():
    mean = wish(0)
    value, grads = jax.value_and_grad(lambda m: jnp.sum(gaussian.kl_divergence(m, mean, NOISE)))(
        mean
    )
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 0.0, atol=1e-6), grads)


@pytest.mark.parametrize("logit", [-80.0, 80.0])
def test_a_gripper_without_doubt_has_a_finite_divergence_and_gradient(logit):
    sure = ActionChunk(jnp.zeros((1, 6)), jnp.array([logit]))
    other = ActionChunk(jnp.zeros((1, 6)), jnp.array([-logit]))
    value, grads = jax.value_and_grad(lambda m: jnp.sum(gaussian.kl_divergence(m, other, NOISE)))(
        sure
    )
    np.testing.assert_allclose(value, 40.0, rtol=1e-5)  # |z / τ|: the other is sure to err
    assert np.isfinite(grads.gripper_logit).all()


def test_what_was_rewarded_becomes_more_probable(key):
    """Reward for an arm to the right and an open gripper: the estimate ascends both."""
    mean = ActionChunk(jnp.zeros((512, 6)), jnp.zeros(512))
    trial = gaussian.sample(key, mean, NOISE)
    reward = jnp.asarray((trial.arm[:, 0] > 0.1) & trial.opens, jnp.float32)

    def loss(m):
        chosen = gaussian.log_probability(m, trial, NOISE)
        advantage = policy_gradient.scale(reward - reward.mean(), jnp.ones(512))
        return policy_gradient.score_loss(chosen, advantage, jnp.ones(512))

    grads = jax.tree.map(lambda g: np.asarray(g).sum(axis=0), jax.grad(loss)(mean))
    assert grads.arm[0] < -1
    assert grads.gripper_logit < -0.05
    assert np.abs(grads.arm[1:]).max() < 0.3 * -grads.arm[0]  # what did not matter


def test_a_certain_action_is_the_trial():
    trial = Trial(jnp.array([[0.5, -2.0]]), jnp.array([True]))
    action = gaussian.certain(trial)
    np.testing.assert_array_equal(action.arm, trial.arm)
    assert action.gripper_logit[0] == np.inf


@pytest.mark.parametrize("name", ["arm_std", "gripper_temperature"])
def test_noise_of_no_size_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        NoiseConfig(**{name: 0.0})
