"""The worlds that an agent learns in from reward, by the `kind` of their config."""

from dataclasses import dataclass
from typing import Literal

from vla_jax.envs import cartpole, grid
from vla_jax.envs.cartpole import CartPoleConfig
from vla_jax.envs.grid import GridConfig
from vla_jax.envs.partially_observed import partially_observe
from vla_jax.envs.table import discrete_table
from vla_jax.envs.table.discrete_table import TableChoicesConfig
from vla_jax.types import World


@dataclass(frozen=True)
class GymnasiumConfig:
    """Any registered Gymnasium environment with a few actions to choose from; Python steps it."""

    kind: Literal["gymnasium"] = "gymnasium"
    env_id: str = "CartPole-v1"
    max_steps: int = 0  # environment steps until truncation; 0 = the environment's own


WorldConfig = GridConfig | CartPoleConfig | TableChoicesConfig | GymnasiumConfig


def check(config: WorldConfig, *, partially_observed: bool) -> None:
    """Refuses to hide what Gymnasium shows: nothing tells which of its numbers are speeds."""
    if partially_observed and isinstance(config, GymnasiumConfig):
        raise ValueError(
            "partially_observed must be False in a Gymnasium environment, got True; register one "
            "with a gymnasium.ObservationWrapper around it."
        )


def make(config: WorldConfig, *, partially_observed: bool = False) -> World:
    """Returns the world of a config; with less to see, if asked for (`partially_observed`).

    Raises:
      ValueError: the world is none of pure functions, or has nothing to hide.
    """
    if isinstance(config, GridConfig):
        world = grid.make(config)
    elif isinstance(config, CartPoleConfig):
        world = cartpole.make(config)
    elif isinstance(config, TableChoicesConfig):
        world = discrete_table.make(config)
    else:
        raise ValueError(
            f"world must be one of pure functions, got {config.env_id} of Gymnasium; use "
            "vla_jax.rl.gymnasium_loop, which steps it in Python."
        )
    return partially_observe(world) if partially_observed else world
