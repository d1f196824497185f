"""The JAX table as a Python simulator, whose expert can reach for another colour."""

import jax.numpy as jnp
import numpy as np

from vla_jax.envs.simulate import EnvSimulator
from vla_jax.envs.table import jax_env, rules


class JaxTable(EnvSimulator):
    """One JAX table as a `types.Simulator`."""

    action_dim = len(rules.ACTION_NAMES)

    def __init__(self, config: jax_env.JaxTableConfig):
        """Compiles the environment of a config."""
        super().__init__(jax_env.make(config), control_hz=rules.CONTROL_HZ)

    def expert(self, *, target: int | None = None) -> np.ndarray:
        """Returns the expert's action `[A]`.

        Args:
          target: index in `rules.COLOURS` of the block to reach for; None means the instruction's.
        """
        state = self._state
        if target is not None:
            task = int(state.instruction) // rules.NUM_BLOCKS
            state = state._replace(instruction=jnp.int32(task * rules.NUM_BLOCKS + target))
        return self._act_as_expert(state)
