"""The worlds by the `kind` of their config."""

from dataclasses import dataclass
from typing import Literal

from vla_jax.envs import gymnasium, simulate
from vla_jax.envs.table import jax_env, mujoco_env
from vla_jax.types import Simulator


@dataclass(frozen=True)
class GymnasiumConfig:
    """Any registered Gymnasium environment with a Box of actions."""

    kind: Literal["gymnasium"] = "gymnasium"
    env_id: str = "Pendulum-v1"
    instruction: str = ""  # what the robot is told
    image_size: int = 0  # pixels; 0 = no pictures
    max_steps: int = 0  # environment steps until truncation; 0 = the environment's own


WorldConfig = mujoco_env.TableConfig | jax_env.TableConfig | GymnasiumConfig
WORLDS: dict[str, type] = {
    "table_mujoco": mujoco_env.TableConfig,
    "table_jax": jax_env.TableConfig,
    "gymnasium": GymnasiumConfig,
}


def make_simulator(config: WorldConfig) -> Simulator:
    """One world of the kind that `config` is of."""
    if isinstance(config, mujoco_env.TableConfig):
        return mujoco_env.TableMujoco(config)
    if isinstance(config, jax_env.TableConfig):
        return simulate.EnvSimulator(jax_env.make(config))
    return gymnasium.make(
        config.env_id,
        instruction=config.instruction,
        image_size=config.image_size,
        max_steps=config.max_steps or None,
    )
