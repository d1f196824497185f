"""Simulated robot environments, selected by the `kind` of their config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, Union

import numpy as np

from vla_jax.config import checked, did_you_mean
from vla_jax.envs import gymnasium
from vla_jax.envs.memory_table import jax_memory, memory_env, memory_state, mujoco_memory
from vla_jax.envs.table import jax_env, jax_simulator, mujoco_env, references, rules
from vla_jax.types import Env, Simulator, SuccessRule

Reference = Callable[[Any, int, int], np.ndarray]  # (simulator, seed, step) -> action [A]


@dataclass(frozen=True)
@checked()
class GymnasiumConfig:
    """Any registered Gymnasium environment with a `Box` action space."""

    kind: Literal["gymnasium"] = "gymnasium"
    env_id: str = "Pendulum-v1"  # id of a registered Gymnasium environment
    instruction: str = ""  # instruction of every episode
    image_size: int = 0  # pixels along each side of the rendered image; 0 = no images
    max_steps: int = 0  # environment steps until truncation; 0 = the environment's default
    # successful episodes: "once" = a step was a success, "at_end" = the last step was
    success_rule: SuccessRule = "once"


class SimulatedWorld(NamedTuple):
    """One kind of environment; absent parts are None or empty."""

    config: type  # dataclass of its config, with a field `kind`
    make_simulator: Callable[[Any], Simulator]
    make_env: Callable[[Any], Env] | None = None  # pure functions, if it has them
    draws_observation: bool = False  # a video shows the observed image, so it needs image_size > 0
    references: Mapping[str, Reference] = MappingProxyType({})
    # "action" or column of the observation -> name of each dimension, where known
    names: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def _make_gymnasium(config: GymnasiumConfig) -> Simulator:
    return gymnasium.make(
        config.env_id,
        instruction=config.instruction,
        image_size=config.image_size,
        max_steps=config.max_steps or None,
        success_rule=config.success_rule,
    )


def random_action(simulator: Any, seed: int, step: int) -> np.ndarray:
    """Returns a uniform action `[A]` in [-1, 1].

    Args:
      simulator: a simulator with the attribute `action_dim`.
      seed: seed of the episode.
      step: environment steps since the start of the episode.
    """
    return np.random.default_rng([seed, step, 2]).uniform(-1, 1, simulator.action_dim)


def expert_action(simulator: Any, seed: int, step: int) -> np.ndarray:
    """Returns the action `[A]` of the demonstrator.

    Args:
      simulator: a simulator with an expert.
      seed: of the episode, not used.
      step: environment steps since the start of the episode, not used.
    """
    del seed, step
    return simulator.expert()


_TABLE_REFERENCES: Mapping[str, Reference] = {**references.REFERENCES, "random": random_action}
_MEMORY_REFERENCES: Mapping[str, Reference] = {"expert": expert_action, "random": random_action}
WORLDS: dict[str, SimulatedWorld] = {
    "table_mujoco": SimulatedWorld(
        config=mujoco_env.MujocoTableConfig,
        make_simulator=mujoco_env.TableMujoco,
        references=_TABLE_REFERENCES,
        names=rules.NAMES,
    ),
    "table_jax": SimulatedWorld(
        config=jax_env.JaxTableConfig,
        make_simulator=jax_simulator.JaxTable,
        make_env=jax_env.make,
        draws_observation=True,
        references=_TABLE_REFERENCES,
        names=rules.NAMES,
    ),
    "memory_mujoco": SimulatedWorld(
        config=mujoco_memory.MujocoMemoryConfig,
        make_simulator=mujoco_memory.MemoryMujoco,
        references=_MEMORY_REFERENCES,
        names=memory_state.NAMES,
    ),
    "memory_jax": SimulatedWorld(
        config=memory_env.JaxMemoryConfig,
        make_simulator=jax_memory.JaxMemory,
        make_env=memory_env.make,
        draws_observation=True,
        references=_MEMORY_REFERENCES,
        names=memory_state.NAMES,
    ),
    "gymnasium": SimulatedWorld(
        config=GymnasiumConfig,
        make_simulator=_make_gymnasium,
        references={"random": random_action},
    ),
}
if TYPE_CHECKING:

    class WorldConfig(Protocol):
        """Fields that the config of every world, a dataclass, has."""

        __dataclass_fields__: ClassVar[dict[str, Any]]

        @property
        def kind(self) -> str:
            """Name of the world."""
            ...

        @property
        def image_size(self) -> int:
            """Pixels along each side of the observed images; 0 = no images."""
            ...
else:
    # The union that the command line offers and that JSON is read into, by `kind`.
    WorldConfig = Union[tuple(member.config for member in WORLDS.values())]  # noqa: UP007


def get(kind: str) -> SimulatedWorld:
    """Returns the world of a kind.

    Raises:
      ValueError: there is no world of this kind.
    """
    if kind not in WORLDS:
        raise ValueError(f"unknown world '{kind}'; {did_you_mean(kind, WORLDS)}")
    return WORLDS[kind]


def make_simulator(config: WorldConfig) -> Simulator:
    """Returns a new simulator of the world of a config."""
    return get(config.kind).make_simulator(config)


def find_reference(kind: str, name: str) -> Reference:
    """Returns a reference policy of a world.

    Args:
      kind: kind of the world.
      name: name of the reference.

    Raises:
      ValueError: the world has no reference of this name.
    """
    known = get(kind).references
    if name not in known:
        names = ", ".join(known) or "none"
        raise ValueError(
            f"reference must be one that {kind} provides ({names}), got '{name}'; choose another "
            "reference or --world."
        )
    return known[name]
