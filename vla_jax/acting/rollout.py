"""A policy meets worlds, many at a time: Python simulators in step, JAX worlds in one scan."""

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.acting.agent import Agent
from vla_jax.types import Array, Env, Key, Params, Simulator


class Outcome(NamedTuple):
    """How one episode went."""

    seed: int  # fixes the layout and the instruction
    task: str
    instruction: str
    success: bool
    num_steps: int  # environment steps until the end, or the crash
    error: str  # what the world raised; empty where it did not crash


class Watched(NamedTuple):
    """An outcome with the film of it."""

    outcome: Outcome
    film: list[np.ndarray]  # pictures [h, w, 3] uint8, empty where nobody asked for them
    actions: np.ndarray  # [T, A] that were sent


class Sight(NamedTuple):
    """What one simulator shows before an action."""

    observation: Mapping[str, np.ndarray]  # field name of Observation -> array
    instruction: str
    step: int  # environment steps since the episode began
    seed: int  # of the episode
    simulator: Simulator  # itself, for those who may know more than a policy


Act = Callable[[list[Sight]], np.ndarray]
Draw = Callable[[Simulator], np.ndarray]


def run_simulators(
    act: Act,
    make_simulator: Callable[[], Simulator],
    seeds: Sequence[int],
    *,
    num_simulators: int = 16,
    film_seeds: Collection[int] = (),
    draw: Draw | None = None,
) -> Iterator[Watched]:
    """Plays one episode per seed, `num_simulators` side by side, so that the policy sees a batch.

    A simulator that raises is closed and replaced; its episode is told apart from a failure.

    Args:
      act: sights of all simulators, always as many -> actions `[B, A]`.
      make_simulator: makes one world.
      seeds: one per episode.
      num_simulators: B.
      film_seeds: episodes to film.
      draw: a picture `[h, w, 3]` uint8 of a simulator.

    Yields:
      Outcomes, as episodes end.
    """
    waiting = deque(seeds)
    film = {seed: draw for seed in film_seeds} if draw else {}
    lanes = [_lane(make_simulator, waiting, film) for _ in range(min(num_simulators, len(seeds)))]
    with contextlib.ExitStack() as stack:
        for lane in lanes:
            stack.callback(lane.close)
        sights: list[Sight | None] = []
        for lane in lanes:
            sights.append((yield from _until_sight(lane, None)))
        while any(sight is not None for sight in sights):
            # A lane without episodes keeps its place in the batch, with another's sight.
            filler = next(sight for sight in sights if sight is not None)
            actions = act([sight or filler for sight in sights])
            for i, lane in enumerate(lanes):
                if sights[i] is not None:
                    sights[i] = yield from _until_sight(lane, actions[i])


def _until_sight(
    lane: Generator[Sight | Watched, Any, None], action: np.ndarray | None
) -> Generator[Watched, None, Sight | None]:
    """Hands on the outcomes that an action brings; returns the next sight, None at the end."""
    with contextlib.suppress(StopIteration):
        item = lane.send(action)
        while isinstance(item, Watched):
            yield item
            item = next(lane)
        return item
    return None


def _lane(
    make_simulator: Callable[[], Simulator], waiting: deque[int], film: Mapping[int, Draw]
) -> Generator[Sight | Watched, Any, None]:
    """Episode after episode on one simulator: yields sights, is sent actions, yields outcomes."""
    simulator = make_simulator()
    try:
        while waiting:
            seed = waiting.popleft()
            watched = yield from _episode(simulator, seed, film.get(seed))
            if watched.outcome.error:
                with contextlib.suppress(Exception):
                    simulator.close()
                simulator = make_simulator()
            yield watched
    finally:
        simulator.close()


def _episode(simulator: Simulator, seed: int, draw: Draw | None) -> Generator[Sight, Any, Watched]:
    film, actions, task, instruction, success, error = [], [], "", "", False, ""
    try:
        observation = simulator.reset(seed)
        task, instruction = simulator.task, simulator.instruction
        while True:
            if draw:
                film.append(draw(simulator))
            action = yield Sight(observation, instruction, len(actions), seed, simulator)
            step = simulator.step(action)
            observation = step.observation
            actions.append(action)
            if step.terminated or step.truncated:
                break
        if draw:
            film.append(draw(simulator))
        success = bool(step.success)
    except Exception as raised:  # whatever a world raises is an outcome, not our end
        error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    outcome = Outcome(seed, task, instruction, success, len(actions), error)
    return Watched(outcome, film, np.array(actions))


class Episodes(NamedTuple):
    """How episodes of a JAX world went."""

    success: Array  # [B] bool
    num_steps: Array  # [B] int32, environment steps
    instruction_index: Array  # [B] int32, into `env.instructions`


def run_env(agent: Agent, params: Params, env: Env, instructions: Array, keys: Key) -> Episodes:
    """Plays one episode per key, all at once, in a JAX world; `jit` it.

    Args:
      agent: from `agent.make_agent`.
      params: of the policy.
      env: the world.
      instructions: word ids `[num instructions, S]` of `env.instructions`.
      keys: `[B]`, each fixes an episode as `env.reset(key)`; consumed.

    Returns:
      One outcome per episode.
    """
    num_episodes = len(keys)
    states, observations = jax.vmap(env.reset)(keys)
    index = jax.vmap(env.instruction_index)(states)

    def step(carry, t):
        agent_state, states, observations, done, success, num_steps = carry
        seen = observations._replace(instruction=instructions[index])
        reset = jnp.full(num_episodes, t == 0)
        agent_state, actions = agent.step(params, agent_state, seen, reset)
        states, transition = jax.vmap(env.step)(states, actions)
        success |= transition.success & ~done
        num_steps += ~done
        done |= transition.terminated | transition.truncated
        return (agent_state, states, transition.observation, done, success, num_steps), None

    nobody = jnp.zeros(num_episodes, bool)
    start = (
        agent.init(params, num_episodes), states, observations,
        nobody, nobody, jnp.zeros(num_episodes, jnp.int32),
    )  # fmt: skip
    (*_, success, num_steps), _ = jax.lax.scan(step, start, jnp.arange(env.max_steps))
    return Episodes(success, num_steps, index)
