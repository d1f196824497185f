"""Who plays an episode: a policy, or one of the references that its results are held against.

- `expert`: the world's own demonstrator, the most that imitating it can reach.
- `expert_ignoring_colour`: the same, reaching for a colour drawn at random: what remains of the
  task for a policy that has forgotten what it was told.
- `random`: uniform actions.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.acting.agent import Agent, AgentConfig, make_agent, read_instruction
from vla_jax.acting.rollout import Act, Outcome, Sight, run_env
from vla_jax.data.normalize import NormStats
from vla_jax.envs.table import rules
from vla_jax.evaluation.results import Latency
from vla_jax.types import Env, Observation, Params

Reference = Literal["expert", "expert_ignoring_colour", "random"]
_CHUNK = 256  # episodes of a JAX world in one scan
_WARM_UP, _TIMED = 3, 50  # policy steps


class Player(NamedTuple):
    """A policy, ready to play."""

    make_act: Callable[[int], Act]  # number of simulators -> act, with a memory of its own
    play_env: Callable[[Env, Sequence[int]], Iterator[Outcome]]  # a JAX world, all at once


def make_player(
    config: AgentConfig,
    norm_stats: dict[str, NormStats],
    params: Params,
    *,
    window_size: int | None = None,
) -> Player:
    """A policy as a player.

    Args:
      config: how to act.
      norm_stats: those of the training data.
      params: of the policy.
      window_size: stream with another window than the policy was trained with.
    """
    agent = make_agent(config, norm_stats, window_size=window_size)
    words = functools.cache(functools.partial(read_instruction, config))
    params, step = jax.device_put(params), jax.jit(agent.step)

    def make_act(num_simulators: int) -> Act:
        state = agent.init(params, num_simulators)
        laid_out = agent.prepare(params, num_simulators)

        def act(sights: list[Sight]) -> np.ndarray:
            nonlocal state
            # Always as many rows, so that nothing is compiled again when few episodes are left.
            rows = [*sights, *[sights[0]] * (num_simulators - len(sights))]
            reset = np.array([sight.step == 0 for sight in rows])
            state, actions = step(laid_out, state, _observe(rows, words), reset)
            return np.asarray(actions)[: len(sights)]

        return act

    return Player(make_act, functools.partial(_play_env, agent, params, words))


def _observe(sights: list[Sight], words: Callable[[str], np.ndarray]) -> Observation:
    parts = {
        name: np.stack([sight.observation[name] for sight in sights])
        for name in sights[0].observation
    }
    return Observation(**parts, instruction=np.stack([words(s.instruction) for s in sights]))


def _play_env(
    agent: Agent,
    params: Params,
    words: Callable[[str], np.ndarray],
    env: Env,
    seeds: Sequence[int],
) -> Iterator[Outcome]:
    ids = jnp.stack([words(sentence) for sentence in env.instructions])
    play = jax.jit(lambda params, keys: run_env(agent, params, env, ids, keys))
    size = min(_CHUNK, len(seeds))
    for start in range(0, len(seeds), _CHUNK):
        chunk = list(seeds[start : start + size])
        filled = chunk + chunk[:1] * (size - len(chunk))
        played = jax.device_get(play(params, jnp.stack([jax.random.key(s) for s in filled])))
        for seed, success, num_steps, index in zip(chunk, *played, strict=False):
            task, sentence = env.tasks[index], env.instructions[index]
            yield Outcome(seed, task, sentence, bool(success), int(num_steps), "")


def measure_latency(act: Act, sight: Sight) -> Latency:
    """How long a policy takes for one step, over fifty of them.

    Args:
      act: for one simulator.
      sight: what it shows.
    """
    times = []
    for _ in range(_WARM_UP + _TIMED):
        start = time.perf_counter()
        act([sight])  # gives an array of the host, so the device is done
        times.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(times[_WARM_UP:], [50, 95])
    return Latency(float(p50), float(p95))


def reference_act(reference: Reference) -> Act:
    """Acts on a table as the reference does; the same seed gives the same actions."""
    actors: dict[str, Callable[[Sight], np.ndarray]] = {
        "expert": lambda sight: _expert(sight, None),
        "expert_ignoring_colour": lambda sight: _expert(sight, _colour(sight.seed)),
        "random": lambda sight: _generator(sight.seed, sight.step).uniform(
            -1, 1, len(rules.ACTION_NAMES)
        ),
    }
    actor = actors[reference]
    return lambda sights: np.stack([actor(sight) for sight in sights])


def _expert(sight: Sight, target: int | None) -> np.ndarray:
    simulator: Any = sight.simulator  # a table: other worlds have no expert
    return simulator.expert(target=target)


def _colour(seed: int) -> int:
    return int(_generator(seed, 0).integers(rules.NUM_BLOCKS))


def _generator(seed: int, step: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, 2])  # another stream than the layout's
