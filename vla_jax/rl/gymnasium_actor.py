"""The counterpart of `rl.actor` for Gymnasium environments, stepped by Python.

`unroll` returns the same records as `actor.unroll`. The environments themselves hold their state
and the random state of their next episodes.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.envs.discrete_worlds import DiscreteGymnasiumConfig
from vla_jax.envs.gymnasium import make_discrete
from vla_jax.envs.gymnasium_values import is_success, to_float32
from vla_jax.rl import actor
from vla_jax.rl.actor import Actor, Rollout
from vla_jax.types import Array, Key, Transition

Act = Callable[[Actor, Key], tuple[Any, Array]]  # -> carry, action [B] int32
MEASURED = ("return", "success")  # of an episode


class GymnasiumEnvs(NamedTuple):
    """Parallel environments; `start`, `unroll` and `play` change their state."""

    env_id: str
    envs: tuple[Any, ...]  # B, from `make_discrete`


class EpisodeError(RuntimeError):
    """An exception raised inside an environment."""


def open_envs(
    config: DiscreteGymnasiumConfig, num_envs: int, stack: contextlib.ExitStack
) -> GymnasiumEnvs:
    """Returns environments that are closed together with the stack.

    Args:
      config: config of the environment.
      num_envs: B.
      stack: closes the environments.
    """
    make = partial(
        make_discrete,
        config.env_id,
        max_steps=config.max_steps or None,
        success_rule=config.success_rule,
    )
    group = GymnasiumEnvs(config.env_id, tuple(make() for _ in range(num_envs)))
    for env in group.envs:
        stack.callback(env.close)
    return group


def start(group: GymnasiumEnvs, carry: Any, *, key: Key) -> Actor:
    """Returns the actor before its first step.

    Args:
      group: the environments.
      carry: carry of the policy's network before the first step, `[B, ...]`.
      key: consumed; determines these episodes and all later ones.
    """
    words = np.asarray(jax.random.key_data(key)).tolist()
    seeds = np.random.SeedSequence(words).generate_state(len(group.envs)).tolist()
    pairs = zip(group.envs, seeds, strict=True)
    observation = np.array([_reset(group, env, seed) for env, seed in pairs])
    return actor.first_actor({}, jnp.asarray(observation), carry)


def unroll(
    group: GymnasiumEnvs, act: Act, first: Actor, num_steps: int, *, key: Key
) -> tuple[Actor, Rollout]:
    """Returns the actor after `num_steps` steps, and the rollout, as `actor.unroll` does.

    Args:
      group: as passed to `start`.
      act: chooses the actions.
      first: from `start` or the previous `unroll`.
      num_steps: T.
      key: consumed, for actions.
    """
    walk = itertools.islice(_walk(group, act, first, key), num_steps)
    states, steps = zip(*walk, strict=True)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *steps)
    return states[-1], actor.stack_steps(stacked, first, states[-1])


def play(group: GymnasiumEnvs, act: Act, carry: Any, *, key: Key) -> dict[str, np.ndarray]:
    """Returns "return" and "success" `[B]` of one whole episode in each environment.

    Args:
      group: environments that no other actor uses.
      act: chooses the actions.
      carry: carry of the policy's network before the first step, `[B, ...]`.
      key: consumed; determines the episodes.
    """
    start_key, key = jax.random.split(key)
    running = np.ones(len(group.envs), bool)
    metrics = {name: np.zeros(len(running)) for name in MEASURED}
    for state, step in _walk(group, act, start(group, carry, key=start_key), key):
        ends = running & np.asarray(state.ended)
        metrics["return"][ends] = np.asarray(step.return_)[ends]
        metrics["success"][ends] = np.asarray(step.success)[ends]
        running &= ~ends
        if not running.any():
            break
    return metrics


def _walk(
    group: GymnasiumEnvs, act: Act, state: Actor, key: Key
) -> Iterator[tuple[Actor, Rollout]]:
    """Yields the actor after each step, and the step, without end."""
    for count in itertools.count():
        carry, action = act(state, jax.random.fold_in(key, count))
        state, step = _advance(group, state._replace(carry=carry), action)
        yield state, step


_record = jax.jit(actor.record)


def _advance(group: GymnasiumEnvs, state: Actor, action: Array) -> tuple[Actor, Rollout]:
    actions, ended = np.asarray(action).tolist(), np.asarray(state.ended).tolist()
    inputs = zip(group.envs, actions, ended, strict=True)
    transitions = [_step(group, *env_inputs) for env_inputs in inputs]
    return _record(state, action, {}, jax.tree.map(lambda *leaves: np.stack(leaves), *transitions))


def _step(group: GymnasiumEnvs, env: Any, action: int, ended: bool) -> Transition:
    """Steps one environment, or resets it, in which case only the observation is used."""
    if ended:
        false = np.array(False)
        return Transition(_reset(group, env, None), np.zeros((), np.float32), false, false, false)
    if action < 0:
        raise EpisodeError(f"env {group.env_id} got no action, since the policy's are not finite")
    with _as_episode_error(group, "in mid-episode"):
        first = env.action_space.start
        observation, reward, terminated, truncated, info = env.step(first + action)
        return Transition(
            observation=to_float32(observation, group.env_id),
            reward=np.asarray(reward, np.float32),
            terminated=np.array(bool(terminated)),
            truncated=np.array(bool(truncated and not terminated)),
            success=np.array(is_success(info, float(reward))),
        )


def _reset(group: GymnasiumEnvs, env: Any, seed: int | None) -> np.ndarray:
    with _as_episode_error(group, "at the start of an episode"):
        return to_float32(env.reset(seed=seed)[0], group.env_id)


@contextlib.contextmanager
def _as_episode_error(group: GymnasiumEnvs, place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # an environment may raise anything
        cause = f"{type(error).__name__}: {error}"
        raise EpisodeError(f"env {group.env_id} raised {place} ({cause})") from error
