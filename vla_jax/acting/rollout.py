"""Rollouts in batches: Python simulators in lockstep, JAX environments in one scan."""

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.acting.agent import Agent, check_action
from vla_jax.types import Array, Env, Key, Params, Simulator


class Outcome(NamedTuple):
    """Result of one episode."""

    seed: int  # fixes the layout and the instruction
    task: str
    instruction: str
    success: bool
    num_steps: int  # environment steps until the end, or the exception
    error: str  # message of the exception the simulator raised, or of the agent; empty if none
    # share of the actions of which a number of the arm was outside [-1, 1], which simulators clip;
    # None = not known (episodes of version 0.1.0)
    clipped: float | None = None
    # numbers of proprio and environment state, over all steps, that are so far outside the training
    # data that normalisation clipped them; None = not known (references, servers, version 0.1.0)
    observations_clipped: int | None = None


class RecordedEpisode(NamedTuple):
    """An outcome with its video and actions."""

    outcome: Outcome
    video: list[np.ndarray]  # frames [h, w, 3] uint8; empty if not recorded
    actions: np.ndarray  # [T, A] as sent to the simulator


class SimulatorView(NamedTuple):
    """Input of a controller from one simulator, before an action."""

    observation: Mapping[str, np.ndarray]  # field name of Observation -> array
    instruction: str
    step: int  # environment steps since the episode began
    seed: int  # of the episode
    simulator: Simulator  # for reference controllers that use privileged state


class Controller(NamedTuple):
    """A policy or a reference controller as pure functions of simulator views.

    `step(state, views, reset) -> (state, actions)` takes at most as many views as the state has
    rows; `reset [B]` is True where an episode starts. `actions` are `[B, A]`.
    """

    init: Callable[[int], Any]  # number of simulators -> state
    step: Callable[[Any, list[SimulatorView], np.ndarray], tuple[Any, np.ndarray]]
    # state -> [B], numbers of each robot's observations clipped since its episode began
    num_clipped: Callable[[Any], np.ndarray] | None = None


class _Sent(NamedTuple):
    """Input of a lane from the controller."""

    action: np.ndarray  # [A]
    num_clipped: int | None  # numbers of the observations of this episode; None = not known


# (succeeded before this step, success of this step) -> succeeded so far; bools or arrays of them
SUCCESS_RULES: Mapping[str, Callable[[Any, Any], Any]] = {
    "once": lambda before, now: before | now,
    "at_end": lambda before, now: now,
}
Draw = Callable[[Simulator], np.ndarray]


def run_simulators(
    controller: Controller,
    make_simulator: Callable[[], Simulator],
    seeds: Sequence[int],
    *,
    num_simulators: int = 16,
    video_seeds: Collection[int] = (),
    draw: Draw | None = None,
) -> Iterator[RecordedEpisode]:
    """Runs one episode per seed, `num_simulators` in lockstep, with batched policy steps.

    A simulator that raises is closed and replaced; the outcome of its episode has the error. So has
    that of an episode whose controller gives an action that is not finite, which is not sent.

    Args:
      controller: of all simulators.
      make_simulator: returns a new simulator.
      seeds: one per episode.
      num_simulators: B.
      video_seeds: episodes to record.
      draw: renders an image `[h, w, 3]` uint8 of a simulator.

    Yields:
      Episodes in the order in which they end.
    """
    waiting = deque(seeds)
    video = {seed: draw for seed in video_seeds} if draw else {}
    lanes = [_lane(make_simulator, waiting, video) for _ in range(min(num_simulators, len(seeds)))]
    with contextlib.ExitStack() as stack:
        for lane in lanes:
            stack.callback(lane.close)
        views: list[SimulatorView | None] = []
        for lane in lanes:
            views.append((yield from _until_view(lane, None)))
        state = controller.init(num_simulators)
        while any(view is not None for view in views):
            # A simulator without episodes keeps its row: a new batch size would recompile `step`.
            filler = next(view for view in views if view is not None)
            batch = [view or filler for view in views]
            reset = np.array([view.step == 0 for view in batch])
            state, actions = controller.step(state, batch, reset)
            clipped = controller.num_clipped and controller.num_clipped(state)
            for i, lane in enumerate(lanes):
                if views[i] is not None:
                    sent = _Sent(actions[i], None if clipped is None else int(clipped[i]))
                    views[i] = yield from _until_view(lane, sent)


def _until_view(
    lane: Generator[SimulatorView | RecordedEpisode, Any, None], sent: _Sent | None
) -> Generator[RecordedEpisode, None, SimulatorView | None]:
    """Yields the episodes that end with what is sent; returns the next view; None = no more."""
    with contextlib.suppress(StopIteration):  # ends after the lane's last episode
        item = lane.send(sent)
        while isinstance(item, RecordedEpisode):
            yield item
            item = next(lane)
        return item
    return None


def _lane(
    make_simulator: Callable[[], Simulator], waiting: deque[int], video: Mapping[int, Draw]
) -> Generator[SimulatorView | RecordedEpisode, Any, None]:
    """Runs episodes on one simulator: yields views, receives `_Sent`, yields finished episodes."""
    simulator = make_simulator()
    try:
        while waiting:
            seed = waiting.popleft()
            episode = yield from _episode(simulator, seed, video.get(seed))
            if episode.outcome.error:
                with contextlib.suppress(Exception):
                    # a broken simulator; its first error is recorded
                    simulator.close()
                simulator = make_simulator()
            yield episode
    finally:
        simulator.close()


def _episode(
    simulator: Simulator, seed: int, draw: Draw | None
) -> Generator[SimulatorView, Any, RecordedEpisode]:
    video, actions, task, instruction, success, error = [], [], "", "", False, ""
    clipped: int | None = None
    succeeded = SUCCESS_RULES[simulator.success_rule]
    try:
        observation = simulator.reset(seed)
        task, instruction = simulator.task, simulator.instruction
        while True:
            if draw:
                video.append(draw(simulator))
            view = SimulatorView(observation, instruction, len(actions), seed, simulator)
            action, clipped = yield view
            check_action(action)
            step = simulator.step(action)
            observation = step.observation
            actions.append(action)
            success = succeeded(success, bool(step.success))
            if step.terminated or step.truncated:
                break
        if draw:
            video.append(draw(simulator))
    except Exception as raised:  # recorded in the outcome, whatever the simulator raises
        success = False
        error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    sent = np.array(actions)
    outside = float(np.mean(is_outside(sent))) if len(sent) else 0.0
    outcome = Outcome(seed, task, instruction, success, len(actions), error, outside, clipped)
    return RecordedEpisode(outcome, video, sent)


class Episodes(NamedTuple):
    """Results of episodes of a JAX environment."""

    success: Array  # [B] bool
    num_steps: Array  # [B] int32, environment steps
    instruction_index: Array  # [B] int32, into `env.instructions`, at the first step
    refused: Array  # [B] bool, True where an action was not finite, which ended the episode
    num_clipped: Array  # [B] int32, steps at which a number of the arm was outside [-1, 1]
    observations_clipped: Array  # [B] int32, as in `Outcome`
    return_: Array  # [B] float32, sum of the rewards; of chains the number of instructions done


def run_env(agent: Agent, params: Params, env: Env, instructions: Array, keys: Key) -> Episodes:
    """Runs one episode per key, all at once, in a JAX environment; `jit` it.

    Args:
      agent: from `agent.make_agent`; its state is an `AgentState`.
      params: of the policy.
      env: the environment.
      instructions: word ids `[num instructions, S]` of `env.instructions`.
      keys: `[B]`, each determines an episode by `env.reset(key)`; consumed.

    Returns:
      One outcome per episode.
    """
    num_episodes = len(keys)
    states, observations = jax.vmap(env.reset)(keys)
    index = jax.vmap(env.instruction_index)(states)

    def step(carry, t):
        agent_state, states, observations, done, counted = carry
        index = jax.vmap(env.instruction_index)(states)  # of a chain it changes
        observations = observations._replace(instruction=instructions[index])
        reset = jnp.full(num_episodes, t == 0)
        agent_state, actions = agent.step(params, agent_state, observations, reset)
        states, transition = jax.vmap(env.step)(states, actions)
        refused = ~done & ~jnp.all(jnp.isfinite(actions), axis=-1)
        runs = ~done & ~refused
        succeeded = SUCCESS_RULES[env.success_rule](counted.success, transition.success)
        counted = counted._replace(
            success=jnp.where(runs, succeeded, counted.success & ~refused),
            num_steps=counted.num_steps + runs,
            refused=counted.refused | refused,
            num_clipped=counted.num_clipped + (runs & is_outside(actions)),
            observations_clipped=jnp.where(
                done, counted.observations_clipped, agent_state.num_clipped
            ),
            return_=counted.return_ + jnp.where(runs, transition.reward, 0.0),
        )
        done |= refused | transition.terminated | transition.truncated
        return (agent_state, states, transition.observation, done, counted), None

    false, zero = jnp.zeros(num_episodes, bool), jnp.zeros(num_episodes, jnp.int32)
    nothing = Episodes(false, zero, index, false, zero, zero, jnp.zeros(num_episodes, jnp.float32))
    start = (agent.init(params, num_episodes), states, observations, false, nothing)
    (*_, counted), _ = jax.lax.scan(step, start, jnp.arange(env.max_steps))
    return counted


def is_outside(action: Array) -> Any:
    """Returns True where a number of the arm of an action `[..., A]` is outside [-1, 1]."""
    return (abs(action[..., :-1]) > 1 + 1e-5).any(axis=-1)
