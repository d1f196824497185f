"""Many worlds side by side, acted in without a pause: what a learner learns from.

After the last step of an episode the agent is asked once more, for what it makes of the last
observation: this is the value that a learner needs where time ran out. What it would do is not
done; the world starts anew instead, and `mask` is False at that step. The step after it shows the
first observation of the new episode, and `reset` is True.

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
from vla_jax.types import Array, Key, Transition, World

# (carry, observation [B, ...], reset [B], key) -> (carry, action [B] int32)
Policy = Callable[[Any, Array, Array, Key], tuple[Any, Array]]


class Actor(NamedTuple):
    """What goes on from one rollout to the next."""

    world_state: Any  # [B, ...]; {} where the worlds themselves remember
    observation: Array  # [B, ...], the next that the policy will see
    reset: Array  # [B] bool, True where it is the first of an episode
    ended: Array  # [B] bool, True where it is the last of one
    return_: Array  # [B] float32, rewards of the episode so far
    carry: Any  # of the policy's network, [B, ...]


class Rollout(NamedTuple):
    """`T` steps of `B` worlds; observations one more, of which the last is yet to be acted on."""

    observation: Array  # [B, T + 1, ...]
    reset: Array  # [B, T + 1] bool, True where an episode starts
    action: Array  # [B, T] int32
    reward: Array  # [B, T] float32
    terminated: Array  # [B, T] bool, the task ended
    truncated: Array  # [B, T] bool, time ran out
    mask: Array  # [B, T] bool, False where a world was only started anew
    success: Array  # [B, T] bool, the task was done
    return_: Array  # [B, T] float32, rewards of the episode up to and with this step
    carry: Any  # before the first step, [B, ...]


def start(world: World, key: Key, num_worlds: int, carry: Any) -> Actor:
    """Returns an actor before its first step.

    Args:
      world: to act in.
      key: consumed.
      num_worlds: B.
      carry: of the policy's network before the first step, `[B, ...]`.
    """
    world_state, observation = jax.vmap(world.reset)(jax.random.split(key, num_worlds))
    nowhere = jnp.zeros(num_worlds, bool)
    return Actor(world_state, observation, ~nowhere, nowhere, jnp.zeros(num_worlds), carry)


def unroll(
    world: World, policy: Policy, actor: Actor, key: Key, num_steps: int
) -> tuple[Actor, Rollout]:
    """Returns the actor after `num_steps` steps, and all that happened in them.

    Args:
      world: the one that `start` was given.
      policy: what to do.
      actor: from `start`, or the `unroll` before.
      key: consumed, for actions and new episodes.
      num_steps: T.
    """

    def step(actor: Actor, key: Key) -> tuple[Actor, Any]:
        policy_key, reset_key = jax.random.split(key)
        carry, action = policy(actor.carry, actor.observation, actor.reset, policy_key)
        return advance(world, actor._replace(carry=carry), action, reset_key)

    chex.assert_equal_shape_prefix([actor.observation, actor.ended], 1)
    last, steps = jax.lax.scan(step, actor, jax.random.split(key, num_steps))
    return last, join(steps, actor, last)


def join(steps: Rollout, first: Actor, last: Actor) -> Rollout:
    """Returns single steps as one rollout.

    Args:
      steps: those that `record` gave, stacked, `[T, B, ...]`.
      first: the actor before them.
      last: the actor after them.
    """
    steps = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), steps)
    return steps._replace(
        observation=_append(steps.observation, last.observation),
        reset=_append(steps.reset, last.reset),
        carry=first.carry,
    )


def advance(world: World, actor: Actor, action: Array, key: Key) -> tuple[Actor, Rollout]:
    """Returns the actor after one step, and that step, `[B, ...]`.

    Args:
      world: the one that `start` was given.
      actor: whose carry is the policy's after this observation already.
      action: `[B]` int32; not done where an episode has ended.
      key: consumed, for new episodes.
    """
    world_state, transition = jax.vmap(world.step)(actor.world_state, action)
    fresh = jax.vmap(world.reset)(jax.random.split(key, action.shape[0]))
    world_state, observation = trees.select(
        actor.ended, fresh, (world_state, transition.observation)
    )
    return record(actor, action, world_state, transition._replace(observation=observation))


def record(
    actor: Actor, action: Array, world_state: Any, transition: Transition
) -> tuple[Actor, Rollout]:
    """Returns the actor after a step that the worlds have done, and that step, `[B, ...]`.

    Args:
      actor: before the step, but for the carry, which is after it.
      action: `[B]` int32.
      world_state: after the step, or of a new episode where one had ended.
      transition: of the step; where an episode had ended, its observation is the first of the
        new one, and nothing else of it counts.
    """
    mask = ~actor.ended
    reward = jnp.where(mask, transition.reward, 0.0)
    terminated, truncated = mask & transition.terminated, mask & transition.truncated
    return_ = jnp.where(actor.reset, 0.0, actor.return_) + reward
    taken = Rollout(
        actor.observation, actor.reset, action, reward, terminated, truncated, mask,
        mask & transition.success, return_, None,
    )  # fmt: skip
    following = Actor(
        world_state, transition.observation, actor.ended, terminated | truncated, return_,
        actor.carry,
    )  # fmt: skip
    return following, taken


def discounts(rollout: Rollout, gamma: float) -> jax.Array:
    """Returns γₜ `[B, T]`: 0 at a true end, γ elsewhere, where time ran out too."""
    return jnp.where(rollout.terminated, 0.0, gamma)


def lambdas(rollout: Rollout, lambda_: float) -> jax.Array:
    """Returns λₜ `[B, T]`: 0 where time ran out, so that the return ends in a value there."""
    return jnp.where(rollout.truncated, 0.0, lambda_)


def episode_metrics(rollout: Rollout) -> dict[str, jax.Array]:
    """Returns how the episodes went that ended in the rollout; NaN where none did.

    Returns:
      "return" and "success", means over the episodes, `[]`.
    """
    ended = rollout.terminated | rollout.truncated
    count = jnp.sum(ended)
    return {
        "return": jnp.sum(jnp.where(ended, rollout.return_, 0.0)) / count,
        "success": jnp.sum(ended & rollout.success) / count,
    }


def play(world: World, policy: Policy, key: Key, num_episodes: int, carry: Any) -> Rollout:
    """Returns one whole episode of each of `num_episodes` worlds.

    What comes after an episode's end has a `mask` of False.

    Args:
      world: to act in.
      policy: what to do.
      key: consumed; it fixes the episodes.
      num_episodes: B.
      carry: of the policy's network before the first step, `[B, ...]`.

    Returns:
      A rollout of `world.max_steps` steps.
    """
    start_key, key = jax.random.split(key)
    actor = start(world, start_key, num_episodes, carry)
    _, rollout = unroll(world, policy, actor, key, world.max_steps)
    first = jnp.cumsum(rollout.reset[:, :-1], axis=1) == 1
    return rollout._replace(
        mask=rollout.mask & first,
        terminated=rollout.terminated & first,
        truncated=rollout.truncated & first,
        success=rollout.success & first,
    )


def _append(steps: Array, last: Array) -> jax.Array:
    return jnp.concatenate([steps, last[:, None]], axis=1)
