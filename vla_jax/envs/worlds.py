"""Simulated worlds of robots, a family by the `kind` of their config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from vla_jax.envs import gymnasium
from vla_jax.envs.table import jax_env, jax_simulator, mujoco_env, references, rules
from vla_jax.types import Env, Simulator

Reference = Callable[[Any, int, int], np.ndarray]  # (simulator, seed, step) -> action [A]


@dataclass(frozen=True)
class GymnasiumConfig:
    """Any registered Gymnasium environment with a Box of actions."""

    kind: Literal["gymnasium"] = "gymnasium"
    env_id: str = "Pendulum-v1"  # id of a registered Gymnasium environment
    instruction: str = ""  # of the robot
    image_size: int = 0  # pixels; 0 = no pictures
    max_steps: int = 0  # environment steps until truncation; 0 = the environment's own


WorldConfig = mujoco_env.MujocoTableConfig | jax_env.JaxTableConfig | GymnasiumConfig


class SimulatedWorld(NamedTuple):
    """Functions of one kind of world; absent parts are None or empty."""

    config: type  # class of its config
    make_simulator: Callable[[Any], Simulator]
    make_env: Callable[[Any], Env] | None = None  # pure functions, where it has them
    draws_observation: bool = False  # a video shows the observed image, so it needs image_size > 0
    references: Mapping[str, Reference] = MappingProxyType({})
    action_names: tuple[str, ...] = ()  # A names


def _make_gymnasium(config: GymnasiumConfig) -> Simulator:
    return gymnasium.make(
        config.env_id,
        instruction=config.instruction,
        image_size=config.image_size,
        max_steps=config.max_steps or None,
    )


def random_action(simulator: Any, seed: int, step: int) -> np.ndarray:
    """Returns a uniform action in [-1, 1] with as many numbers as a table takes.

    Args:
      simulator: not used.
      seed: of the episode.
      step: environment steps since the start of the episode.
    """
    del simulator
    return np.random.default_rng([seed, step, 2]).uniform(-1, 1, len(rules.ACTION_NAMES))


_TABLE_REFERENCES: Mapping[str, Reference] = {**references.REFERENCES, "random": random_action}
WORLDS: dict[str, SimulatedWorld] = {
    "table_mujoco": SimulatedWorld(
        config=mujoco_env.MujocoTableConfig,
        make_simulator=mujoco_env.TableMujoco,
        references=_TABLE_REFERENCES,
        action_names=rules.ACTION_NAMES,
    ),
    "table_jax": SimulatedWorld(
        config=jax_env.JaxTableConfig,
        make_simulator=jax_simulator.JaxTable,
        make_env=jax_env.make,
        draws_observation=True,
        references=_TABLE_REFERENCES,
        action_names=rules.ACTION_NAMES,
    ),
    "gymnasium": SimulatedWorld(config=GymnasiumConfig, make_simulator=_make_gymnasium),
}


def make_simulator(config: WorldConfig) -> Simulator:
    """Returns a new simulator of the world of a config."""
    return WORLDS[config.kind].make_simulator(config)


def find_reference(kind: str, name: str) -> Reference:
    """Returns a reference policy of a world.

    Args:
      kind: of the world's config.
      name: of the reference.

    Raises:
      ValueError: the world has no reference of this name.
    """
    known = WORLDS[kind].references
    if name not in known:
        names = ", ".join(known) or "none"
        raise ValueError(
            f"reference must be one that {kind} provides ({names}), got '{name}'; choose another "
            "reference or --world."
        )
    return known[name]
