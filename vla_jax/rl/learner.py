"""Reinforcement learner for one seed: rollout, update, evaluation.

`make_learner` is the part that Deep SARSA, REINFORCE and PPO share. The algorithm-specific part is
an `Algorithm`: the policies that it acts with, its loss and its passes over a rollout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.config import MAX_LENGTH, MAX_STEPS, checked, renamed
from vla_jax.nn.sharded_params import gathered
from vla_jax.rl import actor, network, passes
from vla_jax.rl.actor import Policy, Rollout
from vla_jax.rl.network import NetworkConfig
from vla_jax.rl.passes import PassesConfig
from vla_jax.training import optim
from vla_jax.training.optim import OptimConfig
from vla_jax.training.update import (
    LossFn,
    TrainState,
    Update,
    averaged_params,
    init_train_state,
    make_update,
)
from vla_jax.types import DiscreteEnv, Key, Metrics, Params, ShardingRules


class LearnState(NamedTuple):
    """Everything that learning changes, for one seed."""

    train_state: TrainState
    actor: Any  # state of the environments, [B, ...]
    solved: jax.Array  # [] bool; True stops the updates of this seed


class Algorithm(NamedTuple):
    """The algorithm-specific parts of a learner, for one seed and any environment."""

    network: NetworkConfig
    heads: Callable[[int], Mapping[str, int]]  # number of actions -> name of a head to its size
    loss_fn: LossFn  # (params, (batch, updates done), key) -> (loss, metrics)
    explore: Callable[[Params, jax.Array], Policy]  # (params, updates done) -> training policy
    exploit: Callable[[Params], Policy]  # params -> evaluation policy
    # (params before the update, rollout) -> batch of the loss, a tree of arrays [B, ...]
    prepare: Callable[[Params, Rollout], Any] = lambda params, rollout: rollout
    passes: PassesConfig = PassesConfig()  # optimiser steps on each rollout


class Learner(NamedTuple):
    """The functions that a learning loop calls, each for one seed."""

    init: Callable[[Key], LearnState]
    update: Callable[[LearnState, Key], tuple[LearnState, Metrics]]  # one rollout, one update
    evaluate: Callable[[Params, Key], Metrics]  # mean "return" and "success" of new episodes
    report: Callable[[Params, Key], Metrics]  # the same, for the final report
    sharding_rules: ShardingRules = ()  # of the params of one seed; () = replicated


@dataclass(frozen=True)
@checked(eval_episodes=(0, MAX_LENGTH), report_episodes=(0, MAX_LENGTH))
class SeedsConfig:
    """Number of parallel trainings, size of their rollouts, and when they stop early."""

    num_seeds: int = 16  # independent trainings that differ only in their random seed
    num_envs: int = 64  # parallel environments of each seed
    num_steps: int = 32  # rollout length between two updates, in environment steps
    eval_episodes: int = 256  # evaluation episodes of each seed at every log
    report_episodes: int = 256  # episodes of each seed for the final report
    solved_by: str = "success"  # metric for early stopping: "success" or "return"
    solved_at: float = 0.98  # value of the metric at which a seed stops learning

    upgrade = renamed({"num_worlds": "num_envs"})

    def __post_init__(self):
        """Checks the counts and the name of the metric."""
        names = ("num_seeds", "num_envs", "num_steps", "eval_episodes", "report_episodes")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        steps = self.num_seeds * self.num_envs * self.num_steps
        if steps > MAX_STEPS:
            raise ValueError(
                f"num_seeds · num_envs · num_steps must be at most {MAX_STEPS}, got {steps}; "
                "reduce one of them."
            )
        if self.solved_by not in ("success", "return"):
            raise ValueError(f"solved_by must be 'success' or 'return', got '{self.solved_by}'.")


def make_learner(
    env: DiscreteEnv,
    algorithm: Algorithm,
    seeds: SeedsConfig,
    optim_config: OptimConfig,
    num_updates: int,
    *,
    test_env: DiscreteEnv | None = None,
    skip_bad: bool = False,
) -> Learner:
    """Returns the learner of an algorithm in an environment.

    Args:
      env: the environment.
      algorithm: policies and loss.
      seeds: number of environments, steps and evaluation episodes.
      optim_config: config of the optimiser; with `ema_decay` the EMA of the params is evaluated.
      num_updates: length of the training.
      test_env: environment of the evaluations, with the same observations and actions; None =
        `env`.
      skip_bad: whether updates that are not finite are skipped, as for `update.make_update`.

    Raises:
      ValueError: the network reads objects of another size than the environment has.
    """
    _check_objects(env, algorithm.network)
    init_params, update_params = make_training(
        algorithm,
        env.observation_shape,
        env.num_actions,
        optim_config,
        num_updates,
        skip_bad=skip_bad,
    )

    def init(key: Key) -> LearnState:
        params_key, actor_key = jax.random.split(key)
        carry = zero_carry(algorithm, seeds.num_envs)
        first = actor.start(env, seeds.num_envs, carry, key=actor_key)
        return LearnState(init_params(params_key), first, jnp.zeros((), bool))

    def update(state: LearnState, key: Key) -> tuple[LearnState, Metrics]:
        act_key, learn_key = jax.random.split(key)
        train_state = state.train_state
        policy = algorithm.explore(gathered(train_state.params), train_state.num_updates)
        next_actor, rollout = actor.unroll(env, policy, state.actor, seeds.num_steps, key=act_key)
        train_state, metrics = update_params(train_state, rollout, learn_key)
        return LearnState(train_state, next_actor, state.solved), metrics

    def evaluate(num_episodes: int, params: Params, key: Key) -> Metrics:
        policy, carry = algorithm.exploit(params), zero_carry(algorithm, num_episodes)
        episodes = actor.play(test_env or env, policy, num_episodes, carry, key=key)
        return actor.episode_metrics(episodes)

    return Learner(
        init,
        update,
        partial(evaluate, seeds.eval_episodes),
        partial(evaluate, seeds.report_episodes),
        network.SHARDING,
    )


def _check_objects(env: DiscreteEnv, config: NetworkConfig) -> None:
    if config.object_size not in (0, env.object_size):
        raise ValueError(
            f"object_size must be 0 or {env.object_size}, the number of features per object in "
            f"this environment, got {config.object_size}; set --network.object-size."
        )


def make_training(
    algorithm: Algorithm,
    observation_shape: tuple[int, ...],
    num_actions: int,
    optim_config: OptimConfig,
    num_updates: int,
    *,
    skip_bad: bool = False,
) -> tuple[Callable[[Key], TrainState], Update]:
    """Returns `init(key)` of the train state, and the update by one rollout.

    Args:
      algorithm: network and loss.
      observation_shape: shape of one observation.
      num_actions: number of discrete actions.
      optim_config: config of the optimiser.
      num_updates: length of the training, in rollouts.
      skip_bad: whether updates that are not finite are skipped, as for `update.make_update`.
    """
    heads, ema_decay = algorithm.heads(num_actions), optim_config.ema_decay

    def init_params(key: Key) -> Params:
        return network.init(key, algorithm.network, observation_shape, heads)

    shapes = jax.eval_shape(init_params, jax.random.key(0))
    optimizer = optim.make_optimizer(
        optim_config, num_updates * passes.num_steps(algorithm.passes), shapes
    )
    freeze, train = optim_config.freeze, optim_config.train
    update_params = make_update(
        algorithm.loss_fn,
        optimizer,
        ema_decay=ema_decay,
        freeze=freeze,
        train=train,
        skip_bad=skip_bad,
    )

    def init(key: Key) -> TrainState:
        return init_train_state(
            init_params(key), optimizer, ema=ema_decay is not None, freeze=freeze, train=train
        )

    def update(state: TrainState, rollout: Rollout, key: Key) -> tuple[TrainState, Metrics]:
        batch = algorithm.prepare(state.params, rollout)
        state, metrics = passes.run(update_params, algorithm.passes, state, batch, key)
        return state, {**metrics, "reward": jnp.mean(rollout.reward)}

    return init, update


def zero_carry(algorithm: Algorithm, batch_size: int) -> Any:
    """Returns the carry of the algorithm's network before the first step, `[B, ...]`."""
    return network.zero_carry(algorithm.network, jnp.zeros((batch_size, 1)))


def acting_params(state: LearnState) -> Params:
    """Returns the EMA of the params if there is one, which is more stable, else the params."""
    return averaged_params(state.train_state)
