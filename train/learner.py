"""An algorithm that learns from reward, of one seed: rollout, update, evaluation.

`make_learner` is all that Deep SARSA and REINFORCE have in common; what they differ in comes in as
functions: how they act, and what they descend.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax import optim
from vla_jax.optim import OptimConfig
from vla_jax.rl import actor, network
from vla_jax.rl.actor import Policy
from vla_jax.rl.network import NetworkConfig
from vla_jax.types import Key, Metrics, Params, World
from vla_jax.update import LossFn, TrainState, init_train_state, make_update


class LearnState(NamedTuple):
    """All that learning changes, of one seed."""

    train_state: TrainState
    actor: Any  # the worlds [B, ...], and where each one is
    solved: jax.Array  # [] bool; from then on nothing is learnt


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
    net: NetworkConfig,
    heads: Mapping[str, int],
    seeds: SeedsConfig,
    optim_config: OptimConfig,
    num_updates: int,
    *,
    loss_fn: LossFn,
    explore: Callable[[Params, jax.Array], Policy],
    exploit: Callable[[Params], Policy],
) -> Learner:
    """Returns an algorithm as a `Learner`.

    Args:
      world: to learn in.
      net: sizes of the network.
      heads: its heads, name to width.
      seeds: worlds, steps, and episodes of an evaluation.
      optim_config: of the optimiser; with `ema_decay` it is the average that is evaluated.
      num_updates: length of the training.
      loss_fn: `(params, (rollout, updates done), key) -> (loss, metrics)`.
      explore: `(params, updates done)` -> how it acts while it learns.
      exploit: `params` -> how it acts when it has learnt.
    """

    def init_params(key: Key) -> Params:
        return network.init(key, net, world.observation_shape, heads)

    def zero_carry(batch_size: int):
        return network.zero_carry(net, jnp.zeros((batch_size, 1)))

    ema_decay = optim_config.ema_decay
    shapes = jax.eval_shape(init_params, jax.random.key(0))
    optimizer = optim.make_optimizer(optim_config, num_updates, shapes)
    update_params = make_update(loss_fn, optimizer, ema_decay=ema_decay)

    def init(key: Key) -> LearnState:
        params_key, actor_key = jax.random.split(key)
        return LearnState(
            init_train_state(init_params(params_key), optimizer, ema=ema_decay is not None),
            actor.start(world, actor_key, seeds.num_worlds, zero_carry(seeds.num_worlds)),
            jnp.zeros((), bool),
        )

    def update(state: LearnState, key: Key) -> tuple[LearnState, Metrics]:
        act_key, learn_key = jax.random.split(key)
        before = state.train_state
        policy = explore(before.params, before.num_updates)
        following, rollout = actor.unroll(world, policy, state.actor, act_key, seeds.num_steps)
        train_state, metrics = update_params(before, (rollout, before.num_updates), learn_key)
        reward = jnp.mean(rollout.reward)
        return LearnState(train_state, following, state.solved), {**metrics, "reward": reward}

    def evaluate(num_episodes: int, params: Params, key: Key) -> Metrics:
        carry = zero_carry(num_episodes)
        return actor.episode_metrics(actor.play(world, exploit(params), key, num_episodes, carry))

    return Learner(
        init,
        update,
        partial(evaluate, seeds.eval_episodes),
        partial(evaluate, seeds.report_episodes),
    )


def acting_params(state: LearnState) -> Params:
    """The slow average where one is kept: it is steadier than the params that learn."""
    averaged = state.train_state.ema_params
    return state.train_state.params if averaged is None else averaged
