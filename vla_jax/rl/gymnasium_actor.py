"""`rl.actor` for Gymnasium environments: Python steps them, and the books are kept as there.

`unroll` gives what `actor.unroll` gives of a JAX world. The environments themselves remember where
they are, and the randomness of their next episodes.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.envs.discrete_worlds import GymnasiumConfig
from vla_jax.envs.gymnasium import is_success, make_choices
from vla_jax.rl import actor
from vla_jax.rl.actor import Actor, Rollout
from vla_jax.types import Array, Key, Transition

Act = Callable[[Actor, Key], tuple[Any, Array]]  # -> carry, action [B] int32


class Host(NamedTuple):
    """Environments side by side; `start` and what acts in them change them."""

    env_id: str
    envs: tuple[Any, ...]  # B, from `make_choices`


class EpisodeError(RuntimeError):
    """An environment raised."""


def open_envs(world: GymnasiumConfig, num_worlds: int, stack: contextlib.ExitStack) -> Host:
    """Returns environments, which are closed with the stack.

    Args:
      world: which.
      num_worlds: B.
      stack: owns them from now on.
    """
    make = partial(make_choices, world.env_id, max_steps=world.max_steps or None)
    host = Host(world.env_id, tuple(make() for _ in range(num_worlds)))
    for env in host.envs:
        stack.callback(env.close)
    return host


def start(host: Host, key: Key, carry: Any) -> Actor:
    """Returns an actor before its first step.

    Args:
      host: to act in.
      key: consumed; it fixes these episodes and all after them.
      carry: of the policy's network before the first step, `[B, ...]`.
    """
    words = np.asarray(jax.random.key_data(key)).tolist()
    seeds = np.random.SeedSequence(words).generate_state(len(host.envs)).tolist()
    pairs = zip(host.envs, seeds, strict=True)
    observation = np.array([_reset(host, env, seed) for env, seed in pairs])
    nowhere = jnp.zeros(len(seeds), bool)
    return Actor({}, jnp.asarray(observation), ~nowhere, nowhere, jnp.zeros(len(seeds)), carry)


def unroll(host: Host, act: Act, first: Actor, key: Key, num_steps: int) -> tuple[Actor, Rollout]:
    """Returns the actor after `num_steps` steps, and what happened, as `actor.unroll` does.

    Args:
      host: the one that `start` was given.
      act: what to do.
      first: from `start`, or the `unroll` before.
      key: consumed, for actions.
      num_steps: T.
    """
    states, steps = zip(*itertools.islice(_walk(host, act, first, key), num_steps), strict=True)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *steps)
    return states[-1], actor.join(stacked, first, states[-1])


def play(host: Host, act: Act, key: Key, carry: Any) -> dict[str, np.ndarray]:
    """Returns "return" and "success" `[B]` of one whole episode of each environment.

    Args:
      host: environments that nobody else acts in.
      act: what to do.
      key: consumed; it fixes the episodes.
      carry: of the policy's network before the first step, `[B, ...]`.
    """
    start_key, key = jax.random.split(key)
    going = np.ones(len(host.envs), bool)
    found = {name: np.zeros(len(going)) for name in ("return", "success")}
    for state, step in _walk(host, act, start(host, start_key, carry), key):
        ends = going & np.asarray(state.ended)
        found["return"][ends] = np.asarray(step.return_)[ends]
        found["success"][ends] = np.asarray(step.success)[ends]
        going &= ~ends
        if not going.any():
            break
    return found


def _walk(host: Host, act: Act, state: Actor, key: Key) -> Iterator[tuple[Actor, Rollout]]:
    """Acts without end: the actor after each step, and the step."""
    for count in itertools.count():
        carry, action = act(state, jax.random.fold_in(key, count))
        state, step = _advance(host, state._replace(carry=carry), action)
        yield state, step


_record = jax.jit(actor.record)


def _advance(host: Host, state: Actor, action: Array) -> tuple[Actor, Rollout]:
    chosen, ended = np.asarray(action).tolist(), np.asarray(state.ended).tolist()
    done = [_step(host, *of_env) for of_env in zip(host.envs, chosen, ended, strict=True)]
    return _record(state, action, {}, jax.tree.map(lambda *leaves: np.stack(leaves), *done))


def _step(host: Host, env: Any, action: int, ended: bool) -> Transition:
    """One step of one environment, or its new episode, of which only the observation counts."""
    if ended:
        no = np.array(False)
        return Transition(_reset(host, env, None), np.zeros((), np.float32), no, no, no)
    with _one_sentence(host, "in mid-episode"):
        first = env.action_space.start
        observation, reward, terminated, truncated, info = env.step(first + action)
        return Transition(
            observation=np.asarray(observation, np.float32),
            reward=np.asarray(reward, np.float32),
            terminated=np.array(bool(terminated)),
            truncated=np.array(bool(truncated and not terminated)),
            success=np.array(is_success(info, float(reward))),
        )


def _reset(host: Host, env: Any, seed: int | None) -> np.ndarray:
    with _one_sentence(host, "at the start of an episode"):
        return np.asarray(env.reset(seed=seed)[0], np.float32)


@contextlib.contextmanager
def _one_sentence(host: Host, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # an environment may raise anything
        told = f"{type(error).__name__}: {error}"
        raise EpisodeError(f"env {host.env_id} raised {where} ({told})") from error
