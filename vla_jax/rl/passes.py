"""Several passes over a rollout, in minibatches of whole environments.

A minibatch holds all steps of some environments, never some steps of an environment: a recurrent
network then runs over a segment from the carry that was stored at its start.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.config import checked
from vla_jax.training.update import TrainState, Update
from vla_jax.types import Key, Metrics


@dataclass(frozen=True)
@checked(num_epochs=(0, 1000))
class PassesConfig:
    """Number of optimiser steps on each rollout."""

    num_epochs: int = 1  # passes over each rollout
    num_minibatches: int = 1  # groups of environments per pass, one optimiser step each

    def __post_init__(self):
        """Checks the counts."""
        for name in ("num_epochs", "num_minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def num_steps(config: PassesConfig) -> int:
    """Returns the number of optimiser steps on each rollout."""
    return config.num_epochs * config.num_minibatches


def check(config: PassesConfig, num_envs: int) -> None:
    """Raises a ValueError unless the environments divide into minibatches of one size."""
    if num_envs % config.num_minibatches:
        raise ValueError(
            f"num_minibatches must divide num_envs = {num_envs}, got {config.num_minibatches}; "
            "change one of them."
        )


def draw(config: PassesConfig, num_envs: int, *, key: Key) -> jax.Array:
    """Returns the environments of each optimiser step `[num_epochs · num_minibatches, size]`.

    Every pass takes each environment once, in a new random order.

    Args:
      config: number of passes and minibatches.
      num_envs: a multiple of `num_minibatches`.
      key: consumed.
    """
    keys = jax.random.split(key, config.num_epochs)
    orders = jax.vmap(lambda key: jax.random.permutation(key, num_envs))(keys)
    return orders.reshape(num_steps(config), num_envs // config.num_minibatches)


def run(
    update: Update, config: PassesConfig, state: TrainState, batch: Any, key: Key
) -> tuple[TrainState, Metrics]:
    """Returns the train state after all passes, and the metrics' means over the optimiser steps.

    The passes count as one update of the train state, whichever their number.

    Args:
      update: `(state, (part of the batch, updates done), key) -> (state, metrics)`.
      config: number of passes and minibatches.
      state: before the first pass.
      batch: tree of arrays `[num_envs, ...]`.
      key: consumed.
    """
    count = state.num_updates
    if num_steps(config) == 1:
        return update(state, (batch, count), key)
    draw_key, key = jax.random.split(key)
    num_envs = len(jax.tree.leaves(batch)[0])
    is_split = config.num_minibatches > 1

    def step(state: TrainState, inputs: tuple[Any, Key]) -> tuple[TrainState, Metrics]:
        envs, key = inputs
        part = jax.tree.map(lambda leaf: leaf[envs], batch) if is_split else batch
        return update(state, (part, count), key)

    envs = draw(config, num_envs, key=draw_key)
    keys = jax.random.split(key, num_steps(config))
    state, metrics = jax.lax.scan(step, state, (envs, keys))
    return dataclasses.replace(state, num_updates=count + 1), jax.tree.map(jnp.mean, metrics)
