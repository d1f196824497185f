"""The policy with noise: probabilities as in PyTorch, gradients that increase the reward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from vla_jax.rl import gaussian, policy_gradient
from vla_jax.rl.gaussian import NoiseConfig, NoisyAction
from vla_jax.types import ActionChunk

NOISE = NoiseConfig(arm_std=0.3, gripper_temperature=2.0)


def random_mean(seed):
    """Noise-free outputs of a policy: arm `[3, 4, 6]`, gripper logit `[3, 4]`."""
    rng = np.random.default_rng(seed)
    arm = np.tanh(rng.normal(size=(3, 4, 6))).astype(np.float32)
    return ActionChunk(arm, rng.normal(size=(3, 4)).astype(np.float32) * 3)


def torch_distributions(mean):
    """PyTorch's distributions of the arm and of the gripper."""
    logits = torch.from_numpy(mean.gripper_logit) / NOISE.gripper_temperature
    return Normal(torch.from_numpy(mean.arm), NOISE.arm_std), Bernoulli(logits=logits)


def test_probability_and_divergence_equal_those_of_torch(key):
    mean, other = random_mean(0), random_mean(1)
    action = gaussian.sample(mean, NOISE, key=key)
    arm, gripper = torch_distributions(mean)
    arm_action = torch.tensor(np.array(action.arm))
    gripper_action = torch.tensor(np.array(action.gripper_open, np.float32))
    expected = arm.log_prob(arm_action).sum(-1) + gripper.log_prob(gripper_action)
    actual = gaussian.log_probability(mean, action, NOISE)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-5)
    pairs = zip(torch_distributions(mean), torch_distributions(other), strict=True)
    arm_kl, gripper_kl = (kl_divergence(ours, reference) for ours, reference in pairs)
    actual = gaussian.kl_divergence(mean, other, NOISE)
    np.testing.assert_allclose(actual, (arm_kl.sum(-1) + gripper_kl).numpy(), rtol=1e-4)


def test_samples_follow_the_distribution(key):
    mean = ActionChunk(jnp.full((20_000, 2), 0.4), jnp.full(20_000, 1.0))
    action = gaussian.sample(mean, NOISE, key=key)
    np.testing.assert_allclose(np.mean(action.arm, axis=0), 0.4, atol=0.01)
    np.testing.assert_allclose(np.std(action.arm, axis=0), 0.3, atol=0.01)
    np.testing.assert_allclose(np.mean(action.gripper_open), 1 / (1 + np.exp(-0.5)), atol=0.01)


def test_the_divergence_from_itself_is_zero_and_so_is_its_gradient():
    mean = random_mean(0)
    value, grads = jax.value_and_grad(lambda m: jnp.sum(gaussian.kl_divergence(m, mean, NOISE)))(
        mean
    )
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 0.0, atol=1e-6), grads)


@pytest.mark.parametrize("logit", [-80.0, 80.0])
def test_a_certain_gripper_has_a_finite_divergence_and_gradient(logit):
    sure = ActionChunk(jnp.zeros((1, 6)), jnp.array([logit]))
    other = ActionChunk(jnp.zeros((1, 6)), jnp.array([-logit]))
    value, grads = jax.value_and_grad(lambda m: jnp.sum(gaussian.kl_divergence(m, other, NOISE)))(
        sure
    )
    np.testing.assert_allclose(value, 40.0, rtol=1e-5)  # |z / τ|
    assert np.isfinite(grads.gripper_logit).all()


@pytest.mark.slow
def test_rewarded_actions_become_more_probable(key):
    """Reward for moving the arm to +x and opening the gripper: the gradient increases both."""
    mean = ActionChunk(jnp.zeros((512, 6)), jnp.zeros(512))
    action = gaussian.sample(mean, NOISE, key=key)
    reward = jnp.asarray((action.arm[:, 0] > 0.1) & action.gripper_open, jnp.float32)

    def loss(m):
        chosen = gaussian.log_probability(m, action, NOISE)
        advantage = policy_gradient.scale(reward - reward.mean(), jnp.ones(512))
        return policy_gradient.score_loss(chosen, advantage, jnp.ones(512))

    grads = jax.tree.map(lambda g: np.asarray(g).sum(axis=0), jax.grad(loss)(mean))
    assert grads.arm[0] < -1
    assert grads.gripper_logit < -0.05
    assert np.abs(grads.arm[1:]).max() < 0.3 * -grads.arm[0]  # no effect on the reward


def test_the_chunk_of_a_noisy_action_is_certain():
    action = NoisyAction(jnp.array([[0.5, -2.0]]), jnp.array([True]))
    chunk = gaussian.to_chunk(action)
    np.testing.assert_array_equal(chunk.arm, action.arm)
    assert chunk.gripper_logit[0] == np.inf


@pytest.mark.parametrize("name", ["arm_std", "gripper_temperature"])
def test_zero_noise_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        NoiseConfig(**{name: 0.0})
