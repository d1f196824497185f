"""The worlds that an agent learns in from reward, by the `kind` of their config."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vla_jax.envs import cartpole, grid
from vla_jax.envs.cartpole import CartPoleConfig
from vla_jax.envs.grid import GridConfig
from vla_jax.envs.partially_observed import partially_observe
from vla_jax.envs.table import discrete_table
from vla_jax.envs.table.discrete_table import TableChoicesConfig
from vla_jax.types import DiscreteEnv


@dataclass(frozen=True)
class DiscreteGymnasiumConfig:
    """Any registered Gymnasium environment with a few actions to choose from; Python steps it."""

    kind: Literal["gymnasium"] = "gymnasium"
    env_id: str = "CartPole-v1"  # id of a registered Gymnasium environment
    max_steps: int = 0  # environment steps until truncation; 0 = the environment's own


WorldConfig = GridConfig | CartPoleConfig | TableChoicesConfig | DiscreteGymnasiumConfig


def check(config: WorldConfig, *, partially_observed: bool) -> None:
    """Refuses to hide what Gymnasium shows: nothing tells which of its numbers are speeds."""
    if partially_observed and config.kind not in MAKE:
        raise ValueError(
            "partially_observed must be False in a Gymnasium environment, got True; register one "
            "with a gymnasium.ObservationWrapper around it."
        )


MAKE: dict[str, Callable[[Any], DiscreteEnv]] = {
    "grid": grid.make,
    "cartpole": cartpole.make,
    "table": discrete_table.make,
}


def make(config: WorldConfig, *, partially_observed: bool = False) -> DiscreteEnv:
    """Returns the environment of a config.

    Args:
      config: of a pure-JAX environment.
      partially_observed: whether to hide velocities, and the instruction after the first step.

    Raises:
      ValueError: Python steps the environment, or it has nothing to hide.
    """
    if config.kind not in MAKE:
        raise ValueError(
            f"world must be one of {', '.join(MAKE)}, which are pure functions, got "
            f"'{config.kind}'; use vla_jax.rl.gymnasium_loop, which steps it in Python."
        )
    env = MAKE[config.kind](config)
    return partially_observe(env) if partially_observed else env
