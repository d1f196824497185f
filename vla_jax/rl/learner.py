"""An algorithm that learns from reward, of one seed: rollout, update, evaluation.

`make_learner` is all that Deep SARSA and REINFORCE have in common; what they differ in comes in as
an `Algorithm`: how they act, and what they descend.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.rl import actor, network
from vla_jax.rl.actor import Policy, Rollout
from vla_jax.rl.network import NetworkConfig
from vla_jax.training import optim
from vla_jax.training.optim import OptimConfig
from vla_jax.training.update import LossFn, TrainState, Update, init_train_state, make_update
from vla_jax.types import Key, Metrics, Params, World


class LearnState(NamedTuple):
    """All that learning changes, of one seed."""

    train_state: TrainState
    actor: Any  # the worlds [B, ...], and where each one is
    solved: jax.Array  # [] bool; from then on nothing is learnt


class Algorithm(NamedTuple):
    """What tells one algorithm from another, whatever the worlds; of one seed."""

    network: NetworkConfig
    heads: Callable[[int], Mapping[str, int]]  # number of actions -> heads, name to width
    loss_fn: LossFn  # (params, (rollout, updates done), key) -> (loss, metrics)
    explore: Callable[[Params, jax.Array], Policy]  # (params, updates done) -> acting to learn
    exploit: Callable[[Params], Policy]  # params -> acting as well as it can


class Learner(NamedTuple):
    """What `learn` needs to know of an algorithm; every function is for one seed."""

    init: Callable[[Key], LearnState]
    update: Callable[[LearnState, Key], tuple[LearnState, Metrics]]  # one rollout, one update
    evaluate: Callable[[Params, Key], Metrics]  # "return" and "success" of fresh episodes, means
    report: Callable[[Params, Key], Metrics]  # the same of more episodes


@dataclass(frozen=True)
class SeedsConfig:
    """How many learn side by side, and when they have learnt enough."""

    num_seeds: int = 16  # trainings that differ in nothing but their randomness
    num_worlds: int = 64  # B, side by side, for each seed
    num_steps: int = 32  # T, environment steps of every world between two updates
    eval_episodes: int = 256  # for each seed, at every log
    report_episodes: int = 256  # for each seed, at the end, on other episodes
    solved_by: str = "success"  # the metric that tells: "success" or "return"
    solved_at: float = 0.98  # its value at which a seed stops learning

    def __post_init__(self):
        """Checks the counts."""
        names = ("num_seeds", "num_worlds", "num_steps", "eval_episodes", "report_episodes")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.solved_by not in ("success", "return"):
            raise ValueError(f"solved_by must be 'success' or 'return', got '{self.solved_by}'.")


def make_learner(
    world: World,
    algorithm: Algorithm,
    seeds: SeedsConfig,
    optim_config: OptimConfig,
    num_updates: int,
) -> Learner:
    """Returns an algorithm in a world as a `Learner`.

    Args:
      world: to learn in.
      algorithm: how to act, and what to descend.
      seeds: worlds, steps, and episodes of an evaluation.
      optim_config: of the optimiser; with `ema_decay` it is the average that is evaluated.
      num_updates: length of the training.

    Raises:
      ValueError: the network reads objects of another size than the world shows.
    """
    _check_objects(world, algorithm.network)
    init_params, update_params = make_training(
        algorithm, world.observation_shape, world.num_actions, optim_config, num_updates
    )

    def init(key: Key) -> LearnState:
        params_key, actor_key = jax.random.split(key)
        carry = zero_carry(algorithm, seeds.num_worlds)
        first = actor.start(world, actor_key, seeds.num_worlds, carry)
        return LearnState(init_params(params_key), first, jnp.zeros((), bool))

    def update(state: LearnState, key: Key) -> tuple[LearnState, Metrics]:
        act_key, learn_key = jax.random.split(key)
        before = state.train_state
        policy = algorithm.explore(before.params, before.num_updates)
        following, rollout = actor.unroll(world, policy, state.actor, act_key, seeds.num_steps)
        train_state, metrics = update_params(before, rollout, learn_key)
        return LearnState(train_state, following, state.solved), metrics

    def evaluate(num_episodes: int, params: Params, key: Key) -> Metrics:
        policy, carry = algorithm.exploit(params), zero_carry(algorithm, num_episodes)
        return actor.episode_metrics(actor.play(world, policy, key, num_episodes, carry))

    return Learner(
        init,
        update,
        partial(evaluate, seeds.eval_episodes),
        partial(evaluate, seeds.report_episodes),
    )


def _check_objects(world: World, net: NetworkConfig) -> None:
    if net.object_size not in (0, world.object_size):
        raise ValueError(
            f"object_size must be 0, or the {world.object_size} numbers that tell of one thing in "
            f"this world, got {net.object_size}; see --network.object-size."
        )


def make_training(
    algorithm: Algorithm,
    observation_shape: tuple[int, ...],
    num_actions: int,
    optim_config: OptimConfig,
    num_updates: int,
) -> tuple[Callable[[Key], TrainState], Update]:
    """Returns the state before the first update, by key, and one update by a rollout.

    Args:
      algorithm: what to descend.
      observation_shape: of one observation.
      num_actions: to choose from.
      optim_config: of the optimiser.
      num_updates: length of the training.
    """
    heads, ema_decay = algorithm.heads(num_actions), optim_config.ema_decay

    def init_params(key: Key) -> Params:
        return network.init(key, algorithm.network, observation_shape, heads)

    shapes = jax.eval_shape(init_params, jax.random.key(0))
    optimizer = optim.make_optimizer(optim_config, num_updates, shapes)
    update_params = make_update(algorithm.loss_fn, optimizer, ema_decay=ema_decay)

    def init(key: Key) -> TrainState:
        return init_train_state(init_params(key), optimizer, ema=ema_decay is not None)

    def update(state: TrainState, rollout: Rollout, key: Key) -> tuple[TrainState, Metrics]:
        state, metrics = update_params(state, (rollout, state.num_updates), key)
        return state, {**metrics, "reward": jnp.mean(rollout.reward)}

    return init, update


def zero_carry(algorithm: Algorithm, batch_size: int) -> Any:
    """Returns the carry of its network before the first step, `[B, ...]`."""
    return network.zero_carry(algorithm.network, jnp.zeros((batch_size, 1)))


def acting_params(state: LearnState) -> Params:
    """The slow average where one is kept: it is steadier than the params that learn."""
    averaged = state.train_state.ema_params
    return state.train_state.params if averaged is None else averaged
