"""The worlds that an agent learns in from reward, by the `kind` of their config."""

from vla_jax.envs import cartpole, grid, hidden
from vla_jax.envs.cartpole import CartPoleConfig
from vla_jax.envs.grid import GridConfig
from vla_jax.types import World

WorldConfig = GridConfig | CartPoleConfig


def make(config: WorldConfig, *, hide_velocities: bool = False) -> World:
    """Returns the world of a config; without the speeds in what it shows, if asked for."""
    world = grid.make(config) if isinstance(config, GridConfig) else cartpole.make(config)
    return hidden.hide_velocities(world) if hide_velocities else world
