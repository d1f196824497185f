"""One training from reward, whatever the algorithm and the world: learn, tell, show a film."""

import pathlib
from typing import Protocol

import jax

from train.watch import watch
from vla_jax.envs import discrete_worlds
from vla_jax.envs.discrete_worlds import GymnasiumConfig, WorldConfig
from vla_jax.evaluation import video
from vla_jax.rl import gymnasium_loop
from vla_jax.rl.learner import Algorithm, Learner, SeedsConfig, make_learner, zero_carry
from vla_jax.rl.learning_loop import Learnt, learn, show
from vla_jax.training.loop import LoopConfig, is_first_process, open_run
from vla_jax.training.optim import OptimConfig


class Training(Protocol):
    """What the configs of all algorithms hold; dataclasses, field by field as there."""

    @property
    def run_dir(self) -> str: ...  # noqa: D102
    @property
    def world(self) -> WorldConfig: ...  # noqa: D102
    @property
    def partially_observed(self) -> bool: ...  # noqa: D102
    @property
    def seeds(self) -> SeedsConfig: ...  # noqa: D102
    @property
    def optim(self) -> OptimConfig: ...  # noqa: D102
    @property
    def loop(self) -> LoopConfig: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def overwrite(self) -> bool: ...  # noqa: D102


def train_from_reward(config: Training, algorithm: Algorithm) -> pathlib.Path:
    """Trains all seeds; returns the run's folder."""
    video.check_packages()
    run_dir = open_run(config.run_dir, config, overwrite=config.overwrite)
    learnt = _learn(config, algorithm, run_dir)
    if is_first_process():
        show(config.seeds, run_dir, learnt)
    if is_first_process() and not isinstance(config.world, GymnasiumConfig):
        params = jax.tree.map(lambda leaf: leaf[0], learnt.params)  # of the first seed
        watch(
            run_dir / "episodes.mp4",
            discrete_worlds.make(config.world, partially_observed=config.partially_observed),
            algorithm.exploit(params),
            zero_carry(algorithm, 1),
            jax.random.key(config.seed),
        )
    return run_dir


def make(config: Training, algorithm: Algorithm) -> Learner:
    """The algorithm in the config's world as a `Learner`."""
    world = discrete_worlds.make(config.world, partially_observed=config.partially_observed)
    return make_learner(world, algorithm, config.seeds, config.optim, config.loop.num_updates)


def _learn(config: Training, algorithm: Algorithm, run_dir: pathlib.Path) -> Learnt:
    """In one program with its worlds, or beside environments that Python steps."""
    same = config.seeds, config.loop, run_dir
    if isinstance(config.world, GymnasiumConfig):
        taught = config.world, algorithm, config.optim
        return gymnasium_loop.learn(*same, *taught, config.seed, name=run_dir.name)
    return learn(*same, make(config, algorithm), config.seed, name=run_dir.name)
