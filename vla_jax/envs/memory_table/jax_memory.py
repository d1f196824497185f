"""The JAX memory table as a Python simulator."""

from vla_jax.envs.memory_table import memory_env
from vla_jax.envs.simulate import EnvSimulator
from vla_jax.envs.table import rules


class JaxMemory(EnvSimulator):
    """One JAX memory table as a `types.Simulator`."""

    action_dim = len(rules.ACTION_NAMES)

    def __init__(self, config: memory_env.JaxMemoryConfig):
        """Compiles the environment of a config."""
        super().__init__(memory_env.make(config), control_hz=rules.CONTROL_HZ)
