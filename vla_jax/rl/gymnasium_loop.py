"""Training loop of one seed in Gymnasium environments, stepped by Python.

Algorithms, networks and episode records are those of the JAX environments (`learning_loop`); the
rollout is a Python loop instead of one compiled program, and slower. Checkpoints hold the params
and the optimiser state only: a resumed training starts new episodes, so that it is not identical
to an uninterrupted one.
"""

import contextlib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.envs.discrete_worlds import DiscreteGymnasiumConfig
from vla_jax.rl.actor import Actor
from vla_jax.rl.gymnasium_actor import (
    MEASURED,
    EpisodeError,
    GymnasiumEnvs,
    open_envs,
    play,
    start,
    unroll,
)
from vla_jax.rl.learner import (
    Algorithm,
    LearnState,
    SeedsConfig,
    acting_params,
    make_training,
    zero_carry,
)
from vla_jax.rl.learning_loop import (
    Keys,
    LearningResult,
    Run,
    first_state,
    make_keys,
    make_result,
    run_updates,
)
from vla_jax.training import finite, parallel
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig
from vla_jax.training.update import TrainState, Update
from vla_jax.types import Array, Key, Metrics, Params

Evaluate = Callable[[Params, Key, int], Metrics]  # (params, key, num_episodes) -> metrics [1]


def check(
    config: SeedsConfig,
    loop: LoopConfig,
    env_config: DiscreteGymnasiumConfig,
    algorithm: Algorithm,
    optim_config: OptimConfig,
) -> None:
    """Raises unless the environment opens, the optimiser fits the network, and nothing is parallel.

    Raises:
      ImportError: gymnasium, or a package that the environment needs, is missing.
      ValueError: as for `learn`.
    """
    if config.num_seeds != 1 or jax.process_count() > 1:
        raise ValueError(
            f"num_seeds must be 1 in a Gymnasium environment, in one process, got "
            f"{config.num_seeds} in {jax.process_count()} processes; start one training per seed."
        )
    if math.prod(parallel.parse_mesh(loop.mesh).values()) > 1:
        raise ValueError(
            "mesh must be left out in a Gymnasium environment, whose policy is updated on one "
            f"device, got {loop.mesh}."
        )
    with contextlib.ExitStack() as stack:
        _make_training(open_envs(env_config, 1, stack), algorithm, config, optim_config, loop)


def learn(
    config: SeedsConfig,
    loop: LoopConfig,
    run_dir: pathlib.Path,
    env_config: DiscreteGymnasiumConfig,
    algorithm: Algorithm,
    optim_config: OptimConfig,
    seed: int,
    *,
    name: str,
    record: Mapping[str, Any] | None = None,
) -> LearningResult:
    """Trains one seed, from the latest checkpoint in `run_dir` if there is one.

    Args:
      config: number of environments, and the criterion for stopping early; `num_seeds` is 1.
      loop: number of updates, intervals of logs and checkpoints.
      run_dir: folder of the run.
      env_config: config of the environment.
      algorithm: policies and loss.
      optim_config: config of the optimiser.
      seed: random seed of the whole training.
      name: label of the progress bar.
      record: metadata of every checkpoint, from `learning_record.make`; None = nothing.

    Raises:
      ImportError: gymnasium, or a package that the environment needs, is missing.
      RuntimeError: an environment raised; the last checkpoint is kept.
      ValueError: the environment has no discrete actions or no fixed observation size; more than
        one seed or process; or a reward or a loss is not finite.
    """
    check(config, loop, env_config, algorithm, optim_config)
    keys = jax.tree.map(lambda key: key[0], make_keys(seed, 1))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_naming_the_last_checkpoint(run_dir))
        train_envs, eval_envs = (open_envs(env_config, config.num_envs, stack) for _ in range(2))
        init, update = _make_training(train_envs, algorithm, config, optim_config, loop)
        state, step = first_state(run_dir, init(keys.init))
        if step:
            print(f"{name} resumes after update {step}, with new episodes.")
            # Another key than for the first episodes, which would otherwise be repeated.
            state = state._replace(actor=init(jax.random.fold_in(keys.init, step)).actor)
        evaluate = _make_evaluation(eval_envs, algorithm)
        run = _make_run(train_envs, algorithm, config, update, evaluate, keys)
        state = run_updates(config, loop, run_dir, run, state, step, name=name, record=record)
        report = evaluate(acting_params(state), keys.report, config.report_episodes)
    state = jax.tree.map(lambda leaf: leaf[None], state)
    return make_result(config, state, jax.device_get(acting_params(state)), report)


@contextlib.contextmanager
def _naming_the_last_checkpoint(run_dir: pathlib.Path) -> Iterator[None]:
    """Adds the last checkpoint to the message of an error raised inside an environment."""
    try:
        yield
    except EpisodeError as error:
        raise RuntimeError(
            f"{error}; fix the environment; {finite.describe_latest(run_dir)}."
        ) from error


def _make_training(
    group: GymnasiumEnvs,
    algorithm: Algorithm,
    config: SeedsConfig,
    optim_config: OptimConfig,
    loop: LoopConfig,
) -> tuple[Callable[[Key], LearnState], Update]:
    """Returns `init(key)` of the state, and the compiled update by one rollout."""
    env = group.envs[0]
    num_actions, shape = int(env.action_space.n), env.observation_space.shape
    init_params, update = make_training(
        algorithm,
        shape,
        num_actions,
        optim_config,
        loop.num_updates,
        skip_bad=loop.skip_bad_updates > 0,
    )

    def init(key: Key) -> LearnState:
        params_key, actor_key = jax.random.split(key)
        first = start(group, zero_carry(algorithm, config.num_envs), key=actor_key)
        return LearnState(init_params(params_key), first, jnp.zeros((), bool))

    return init, jax.jit(update)


def _make_run(
    group: GymnasiumEnvs,
    algorithm: Algorithm,
    config: SeedsConfig,
    update: Update,
    evaluate: Evaluate,
    keys: Keys,
) -> Run:
    """Returns `run(state, start, stop)`: the updates from `start` to `stop`, then an evaluation."""

    @jax.jit
    def act(train_state: TrainState, state: Actor, key: Key) -> tuple[Any, Array]:
        policy = algorithm.explore(train_state.params, train_state.num_updates)
        return policy(state.carry, state.observation, state.reset, key)

    def update_once(state: LearnState) -> tuple[LearnState, Metrics]:
        train_state = state.train_state
        key = jax.random.fold_in(keys.update, train_state.num_updates)
        act_key, learn_key = jax.random.split(key)
        next_actor, rollout = unroll(
            group, partial(act, train_state), state.actor, config.num_steps, key=act_key
        )
        train_state, metrics = update(train_state, rollout, learn_key)
        return LearnState(train_state, next_actor, state.solved), metrics

    def run(state: LearnState, start: int, stop: int) -> tuple[LearnState, Metrics, Metrics]:
        metrics_of_updates = []
        for _ in range(start, stop):
            state, metrics = update_once(state)
            metrics_of_updates.append(metrics)
        updates = jax.tree.map(lambda *values: np.stack(values)[None], *metrics_of_updates)
        key = jax.random.fold_in(keys.evaluate, stop)
        evaluated = evaluate(acting_params(state), key, config.eval_episodes)
        solved = evaluated[config.solved_by] >= config.solved_at
        return state._replace(solved=jnp.all(solved)), updates, {**evaluated, "solved": solved}

    return run


def _make_evaluation(group: GymnasiumEnvs, algorithm: Algorithm) -> Evaluate:
    """Returns `evaluate(params, key, num_episodes)`: mean "return" and "success", `[1]` each."""
    num_envs = len(group.envs)
    carry = zero_carry(algorithm, num_envs)

    @jax.jit
    def act(params: Params, state: Actor, key: Key) -> tuple[Any, Array]:
        policy = algorithm.exploit(params)
        return policy(state.carry, state.observation, state.reset, key)

    def evaluate(params: Params, key: Key, num_episodes: int) -> Metrics:
        if finite.first_bad_leaf(params) is not None:  # the check of the updates names the cause
            return {name: jnp.full(1, jnp.nan) for name in MEASURED}
        batches = [
            play(group, partial(act, params), carry, key=jax.random.fold_in(key, count))
            for count in range(-(-num_episodes // num_envs))
        ]
        episodes = jax.tree.map(lambda *parts: np.concatenate(parts)[:num_episodes], *batches)
        return {name: jnp.mean(values, keepdims=True) for name, values in episodes.items()}

    return evaluate
