"""Demonstrations by the expert of a JAX environment, many episodes in parallel."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from vla_jax.types import Env, Key, Observation, Recall

# Random steps at the start of an instruction that hide the goal from policies with memory, on the
# tables: at most 0.36 m along an axis.
WANDER_STEPS = 12


class Demonstrations(NamedTuple):
    """Episodes of an expert; values after an episode's `length` are not part of it."""

    observation: Observation  # [num_episodes, T, ...], before the action
    action: Array  # [num_episodes, T, A] the expert's, without noise
    # [num_episodes, T] int32 into `env.instructions`; within an episode it changes in chains only
    instruction: Array
    length: Array  # [num_episodes] int32, steps
    success: Array  # [num_episodes] bool
    is_acting: Array  # [num_episodes, T] bool, False where the robot only watches
    recall: Recall  # [num_episodes, T, ...] of `env.recall`; no numbers without it


class Wandering(NamedTuple):
    """Random motions at the beginning of instructions."""

    instruction: Array  # [num_episodes] int32, the one of the last motion
    left: Array  # [num_episodes] int32, steps left of it
    motion: Array  # [num_episodes, A], the same in all its steps


@functools.partial(jax.jit, static_argnames=("env", "num_episodes", "wander_steps"))
def collect(
    env: Env, key: Key, num_episodes: int, *, noise: float = 0.25, wander_steps: int = 0
) -> Demonstrations:
    """Returns demonstrations by the expert, all episodes in parallel in one scan.

    The executed action is the expert's plus noise, while the recorded one has no noise: the data
    cover states off the expert's path, with actions that lead back to it.

    With `wander_steps` the robot first moves somewhere else at each new instruction that it is
    given. Otherwise its own motion shows the goal from the second step on, and a policy with memory
    learns to read the goal there, not from the instruction or from what was shown. A motion that
    ends an episode makes it fail.

    Args:
      env: environment with an expert.
      key: consumed.
      num_episodes: episodes to play.
      noise: standard deviation of the noise on the arm dims, in units of action.
      wander_steps: greatest number of acting steps after each new instruction in which one random
        motion of the arm replaces the expert's; drawn each time from 0 to this number.

    Returns:
      Demonstrations with `T = env.max_steps`, failed ones included.

    Raises:
      ValueError: the environment has no expert.

    Source: DART (Laskey et al. 2017, https://arxiv.org/abs/1703.09327), with constant noise; the
    fault that wandering prevents is that of copycat policies (Wen et al. 2020,
    https://arxiv.org/abs/2010.14876).
    """
    if env.expert is None:
        raise ValueError("env must have an expert to demonstrate, got None; choose another world.")
    expert, is_acting = env.expert, env.is_acting or (lambda state: jnp.ones((), bool))
    recall = env.recall or (lambda state: Recall(jnp.zeros(0)))
    reset_key, noise_key = jax.random.split(key)
    state, observation = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))

    def step(carry, step_key):
        state, observation, alive, wandering = carry
        action, acts = jnp.asarray(jax.vmap(expert)(state)), jax.vmap(is_acting)(state)
        instruction = jnp.asarray(jax.vmap(env.instruction_index)(state))
        recalled = jax.vmap(recall)(state)
        executed = action
        if wander_steps:
            wander_key = jax.random.fold_in(step_key, 1)
            wandering, executed = _wander(
                wandering, wander_key, instruction, jnp.asarray(acts), action, wander_steps
            )
        jitter = noise * jax.random.normal(step_key, action.shape)
        executed = (executed + jitter).at[:, -1].set(action[:, -1])  # the gripper as the expert's
        state, transition = jax.vmap(env.step)(state, executed)
        success = alive & transition.success
        recorded = observation, action, alive, success, acts, instruction, recalled
        still_alive = alive & ~(transition.terminated | transition.truncated)
        return (state, transition.observation, still_alive, wandering), recorded

    size = jax.eval_shape(jax.vmap(expert), state).shape
    wandering = Wandering(
        jnp.full(num_episodes, -1), jnp.zeros(num_episodes, jnp.int32), jnp.zeros(size)
    )
    carry = (state, observation, jnp.ones(num_episodes, bool), wandering)
    _, recorded = jax.lax.scan(step, carry, jax.random.split(noise_key, env.max_steps))
    recorded = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), recorded)
    observation, action, alive, success, acts, instruction, recalled = recorded
    return Demonstrations(
        observation=observation,
        action=action,
        instruction=jnp.asarray(instruction),
        length=alive.sum(axis=1),
        success=jnp.any(success, axis=1),
        is_acting=acts,
        recall=recalled,
    )


def _wander(
    before: Wandering, key: Key, instruction: Array, acts: Array, action: Array, wander_steps: int
) -> tuple[Wandering, Array]:
    """Returns the motions after a step, and its actions: the motion's while it lasts.

    Args:
      before: motions before the step.
      key: consumed.
      instruction: `[num_episodes]` of this step.
      acts: `[num_episodes]` bool, whether the robot acts; otherwise the motion waits.
      action: the expert's, `[num_episodes, A]`.
      wander_steps: greatest number of steps of a motion.
    """
    steps_key, motion_key = jax.random.split(key)
    is_new = instruction != before.instruction
    drawn = jax.random.randint(steps_key, is_new.shape, 0, wander_steps + 1)
    motion = jax.random.uniform(motion_key, action.shape, minval=-1.0, maxval=1.0)
    left = jnp.where(is_new, drawn, before.left)
    motion = jnp.where(is_new[:, None], motion, before.motion)
    executed = jnp.where((left > 0)[:, None], motion, action)
    return Wandering(instruction, jnp.maximum(left - acts, 0), motion), executed
