"""Demonstrations by the expert of a JAX environment, many episodes in parallel."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from vla_jax.types import Env, Key, Observation


class Demonstrations(NamedTuple):
    """Episodes of an expert; values after an episode's `length` are not part of it."""

    observation: Observation  # [num_episodes, T, ...], before the action
    action: Array  # [num_episodes, T, A] the expert's, without noise
    # [num_episodes, T] int32 into `env.instructions`; within an episode it changes in chains only
    instruction: Array
    length: Array  # [num_episodes] int32, steps
    success: Array  # [num_episodes] bool
    is_acting: Array  # [num_episodes, T] bool, False where the robot only watches


@functools.partial(jax.jit, static_argnames=("env", "num_episodes"))
def collect(env: Env, key: Key, num_episodes: int, *, noise: float = 0.25) -> Demonstrations:
    """Returns demonstrations by the expert, all episodes in parallel in one scan.

    The executed action is the expert's plus noise, while the recorded one has no noise: the data
    cover states off the expert's path, with actions that lead back to it.

    Args:
      env: environment with an expert.
      key: consumed.
      num_episodes: episodes to play.
      noise: standard deviation of the noise on the arm dims, in units of action.

    Returns:
      Demonstrations with `T = env.max_steps`, failed ones included.

    Raises:
      ValueError: the environment has no expert.

    Source: DART (Laskey et al. 2017, https://arxiv.org/abs/1703.09327), with constant noise.
    """
    if env.expert is None:
        raise ValueError("env must have an expert to demonstrate, got None; choose another world.")
    expert, is_acting = env.expert, env.is_acting or (lambda state: jnp.ones((), bool))
    reset_key, noise_key = jax.random.split(key)
    state, observation = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))

    def step(carry, step_key):
        state, observation, alive = carry
        action, acts = jax.vmap(expert)(state), jax.vmap(is_acting)(state)
        instruction = jax.vmap(env.instruction_index)(state)
        jitter = noise * jax.random.normal(step_key, action.shape)
        executed = action + jitter.at[:, -1].set(0)  # the gripper command has no noise
        state, transition = jax.vmap(env.step)(state, executed)
        recorded = observation, action, alive, alive & transition.success, acts, instruction
        still_alive = alive & ~(transition.terminated | transition.truncated)
        return (state, transition.observation, still_alive), recorded

    carry = (state, observation, jnp.ones(num_episodes, bool))
    _, recorded = jax.lax.scan(step, carry, jax.random.split(noise_key, env.max_steps))
    recorded = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), recorded)
    observation, action, alive, success, acts, instruction = recorded
    return Demonstrations(
        observation=observation,
        action=action,
        instruction=jnp.asarray(instruction),
        length=alive.sum(axis=1),
        success=jnp.any(success, axis=1),
        is_acting=acts,
    )
