"""Whole episodes in which an agent tries things, and what it wanted at every step of them.

The episodes are streamed, one step at a time; a learner goes over them again as windows, whose
every step has a gradient. Both are the same numbers as long as the policy's memory holds all of an
episode: `check_memory`.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.acting import agent
from vla_jax.acting.agent import AgentConfig, AgentState, make_agent
from vla_jax.actions import execution
from vla_jax.data.normalize import NormStats
from vla_jax.policies import decoders, policy
from vla_jax.policies.heads import actions
from vla_jax.rl import gaussian
from vla_jax.rl.gaussian import NoiseConfig, Trial
from vla_jax.types import ActionChunk, Array, Env, Key, Observation, Params


class Tries(NamedTuple):
    """One episode of each of `B` worlds; what comes after its end has a `mask` of False."""

    seen: Observation  # [B, T, ...], as the policy was shown it
    trial: Trial  # [B, T, ...]
    reward: Array  # [B, T] float32
    mask: Array  # [B, T] bool


def check_memory(config: AgentConfig, num_steps: int) -> None:
    """Raises a ValueError unless an agent remembers `num_steps` steps, and gives numbers."""
    decoder = config.policy.decoder
    if decoder.head != "continuous":
        raise ValueError(
            "the decoder's head must be 'continuous' to learn from reward, whose noise is on "
            f"numbers, got '{decoder.head}'; clone a policy with that head."
        )
    forgets = config.mode != "persistent" and decoder.kind != "fc"
    if forgets and num_steps > decoder.window_size:
        raise ValueError(
            f"num_steps must be at most the policy's window_size = {decoder.window_size}, for in "
            f"mode '{config.mode}' it forgets what lies before, got {num_steps}; shorten "
            "num_steps, or clone a policy with a longer window_size or mode 'persistent'."
        )


def play(
    config: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    params: Params,
    env: Env,
    instructions: Array,
    noise: NoiseConfig,
    layout_keys: Key,
    noise_keys: Key,
    *,
    num_steps: int,
) -> Tries:
    """Plays the first `num_steps` steps of one episode in every world, with noise.

    Args:
      config: of the agent, that passes `check_memory`.
      norm_stats: of the agent.
      params: of its policy.
      env: the world.
      instructions: word ids `[num instructions, S]` of `env.instructions`.
      noise: how far to stray.
      layout_keys: `[B]`, each fixes an episode as `env.reset(key)`; consumed.
      noise_keys: `[B]`, each fixes what is tried in it; consumed.
      num_steps: T; who has not ended by then has failed.

    Returns:
      What happened.
    """
    config = _cheapest(config)
    states, observations = jax.vmap(env.reset)(layout_keys)
    index = jax.vmap(env.instruction_index)(states)

    def step(carry: tuple, t: Array) -> tuple[tuple, Tries]:
        agent_state, states, observations, alive = carry
        told = observations._replace(instruction=instructions[index])
        reset = jnp.full(alive.shape, t == 0)
        agent_state, seen, now = agent.plan(config, norm_stats, params, agent_state, told, reset)
        now = _around_threshold(config, now)
        keys = jax.vmap(jax.random.fold_in, (0, None))(noise_keys, t)
        trial = jax.vmap(gaussian.sample, (0, 0, None))(keys, now, noise)
        agent_state, action = agent.send(
            config, norm_stats, agent_state, told, gaussian.certain(trial)
        )
        states, transition = jax.vmap(env.step)(states, action)
        tried = Tries(seen, trial, jnp.where(alive, transition.reward, 0.0), alive)
        alive &= ~(transition.terminated | transition.truncated)
        return (agent_state, states, transition.observation, alive), tried

    begun: AgentState = make_agent(config, norm_stats).init(params, len(layout_keys))
    carry = (begun, states, observations, jnp.ones(len(layout_keys), bool))
    _, tries = jax.lax.scan(step, carry, jnp.arange(num_steps))
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tries)


def means(config: AgentConfig, params: Params, seen: Observation) -> tuple[ActionChunk, jax.Array]:
    """What an agent wants at every step of episodes, with a gradient for the params.

    Args:
      config: of the agent, that passes `check_memory`.
      params: of its policy.
      seen: `[B, T, ...]`, whole episodes from their first step on.

    Returns:
      Arm `[B, T, A-1]` and gripper logit `[B, T]`, around which `play` tried, and the memory's
      features `[B, T, H]`.
    """
    decoder = config.policy.decoder
    _, features = policy.features(params, config.policy, seen)
    chunks = actions(decoders.predict(params["decoder"], decoder, features))
    state = execution.init(
        config.execution, len(chunks.arm), decoder.action_horizon, decoder.action_dim
    )
    by_time = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), chunks)
    _, now = jax.lax.scan(lambda *step: execution.plan(config.execution, *step), state, by_time)
    now = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), now)
    return _around_threshold(config, now), features


def _cheapest(config: AgentConfig) -> AgentConfig:
    """One carry in place of a window of them: the same, as long as nothing is forgotten."""
    if config.policy.decoder.kind == "gpt":
        return config
    return dataclasses.replace(config, mode="persistent")


def _around_threshold(config: AgentConfig, now: ActionChunk) -> ActionChunk:
    """The logit from where the gripper opens on: a trial errs as often to either side."""
    return now._replace(gripper_logit=now.gripper_logit - config.execution.gripper_threshold)
