"""Reinforcement learning for any algorithm and environment: training, report, video."""

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import jax
import numpy as np

from vla_jax.config import checked
from vla_jax.envs import discrete_worlds
from vla_jax.envs.discrete_worlds import (
    DISCRETE_WORLDS,
    DiscreteGymnasiumConfig,
    DiscreteWorldConfig,
)
from vla_jax.envs.grid import GridConfig
from vla_jax.evaluation import video
from vla_jax.rl import actor, gymnasium_loop, learning_loop, learning_record
from vla_jax.rl.actor import Actor, Policy
from vla_jax.rl.learner import Algorithm, Learner, SeedsConfig, make_learner, zero_carry
from vla_jax.rl.learning_loop import LearningResult, write_report
from vla_jax.rl.network import NetworkConfig
from vla_jax.runs import check_run, open_run
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig
from vla_jax.training.parallel import is_first_process
from vla_jax.types import Array, DiscreteEnv, Key

_LONG_EPISODE = 100  # environment steps; videos of longer episodes have more frames per second


@dataclass(frozen=True)
@checked(visible_steps=(1, 2**20))
class RewardTraining:
    """Config fields shared by all algorithms."""

    run_dir: str = "runs/reward"  # output folder of the run
    world: DiscreteWorldConfig = GridConfig()  # environment to learn in
    partially_observed: bool = False  # hide velocities; show the instruction at the first step only
    # greatest number of steps of a training episode that show what must be remembered, drawn for
    # each from 1 to this number: the instruction with partially_observed, or the block of the task
    # lit; tests do not show it longer
    visible_steps: int = 1
    network: NetworkConfig = NetworkConfig()  # network of the policy or Q-function
    gamma: float = 0.99  # discount factor per environment step, in [0, 1]
    trace_decay: float = 0.95  # λ of the λ-returns, in [0, 1]; 0 = one step, 1 = whole rollout
    seeds: SeedsConfig = SeedsConfig()  # parallel seeds, rollout size, early stopping
    optim: OptimConfig = OptimConfig()  # learning rate, weight decay and EMA
    loop: LoopConfig = LoopConfig()  # number of updates, logs, checkpoints
    seed: int = 0  # random seed of the whole training
    overwrite: bool = False  # delete an existing run in run_dir

    MAY_NOT_CHANGE: ClassVar[tuple[str, ...]] = ("loop.log_every",)  # seeds stop at a log

    def __post_init__(self):
        """Checks the environment and the ranges."""
        discrete_worlds.check(
            self.world,
            partially_observed=self.partially_observed,
            visible_steps=self.visible_steps,
        )
        for name in ("gamma", "trace_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")


class Backend(NamedTuple):
    """Training functions for JAX environments, or for Gymnasium environments."""

    check: Callable[[RewardTraining, Algorithm], Any]  # raises before anything is written
    learn: Callable[[RewardTraining, Algorithm, pathlib.Path], LearningResult]
    # (config, algorithm, result, run folder); writes a video of the first seed
    record: Callable[[RewardTraining, Algorithm, LearningResult, pathlib.Path], None]


def train_from_reward(config: RewardTraining, algorithm: Algorithm) -> pathlib.Path:
    """Trains all seeds; returns the folder of the run.

    Args:
      config: config of the training.
      algorithm: policies and loss.

    Raises:
      ImportError: a package for videos, plots or the environment is missing.
      ValueError: the config does not fit the environment or the devices, or `run_dir` holds another
        run; nothing is written then. Or a reward or a loss is not finite.
    """
    backend = _backend(config)
    check_run(config.run_dir, config, overwrite=config.overwrite)
    folder = pathlib.Path(config.run_dir)
    learning_record.check(folder, folder, config)
    video.check_packages()
    backend.check(config, algorithm)
    run_dir = open_run(config.run_dir, config, overwrite=config.overwrite)
    result = backend.learn(config, algorithm, run_dir)
    if is_first_process():
        write_report(config.seeds, run_dir, result)
        backend.record(config, algorithm, result, run_dir)
    return run_dir


def make(config: RewardTraining, algorithm: Algorithm) -> Learner:
    """Returns the learner of an algorithm in the JAX environment of a config."""
    return make_learner(
        _make_env(config, config.visible_steps),
        algorithm,
        config.seeds,
        config.optim,
        config.loop.num_updates,
        test_env=_make_env(config),
        skip_bad=config.loop.skip_bad_updates > 0,
    )


def record_video(
    path: str | os.PathLike[str],
    env: DiscreteEnv,
    policy: Policy,
    carry: Any,
    *,
    key: Key,
    num_steps: int = 200,
) -> None:
    """Writes a video of a policy, one episode after the other.

    Args:
      path: MP4 to write.
      env: the environment.
      policy: chooses the actions.
      carry: carry of the policy's network before the first step, `[1, ...]`.
      key: consumed; determines the episodes.
      num_steps: environment steps to record, one frame each.

    Raises:
      ImportError: PyAV or Pillow is missing.
    """
    start_key, key = jax.random.split(key)

    def step(state: Actor, key: Key) -> tuple[Actor, Array]:
        policy_key, env_key = jax.random.split(key)
        carry, action = policy(state.carry, state.observation, state.reset, policy_key)
        frame = jax.vmap(env.draw)(state.env_state)[0]
        state, _ = actor.advance(env, state._replace(carry=carry), action, key=env_key)
        return state, frame

    start = actor.start(env, 1, carry, key=start_key)
    keys = jax.random.split(key, num_steps)
    _, frames = jax.jit(lambda start: jax.lax.scan(step, start, keys))(start)
    video.write_mp4(path, list(np.asarray(frames)), 30 if env.max_steps > _LONG_EPISODE else 4)


def _make_env(config: RewardTraining, visible_steps: int = 1) -> DiscreteEnv:
    return discrete_worlds.make(
        config.world, partially_observed=config.partially_observed, visible_steps=visible_steps
    )


def _check_jax(config: RewardTraining, algorithm: Algorithm) -> None:
    learning_loop.check_devices(config.seeds, config.loop)
    learning_loop.check_split_axes(config.loop, make(config, algorithm))


def _learn_jax(
    config: RewardTraining, algorithm: Algorithm, run_dir: pathlib.Path
) -> LearningResult:
    learner = make(config, algorithm)
    return learning_loop.learn(
        config.seeds,
        config.loop,
        run_dir,
        learner,
        config.seed,
        name=run_dir.name,
        record=learning_record.make(config),
    )


def _record_jax(
    config: RewardTraining, algorithm: Algorithm, result: LearningResult, run_dir: pathlib.Path
) -> None:
    params = jax.tree.map(lambda leaf: leaf[0], result.params)  # of the first seed
    record_video(
        run_dir / "episodes.mp4",
        _make_env(config),
        algorithm.exploit(params),
        zero_carry(algorithm, 1),
        key=jax.random.key(config.seed),
    )


def _check_gymnasium(config: RewardTraining, algorithm: Algorithm) -> None:
    world = cast(DiscreteGymnasiumConfig, config.world)
    gymnasium_loop.check(config.seeds, config.loop, world, algorithm, config.optim)


def _learn_gymnasium(
    config: RewardTraining, algorithm: Algorithm, run_dir: pathlib.Path
) -> LearningResult:
    return gymnasium_loop.learn(
        config.seeds,
        config.loop,
        run_dir,
        cast(DiscreteGymnasiumConfig, config.world),
        algorithm,
        config.optim,
        config.seed,
        name=run_dir.name,
        record=learning_record.make(config),
    )


_JAX = Backend(_check_jax, _learn_jax, _record_jax)
_GYMNASIUM = Backend(
    check=_check_gymnasium,
    learn=_learn_gymnasium,
    record=lambda config, algorithm, result, run_dir: None,  # its environments do not render
)


def _backend(config: RewardTraining) -> Backend:
    is_jax = DISCRETE_WORLDS[config.world.kind].make is not None
    return _JAX if is_jax else _GYMNASIUM
