"""Controllers of an evaluation: the trained policy, or a reference policy of the world."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.acting.agent import Agent, AgentConfig, AgentState, make_agent, read_instruction
from vla_jax.acting.rollout import Controller, Episodes, Outcome, SimulatorView, run_env
from vla_jax.data.normalize import NormStats
from vla_jax.envs.worlds import Reference
from vla_jax.evaluation.results import Latency
from vla_jax.types import Env, Observation, Params, make_observation

_CHUNK = 256  # episodes of a JAX environment in one scan
_WARM_UP, _TIMED = 3, 50  # policy steps


class Player(NamedTuple):
    """A policy for simulators and for JAX environments."""

    controller: Controller  # its state is an `AgentState`
    play_env: Callable[[Env, Sequence[int]], Iterator[Outcome]]  # all episodes in one scan


def make_player(
    config: AgentConfig,
    norm_stats: dict[str, NormStats],
    params: Params,
    *,
    window_size: int | None = None,
) -> Player:
    """Returns a policy as a player.

    Args:
      config: config of the agent.
      norm_stats: statistics of the training data.
      params: params of the policy.
      window_size: W in environment steps; None = as in training.
    """
    agent = make_agent(config, norm_stats, window_size=window_size)
    tokenize = functools.lru_cache(256)(functools.partial(read_instruction, config))
    params, step = jax.device_put(params), jax.jit(agent.step)
    prepare = functools.lru_cache(2)(lambda batch_size: agent.prepare(params, batch_size))

    def act(
        state: AgentState, views: list[SimulatorView], reset: np.ndarray
    ) -> tuple[AgentState, np.ndarray]:
        # Padded to the batch size of the state, so that fewer views need no recompilation.
        batch_size = len(state.age)
        missing = batch_size - len(views)
        observation = _observe([*views, *[views[0]] * missing], tokenize)
        reset = np.concatenate([reset, np.repeat(reset[:1], missing)])
        state, actions = step(prepare(batch_size), state, observation, reset)
        return state, np.asarray(actions)[: len(views)]

    init = functools.partial(agent.init, params)
    controller = Controller(init, act, lambda state: np.asarray(state.num_clipped))
    return Player(controller, functools.partial(_play_env, agent, params, tokenize))


def _observe(views: list[SimulatorView], tokenize: Callable[[str], np.ndarray]) -> Observation:
    parts = {
        name: np.stack([view.observation[name] for view in views]) for name in views[0].observation
    }
    return make_observation(
        parts, instruction=np.stack([tokenize(view.instruction) for view in views])
    )


def _play_env(
    agent: Agent,
    params: Params,
    tokenize: Callable[[str], np.ndarray],
    env: Env,
    seeds: Sequence[int],
) -> Iterator[Outcome]:
    ids = jnp.stack([tokenize(sentence) for sentence in env.instructions])
    play = jax.jit(lambda params, keys: run_env(agent, params, env, ids, keys))
    size = min(_CHUNK, len(seeds))
    for start in range(0, len(seeds), _CHUNK):
        chunk = list(seeds[start : start + size])
        filled = chunk + chunk[:1] * (size - len(chunk))
        played = jax.device_get(play(params, jnp.stack([jax.random.key(s) for s in filled])))
        rows = [Episodes(*row) for row in zip(*played, strict=True)]
        for seed, row in zip(chunk, rows, strict=False):
            yield _outcome(env, seed, row)


def _outcome(env: Env, seed: int, row: Episodes) -> Outcome:
    num_steps, index = int(row.num_steps), row.instruction_index
    task, sentence = env.tasks[index], env.instructions[index]
    error = "ValueError: the policy gave an action that is not finite" if row.refused else ""
    clipped = float(row.num_clipped) / max(num_steps, 1)
    outside = int(row.observations_clipped)
    return Outcome(seed, task, sentence, bool(row.success), num_steps, error, clipped, outside)


def measure_latency(controller: Controller, view: SimulatorView) -> Latency:
    """Measures the time of one step of a controller for one simulator, over fifty steps.

    Args:
      controller: to measure.
      view: at the first step of an episode.

    Returns:
      Percentiles in milliseconds.
    """
    times, state, reset = [], controller.init(1), np.ones(1, bool)
    for _ in range(_WARM_UP + _TIMED):
        start = time.perf_counter()
        state, _ = controller.step(state, [view], reset)  # returns NumPy, so the device is done
        times.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(times[_WARM_UP:], [50, 95])
    return Latency(float(p50), float(p95))


def reference_controller(reference: Reference) -> Controller:
    """Returns a reference policy as a controller without state."""

    def act(state: None, views: list[SimulatorView], reset: np.ndarray) -> tuple[None, np.ndarray]:
        del reset
        return state, np.stack([reference(v.simulator, v.seed, v.step) for v in views])

    return Controller(lambda num_simulators: None, act)
