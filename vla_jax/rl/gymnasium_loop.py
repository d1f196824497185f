"""Learning from reward in Gymnasium environments: Python steps them, compiled programs do the rest.

The algorithms, the network and the books that are kept of episodes are those of the JAX worlds;
what is one program there is a loop here, and slower. One seed learns. Checkpoints hold the params
and the optimiser; a training that resumes starts new episodes, so that it is not the same to the
bit as one without interruption.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.envs.discrete_worlds import GymnasiumConfig
from vla_jax.rl.actor import Actor
from vla_jax.rl.gymnasium_actor import EpisodeError, Host, open_envs, play, start, unroll
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
    Learnt,
    first_state,
    keep_learning,
    make_keys,
    make_learnt,
    tell_latest,
)
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig
from vla_jax.training.update import TrainState, Update
from vla_jax.types import Array, Key, Metrics, Params

Run = Callable[[LearnState, int, int], tuple[LearnState, Metrics]]  # from update, to update
Evaluate = Callable[[Params, Key, int], Metrics]  # how many episodes -> "return", "success" [1]


def learn(
    config: SeedsConfig,
    loop: LoopConfig,
    run_dir: pathlib.Path,
    world: GymnasiumConfig,
    algorithm: Algorithm,
    optim_config: OptimConfig,
    seed: int,
    *,
    name: str,
) -> Learnt:
    """Learns to the end, from the latest checkpoint in `run_dir` if there is one.

    Args:
      config: environments, and when to stop; of one seed.
      loop: length, and what to keep.
      run_dir: folder of the run.
      world: which environment.
      algorithm: how to act, and what to descend.
      optim_config: of the optimiser.
      seed: of all randomness.
      name: what the progress bar is about.

    Returns:
      What came of it, of one seed.

    Raises:
      ImportError: gymnasium, or a package that the environment needs, is missing.
      RuntimeError: an environment raised; the last checkpoint is as it was.
      ValueError: an environment that doesn't fit, or more than one seed or process; a reward or a
        loss that is not finite, as in `vla_jax.rl.learning_loop`.
    """
    if config.num_seeds != 1 or jax.process_count() > 1:
        raise ValueError(
            f"num_seeds must be 1 in a Gymnasium environment, in one process, got "
            f"{config.num_seeds} in {jax.process_count()}; start a training for each --seed."
        )
    keys = jax.tree.map(lambda key: key[0], make_keys(seed, 1))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_last_checkpoint_told(run_dir))
        host, trials = (open_envs(world, config.num_worlds, stack) for _ in range(2))
        init, update = _make_training(host, algorithm, config, optim_config, loop.num_updates)
        state, step = first_state(run_dir, init(keys.init))
        if step:
            print(f"{name} goes on after update {step}, with new episodes.")
            # Not the key that the first episodes had, lest they come again.
            fresh = init(jax.random.fold_in(keys.init, step)).actor
            state = state._replace(actor=fresh)
        evaluate = _make_evaluation(trials, algorithm)
        run = _make_run(host, algorithm, config, update, evaluate, keys)
        state = keep_learning(config, loop, run_dir, run, state, step, name=name)
        found = evaluate(acting_params(state), keys.report, config.report_episodes)
    return make_learnt(config, jax.tree.map(lambda leaf: leaf[None], state), found)


@contextlib.contextmanager
def _last_checkpoint_told(run_dir: pathlib.Path) -> Iterator[None]:
    """Adds to what an environment raises how far a training can go back."""
    try:
        yield
    except EpisodeError as error:
        raise RuntimeError(f"{error}; mend it, {tell_latest(run_dir)}.") from error


def _make_training(
    host: Host,
    algorithm: Algorithm,
    config: SeedsConfig,
    optim_config: OptimConfig,
    num_updates: int,
) -> tuple[Callable[[Key], LearnState], Update]:
    """Returns the state before the first update, by key, and one update."""
    env = host.envs[0]
    num_actions, shape = int(env.action_space.n), env.observation_space.shape
    init_params, update = make_training(algorithm, shape, num_actions, optim_config, num_updates)

    def init(key: Key) -> LearnState:
        params_key, actor_key = jax.random.split(key)
        first = start(host, actor_key, zero_carry(algorithm, config.num_worlds))
        return LearnState(init_params(params_key), first, jnp.zeros((), bool))

    return init, jax.jit(update)


def _make_run(
    host: Host,
    algorithm: Algorithm,
    config: SeedsConfig,
    update: Update,
    evaluate: Evaluate,
    keys: Keys,
) -> Run:
    """Returns what does so many updates, then an evaluation."""

    @jax.jit
    def act(learner: TrainState, state: Actor, key: Key) -> tuple[Any, Array]:
        policy = algorithm.explore(learner.params, learner.num_updates)
        return policy(state.carry, state.observation, state.reset, key)

    def update_once(state: LearnState) -> tuple[LearnState, Metrics]:
        before = state.train_state
        act_key, learn_key = jax.random.split(jax.random.fold_in(keys.update, before.num_updates))
        following, rollout = unroll(
            host, partial(act, before), state.actor, act_key, config.num_steps
        )
        train_state, metrics = update(before, rollout, learn_key)
        return LearnState(train_state, following, state.solved), metrics

    def run(state: LearnState, start: int, stop: int) -> tuple[LearnState, Metrics]:
        told = []
        for _ in range(start, stop):
            state, metrics = update_once(state)
            told.append(metrics)
        means = jax.tree.map(lambda *values: np.mean(values, keepdims=True), *told)
        key = jax.random.fold_in(keys.evaluate, stop)
        found = evaluate(acting_params(state), key, config.eval_episodes)
        solved = found[config.solved_by] >= config.solved_at
        return state._replace(solved=jnp.all(solved)), {**means, **found, "solved": solved}

    return run


def _make_evaluation(trials: Host, algorithm: Algorithm) -> Evaluate:
    """Returns what plays so many episodes, as well as it can, and gives means `[1]`."""
    size = len(trials.envs)
    carry = zero_carry(algorithm, size)

    @jax.jit
    def act(params: Params, state: Actor, key: Key) -> tuple[Any, Array]:
        policy = algorithm.exploit(params)
        return policy(state.carry, state.observation, state.reset, key)

    def evaluate(params: Params, key: Key, num_episodes: int) -> Metrics:
        rounds = [
            play(trials, partial(act, params), jax.random.fold_in(key, count), carry)
            for count in range(-(-num_episodes // size))
        ]
        found = jax.tree.map(lambda *parts: np.concatenate(parts)[:num_episodes], *rounds)
        return {name: jnp.mean(values, keepdims=True) for name, values in found.items()}

    return evaluate
