"""Whole episodes with exploration noise, and the policy's noise-free actions at their steps.

Episodes are streamed, one step at a time; a learner then processes them as windows, in which every
step has a gradient. Both give the same actions as long as the policy's memory covers the whole
episode, which `check_memory` ensures.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax import trees
from vla_jax.acting import agent
from vla_jax.acting.agent import AgentConfig, AgentState, make_agent
from vla_jax.actions import execution
from vla_jax.data.normalize import NormStats
from vla_jax.nn import bptt
from vla_jax.policies import policy, trunks
from vla_jax.policies.heads import actions
from vla_jax.rl import gaussian
from vla_jax.rl.gaussian import NoiseConfig, NoisyAction
from vla_jax.types import ActionChunk, Array, Env, Key, Observation, Params


class EpisodeRollout(NamedTuple):
    """The first `T` steps of one episode in each of `B` environments."""

    observation: Observation  # [B, T, ...], inputs of the policy
    action: NoisyAction  # [B, T, ...]
    reward: Array  # [B, T] float32, 0 after the end
    mask: Array  # [B, T] bool, False after the end


def check_memory(config: AgentConfig, num_steps: int) -> None:
    """Raises unless the agent can be trained on noisy episodes of `num_steps` steps.

    Raises:
      ValueError: the agent forgets within the episode, or its head is not continuous.
    """
    decoder = config.policy.decoder
    if decoder.head != "continuous":
        raise ValueError(
            "the decoder's head must be 'continuous' to learn from reward, since noise is added "
            f"to continuous actions, got '{decoder.head}'; train a policy with that head."
        )
    forgets = config.mode != "persistent" and trunks.get(decoder.kind).has_memory
    if forgets and num_steps > decoder.window_size:
        raise ValueError(
            f"num_steps must be at most the policy's window_size = {decoder.window_size}, since in "
            f"mode '{config.mode}' the policy forgets earlier steps, got {num_steps}; reduce "
            "num_steps, or train a policy with a longer window_size or mode 'persistent'."
        )


def play(
    config: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    params: Params,
    env: Env,
    instructions: Array,
    noise: NoiseConfig,
    *,
    layout_keys: Key,
    noise_keys: Key,
    num_steps: int,
) -> EpisodeRollout:
    """Plays the first `num_steps` steps of one episode in each environment, with noise.

    Args:
      config: config of the agent; must pass `check_memory`.
      norm_stats: statistics of the agent.
      params: params of the agent's policy.
      env: the environment.
      instructions: token ids `[number of instructions, S]` of `env.instructions`.
      noise: scale of the exploration noise.
      layout_keys: `[B]`, each determines an episode through `env.reset(key)`; consumed.
      noise_keys: `[B]`, each determines the noise of an episode; consumed.
      num_steps: T, environment steps; an episode that takes longer counts as a failure.

    Returns:
      The episodes.
    """
    config = _cheapest(config)
    states, observations = jax.vmap(env.reset)(layout_keys)
    index = jax.vmap(env.instruction_index)(states)

    def step(carry: tuple, t: Array) -> tuple[tuple, EpisodeRollout]:
        agent_state, states, observations, alive = carry
        observation = observations._replace(instruction=instructions[index])
        reset = jnp.full(alive.shape, t == 0)
        agent_state, inputs, mean = agent.plan(
            config, norm_stats, params, agent_state, observation, reset
        )
        mean = _around_threshold(config, mean)
        keys = jax.vmap(jax.random.fold_in, (0, None))(noise_keys, t)
        noisy = jax.vmap(lambda mean, key: gaussian.sample(mean, noise, key=key))(mean, keys)
        agent_state, action = agent.send(
            config, norm_stats, agent_state, observation, gaussian.to_chunk(noisy)
        )
        states, transition = jax.vmap(env.step)(states, action)
        played = EpisodeRollout(inputs, noisy, transition.reward, alive)
        # After the end the environment may return anything, NaN too.
        played = trees.select(alive, played, jax.tree.map(jnp.zeros_like, played))
        alive &= ~(transition.terminated | transition.truncated)
        return (agent_state, states, transition.observation, alive), played

    first_state: AgentState = make_agent(config, norm_stats).init(params, len(layout_keys))
    carry = (first_state, states, observations, jnp.ones(len(layout_keys), bool))
    _, steps = jax.lax.scan(step, carry, jnp.arange(num_steps))
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), steps)


def keep_real(rollout: EpisodeRollout) -> EpisodeRollout:
    """Returns the rollout with zeros after the ends of its episodes, as `play` returns it.

    A masked NaN would reach the gradient of a loss even with the weight 0.
    """

    def select(leaf: Array) -> jax.Array:
        return jnp.where(bptt.expand(rollout.mask, leaf), leaf, jnp.zeros_like(leaf))

    return jax.tree.map(select, rollout)


def mean_actions(
    config: AgentConfig, params: Params, observation: Observation
) -> tuple[ActionChunk, jax.Array]:
    """Returns the noise-free actions at every step of episodes, differentiable by the params.

    Args:
      config: config of the agent; must pass `check_memory`.
      params: params of the agent's policy.
      observation: `[B, T, ...]`, whole episodes from their first step on; finite, also after the
        end (`keep_real`).

    Returns:
      Arm `[B, T, A-1]` and gripper logit `[B, T]`, around which `play` samples, and the decoder's
      features `[B, T, H]`.
    """
    decoder = config.policy.decoder
    outputs = policy.outputs(params, config.policy, observation)
    chunks = actions(outputs.prediction)
    state = execution.init(
        config.execution, len(chunks.arm), decoder.action_horizon, decoder.action_dim
    )
    by_time = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), chunks)
    _, mean = jax.lax.scan(lambda *step: execution.plan(config.execution, *step), state, by_time)
    mean = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), mean)
    return _around_threshold(config, mean), outputs.features


def _cheapest(config: AgentConfig) -> AgentConfig:
    """Returns the config in mode "persistent", one carry instead of a window of carries.

    The actions are the same while the memory covers the whole episode.
    """
    if "persistent" not in trunks.get(config.policy.decoder.kind).modes:
        return config
    return dataclasses.replace(config, mode="persistent")


def _around_threshold(config: AgentConfig, mean: ActionChunk) -> ActionChunk:
    """Returns the action with its gripper logit relative to the threshold of opening.

    The noise then flips the gripper equally often in both directions.
    """
    return mean._replace(gripper_logit=mean.gripper_logit - config.execution.gripper_threshold)
