"""A film of an agent in its world, one episode after the other."""

import os
from typing import Any

import jax
import numpy as np

from vla_jax.evaluation import video
from vla_jax.rl import actor
from vla_jax.rl.actor import Actor, Policy
from vla_jax.types import Array, Key, World

_LONG = 100  # environment steps; longer episodes are shown faster


def watch(
    path: str | os.PathLike[str],
    world: World,
    policy: Policy,
    carry: Any,
    key: Key,
    *,
    num_steps: int = 200,
) -> None:
    """Writes a film of an agent.

    Args:
      path: MP4 to write.
      world: to act in.
      policy: what to do.
      carry: of the policy's network before the first step, `[1, ...]`.
      key: consumed; it fixes the episodes.
      num_steps: environment steps to show, one picture each.

    Raises:
      ImportError: PyAV or Pillow is missing; names the extra.
    """
    start_key, key = jax.random.split(key)

    def step(state: Actor, key: Key) -> tuple[Actor, Array]:
        policy_key, world_key = jax.random.split(key)
        carry, action = policy(state.carry, state.observation, state.reset, policy_key)
        picture = jax.vmap(world.draw)(state.world_state)[0]
        state, _ = actor.advance(world, state._replace(carry=carry), action, world_key)
        return state, picture

    start = actor.start(world, start_key, 1, carry)
    keys = jax.random.split(key, num_steps)
    _, pictures = jax.jit(lambda start: jax.lax.scan(step, start, keys))(start)
    video.write_mp4(path, list(np.asarray(pictures)), 30 if world.max_steps > _LONG else 4)
