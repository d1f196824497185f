"""Closed-loop episodes with noise: streamed = windowed, and steps after the end are masked."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from vla_jax.acting.agent import make_agent, read_instruction
from vla_jax.acting.rollout import run_env
from vla_jax.actions.execution import ExecutionConfig
from vla_jax.envs.table import jax_env
from vla_jax.policies import policy
from vla_jax.rl import episodes
from vla_jax.rl.gaussian import NoiseConfig

B, T = 6, 4  # T = window_size: the memory covers the episode
ENV = jax_env.make(tiny_run.WORLD)
WORDS = jnp.stack([read_instruction(tiny_run.AGENT, text) for text in ENV.instructions])
ALMOST_NONE = NoiseConfig(arm_std=1e-7, gripper_temperature=1e-7)
EXECUTIONS = {
    "first": ExecutionConfig(),
    "ensemble": ExecutionConfig(kind="temporal_ensemble", gripper_threshold=0.3),
}


def agent_of(execution="first", **decoder):
    parts = tiny_run.AGENT.policy
    parts = dataclasses.replace(parts, decoder=dataclasses.replace(parts.decoder, **decoder))
    return dataclasses.replace(tiny_run.AGENT, policy=parts, execution=EXECUTIONS[execution])


def play(agent, params, env, noise):
    layout_keys, noise_keys = jax.random.split(jax.random.key(1), (2, B))
    return episodes.play(
        agent,
        tiny_run.norm_stats(),
        params,
        env,
        WORDS,
        noise,
        layout_keys=layout_keys,
        noise_keys=noise_keys,
        num_steps=T,
    )


@pytest.fixture(scope="module")
def played():
    """Rollout of the tiny policy, with noise."""
    return jax.jit(partial(play, agent_of(), env=ENV, noise=NoiseConfig(0.5)))(tiny_run.params())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("execution", "kind"), [("first", "lstm"), ("ensemble", "gru"), ("first", "gpt")]
)
def test_streamed_equals_windowed(execution, kind):
    agent = agent_of(execution, kind=kind)
    params = policy.init(jax.random.key(2), agent.policy)

    @jax.jit
    def both(params):
        rollout = play(agent, params, ENV, ALMOST_NONE)
        return rollout, episodes.mean_actions(agent, params, rollout.observation)[0]

    rollout, mean = both(params)
    np.testing.assert_allclose(rollout.action.arm, mean.arm, atol=1e-5)
    decided = np.abs(mean.gripper_logit) > 1e-5
    gripper_open = rollout.action.gripper_open
    np.testing.assert_array_equal(gripper_open[decided], mean.gripper_logit[decided] > 0)
    assert np.abs(np.diff(mean.arm, axis=1)).max() > 1e-4  # actions depend on observations


@pytest.mark.slow
def test_the_noise_has_the_configured_scale(played):
    mean_actions = jax.jit(partial(episodes.mean_actions, agent_of()))
    mean, _ = mean_actions(tiny_run.params(), played.observation)
    noise = np.asarray(played.action.arm - mean.arm) / 0.5
    assert noise.std() == pytest.approx(1.0, abs=0.2)
    apart = np.abs(noise[:, None, 1:] - noise[None, :, 1:]).max(axis=(2, 3)) + np.eye(B)
    assert apart.min() > 0.1  # each environment has different noise


@pytest.mark.slow
def test_without_noise_it_acts_like_the_agent(played):
    """An episode succeeds if and only if it does with the agent itself, from the same layout."""
    env = ENV._replace(max_steps=T)

    def reward(state, action):
        state, transition = ENV.step(state, action)
        return state, transition._replace(success=state.tool[0] > 0, reward=state.tool[0])

    env, agent = env._replace(step=reward), agent_of()
    rollout = jax.jit(partial(play, agent, env=env, noise=ALMOST_NONE))(tiny_run.params())
    keys = jax.random.split(jax.random.key(1), (2, B))[0]
    plain = make_agent(agent, tiny_run.norm_stats())
    other = jax.jit(lambda p: run_env(plain, p, env, WORDS, keys))(tiny_run.params())
    np.testing.assert_array_equal((rollout.reward > 0).any(axis=1), other.success)
    assert 0 < np.sum(other.success) < B


@pytest.mark.slow
def test_steps_after_the_end_are_masked_and_their_reward_is_ignored(played):
    assert played.mask.all()  # the episodes of ENV are longer than T

    def step(state, action):
        state, transition = ENV.step(state, action)
        ends = state.num_steps >= 2
        reward = jnp.where(state.num_steps > 2, jnp.nan, 1.0)
        return state, transition._replace(terminated=ends, reward=reward)

    agent = partial(play, agent_of(), env=ENV._replace(step=step), noise=ALMOST_NONE)
    rollout = jax.jit(agent)(tiny_run.params())
    np.testing.assert_array_equal(rollout.mask, np.tile([True, True, False, False], (B, 1)))
    np.testing.assert_array_equal(rollout.reward, np.tile([1.0, 1.0, 0.0, 0.0], (B, 1)))


def test_an_agent_whose_memory_ends_or_that_predicts_bins_is_refused():
    episodes.check_memory(agent_of(), T)
    episodes.check_memory(dataclasses.replace(agent_of(), mode="persistent"), T + 1)
    episodes.check_memory(agent_of(kind="fc"), T + 1)
    with pytest.raises(ValueError, match=r"num_steps must be at most the .* = 4, .*got 5;"):
        episodes.check_memory(agent_of(), T + 1)
    with pytest.raises(ValueError, match=r"head must be 'continuous' .*got 'discrete';"):
        episodes.check_memory(agent_of(head="discrete"), T)
