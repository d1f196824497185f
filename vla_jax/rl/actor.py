"""Steps B environments in lockstep with auto-reset, and records rollouts for a learner.

After the last step of an episode the policy is called once more, on the final observation: a
learner needs its value there if the episode was truncated. The action of that call is ignored; the
environment is reset instead, and `mask` is False at that step. The next step shows the first
observation of the new episode, and its `reset` is True. For an episode of three steps:

    step        0      1      2      3      4      5
    reset       True   False  False  False  True   False
    mask        True   True   True   False  True   True
    terminated  False  False  True   False  False  False
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from vla_jax import trees
from vla_jax.types import Array, DiscreteEnv, Key, Transition

# (carry, observation [B, ...], reset [B], key) -> (carry, action [B] int32)
Policy = Callable[[Any, Array, Array, Key], tuple[Any, Array]]


class Actor(NamedTuple):
    """State between two rollouts."""

    env_state: Any  # state of the environments, [B, ...]; {} if they hold it themselves
    observation: Array  # [B, ...], next input of the policy
    reset: Array  # [B] bool, True where `observation` is the first of an episode
    ended: Array  # [B] bool, True where `observation` is the last of an episode
    return_: Array  # [B] float32, sum of rewards of the current episode
    carry: Any  # carry of the policy's network, [B, ...]


class Rollout(NamedTuple):
    """`T` steps of `B` environments, and the observation after the last step."""

    observation: Array  # [B, T + 1, ...]
    reset: Array  # [B, T + 1] bool, True where an episode starts
    action: Array  # [B, T] int32
    reward: Array  # [B, T] float32
    terminated: Array  # [B, T] bool, the task ended
    truncated: Array  # [B, T] bool, the time limit was reached
    mask: Array  # [B, T] bool, False where the step only reset the environment
    success: Array  # [B, T] bool, the task was completed
    return_: Array  # [B, T] float32, sum of rewards of the episode up to this step
    carry: Any  # carry of the policy's network before the first step, [B, ...]


def start(env: DiscreteEnv, num_envs: int, carry: Any, *, key: Key) -> Actor:
    """Returns the actor before its first step.

    Args:
      env: the environment.
      num_envs: B.
      carry: carry of the policy's network before the first step, `[B, ...]`.
      key: consumed.
    """
    env_state, observation = jax.vmap(env.reset)(jax.random.split(key, num_envs))
    return first_actor(env_state, observation, carry)


def first_actor(env_state: Any, observation: Array, carry: Any) -> Actor:
    """Returns the actor whose environments have just been reset.

    Args:
      env_state: state of the environments, `[B, ...]`, or `{}`.
      observation: first observations `[B, ...]`.
      carry: carry of the policy's network before the first step, `[B, ...]`.
    """
    num_envs = len(observation)
    false = jnp.zeros(num_envs, bool)
    return Actor(env_state, observation, ~false, false, jnp.zeros(num_envs), carry)


def unroll(
    env: DiscreteEnv, policy: Policy, actor: Actor, num_steps: int, *, key: Key
) -> tuple[Actor, Rollout]:
    """Returns the actor after `num_steps` steps, and the rollout.

    Args:
      env: as passed to `start`.
      policy: chooses the actions.
      actor: from `start` or the previous `unroll`.
      num_steps: T.
      key: consumed, for actions and resets.
    """

    def step(actor: Actor, key: Key) -> tuple[Actor, Any]:
        policy_key, reset_key = jax.random.split(key)
        carry, action = policy(actor.carry, actor.observation, actor.reset, policy_key)
        return advance(env, actor._replace(carry=carry), action, key=reset_key)

    chex.assert_equal_shape_prefix([actor.observation, actor.ended], 1)
    last, steps = jax.lax.scan(step, actor, jax.random.split(key, num_steps))
    return last, stack_steps(steps, actor, last)


def stack_steps(steps: Rollout, first: Actor, last: Actor) -> Rollout:
    """Returns single steps as one rollout.

    Args:
      steps: from `record`, stacked, `[T, B, ...]`.
      first: the actor before them.
      last: the actor after them.
    """
    steps = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), steps)
    return steps._replace(
        observation=_append(steps.observation, last.observation),
        reset=_append(steps.reset, last.reset),
        carry=first.carry,
    )


def advance(env: DiscreteEnv, actor: Actor, action: Array, *, key: Key) -> tuple[Actor, Rollout]:
    """Returns the actor after one step, and that step, `[B, ...]`.

    Args:
      env: as passed to `start`.
      actor: actor before the step, with the policy's carry after its observation.
      action: `[B]` int32; ignored where an episode has ended.
      key: consumed, for resets.
    """
    env_state, transition = jax.vmap(env.step)(actor.env_state, action)
    fresh = jax.vmap(env.reset)(jax.random.split(key, action.shape[0]))
    env_state, observation = trees.select(actor.ended, fresh, (env_state, transition.observation))
    return record(actor, action, env_state, transition._replace(observation=observation))


def record(
    actor: Actor, action: Array, env_state: Any, transition: Transition
) -> tuple[Actor, Rollout]:
    """Returns the actor after a step of the environments, and that step, `[B, ...]`.

    Args:
      actor: actor before the step, with the policy's carry after its observation.
      action: `[B]` int32; −1 (none, since the policy's outputs are not finite) has the reward NaN.
      env_state: state after the step, or after the reset where an episode had ended.
      transition: result of the step, `[B, ...]`; where an episode had ended, its observation is the
        first of the new episode, and its other fields are ignored.
    """
    mask = ~actor.ended
    is_refused = mask & (action < 0)
    reward = jnp.where(is_refused, jnp.nan, jnp.where(mask, transition.reward, 0.0))
    terminated, truncated = mask & transition.terminated, mask & transition.truncated
    return_ = jnp.where(actor.reset, 0.0, actor.return_) + reward
    step = Rollout(
        observation=actor.observation,
        reset=actor.reset,
        action=action,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        mask=mask,
        success=mask & transition.success & ~is_refused,
        return_=return_,
        carry=None,
    )
    next_actor = Actor(
        env_state=env_state,
        observation=transition.observation,
        reset=actor.ended,
        ended=terminated | truncated,
        return_=return_,
        carry=actor.carry,
    )
    return next_actor, step


def discounts(rollout: Rollout, gamma: float) -> jax.Array:
    """Returns the discounts γₜ `[B, T]`: 0 where an episode terminates, else γ."""
    return jnp.where(rollout.terminated, 0.0, gamma)


def lambdas(rollout: Rollout, lambda_: float) -> jax.Array:
    """Returns λₜ `[B, T]`: 0 at a truncation, where the return must bootstrap, else λ."""
    return jnp.where(rollout.truncated, 0.0, lambda_)


def episode_metrics(rollout: Rollout) -> dict[str, jax.Array]:
    """Returns "return" and "success" `[]`, means over the episodes that ended; NaN if none did."""
    ended = rollout.terminated | rollout.truncated
    count = jnp.sum(ended)
    return {
        "return": jnp.sum(jnp.where(ended, rollout.return_, 0.0)) / count,
        "success": jnp.sum(ended & rollout.success) / count,
    }


def play(env: DiscreteEnv, policy: Policy, num_episodes: int, carry: Any, *, key: Key) -> Rollout:
    """Returns one whole episode in each of `num_episodes` environments.

    `mask` is False after the end of an episode.

    Args:
      env: the environment.
      policy: chooses the actions.
      num_episodes: B.
      carry: carry of the policy's network before the first step, `[B, ...]`.
      key: consumed; determines the episodes.

    Returns:
      A rollout of `env.max_steps` steps.
    """
    start_key, key = jax.random.split(key)
    actor = start(env, num_episodes, carry, key=start_key)
    _, rollout = unroll(env, policy, actor, env.max_steps, key=key)
    is_first = jnp.cumsum(rollout.reset[:, :-1], axis=1) == 1
    return rollout._replace(
        mask=rollout.mask & is_first,
        terminated=rollout.terminated & is_first,
        truncated=rollout.truncated & is_first,
        success=rollout.success & is_first,
    )


def _append(steps: Array, last: Array) -> jax.Array:
    return jnp.concatenate([steps, last[:, None]], axis=1)
