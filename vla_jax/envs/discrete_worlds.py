"""Environments with discrete actions, selected by the `kind` of their config."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Union

from vla_jax.config import checked
from vla_jax.envs import cartpole, grid
from vla_jax.envs.cartpole import CartPoleConfig
from vla_jax.envs.grid import GridConfig
from vla_jax.envs.memory_table import discrete_memory
from vla_jax.envs.memory_table.discrete_memory import MemoryChoicesConfig
from vla_jax.envs.partially_observed import partially_observe, show_cue
from vla_jax.envs.table import discrete_table
from vla_jax.envs.table.discrete_table import TableChoicesConfig
from vla_jax.types import DiscreteEnv, SuccessRule


@dataclass(frozen=True)
@checked()
class DiscreteGymnasiumConfig:
    """Any registered Gymnasium environment with discrete actions, stepped in Python."""

    kind: Literal["gymnasium"] = "gymnasium"
    env_id: str = "CartPole-v1"  # id of a registered Gymnasium environment
    max_steps: int = 0  # environment steps until truncation; 0 = the environment's default
    # successful episodes: "once" = a step was a success, "at_end" = the last step was
    success_rule: SuccessRule = "once"


class DiscreteWorld(NamedTuple):
    """One kind of environment."""

    config: type  # dataclass of its config, with a field `kind`
    make: Callable[[Any], DiscreteEnv] | None  # pure functions; None if stepped in Python


DISCRETE_WORLDS: dict[str, DiscreteWorld] = {
    "grid": DiscreteWorld(GridConfig, grid.make),
    "cartpole": DiscreteWorld(CartPoleConfig, cartpole.make),
    "table": DiscreteWorld(TableChoicesConfig, discrete_table.make),
    "memory": DiscreteWorld(MemoryChoicesConfig, discrete_memory.make),
    "gymnasium": DiscreteWorld(DiscreteGymnasiumConfig, make=None),
}
if TYPE_CHECKING:

    class DiscreteWorldConfig(Protocol):
        """Field that the config of every environment has."""

        @property
        def kind(self) -> str:
            """Name of the environment."""
            ...
else:
    # The union that the command line offers and that JSON is read into, by `kind`.
    DiscreteWorldConfig = Union[  # noqa: UP007
        tuple(member.config for member in DISCRETE_WORLDS.values())
    ]


def check(config: DiscreteWorldConfig, *, partially_observed: bool, visible_steps: int) -> None:
    """Raises a ValueError if the environment has nothing to hide, or to show longer.

    It is not known which features of a Gymnasium environment are velocities.

    Args:
      config: of the environment.
      partially_observed: as for `make`.
      visible_steps: as for `make`.
    """
    if DISCRETE_WORLDS[config.kind].make is not None:
        if visible_steps > 1:
            make(config, partially_observed=partially_observed, visible_steps=visible_steps)
        return
    if visible_steps > 1:
        raise ValueError(
            f"visible_steps must be 1 in a Gymnasium environment, got {visible_steps}; it is not "
            "known which features must be remembered."
        )
    if partially_observed:
        raise ValueError(
            "partially_observed must be False in a Gymnasium environment, got True; hide features "
            "with a gymnasium.ObservationWrapper and register that environment."
        )


def make(
    config: DiscreteWorldConfig, *, partially_observed: bool = False, visible_steps: int = 1
) -> DiscreteEnv:
    """Returns the environment of a config.

    Args:
      config: config of a pure-JAX environment.
      partially_observed: hides velocities, and the instruction after the first steps.
      visible_steps: greatest number of steps that show it, see `partially_observe`; in an
        environment that is not partially observed, see `show_cue`.

    Raises:
      ValueError: the environment is stepped in Python, or it has nothing to hide.
    """
    make_env = DISCRETE_WORLDS[config.kind].make
    if make_env is None:
        known = ", ".join(kind for kind, world in DISCRETE_WORLDS.items() if world.make)
        raise ValueError(
            f"world must be one of {known}, which are pure functions, got '{config.kind}'; use "
            "vla_jax.rl.gymnasium_loop, which steps it in Python."
        )
    env = make_env(config)
    if partially_observed:
        return partially_observe(env, visible_steps)
    return env if visible_steps == 1 else show_cue(env, visible_steps)
