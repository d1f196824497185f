"""A JAX world as a Python simulator, so that whatever plays or records one can use the other."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.envs.table import rules
from vla_jax.types import Env, SimulatorStep


class EnvSimulator:
    """One world of an `Env` as a `types.Simulator`."""

    control_hz = rules.CONTROL_HZ

    def __init__(self, env: Env):
        self._env = env
        self._state: Any = None
        self._observation: Any = None
        self._reset, self._step = jax.jit(env.reset), jax.jit(env.step)
        self._expert = jax.jit(env.expert)
        self.max_steps = env.max_steps
        self.instruction, self.task = "", ""

    def reset(self, seed: int) -> Mapping[str, np.ndarray]:
        """Starts the episode that `seed` fixes."""
        self._state, observation = self._reset(jax.random.key(seed))
        index = int(self._env.instruction_index(self._state))
        self.instruction, self.task = self._env.instructions[index], self._env.tasks[index]
        return self._observe(observation)

    def step(self, action: np.ndarray) -> SimulatorStep:
        """Applies `action [A]`."""
        self._state, transition = self._step(self._state, jnp.asarray(action, jnp.float32))
        return SimulatorStep(
            observation=self._observe(transition.observation),
            reward=float(transition.reward),
            terminated=bool(transition.terminated),
            truncated=bool(transition.truncated),
            success=bool(transition.success),
        )

    def expert(self, *, target: int | None = None) -> np.ndarray:
        """The demonstrator's action `[A]`; `target` is another colour of the table to reach for."""
        state = self._state
        if target is not None:
            task = int(state.instruction) // rules.NUM_BLOCKS
            state = state._replace(instruction=jnp.int32(task * rules.NUM_BLOCKS + target))
        return np.asarray(self._expert(state))

    def draw(self, size: int = 256) -> np.ndarray:
        """The outside camera's picture `[size, size, 3]`, enlarged; grey where there is none."""
        image = self._observation.get("image_primary", np.full((1, 1, 3), 128, np.uint8))
        rows = np.arange(size) * image.shape[0] // size
        return image[rows][:, rows]

    def close(self) -> None:
        """Nothing to free."""

    def _observe(self, observation) -> Mapping[str, np.ndarray]:
        parts = {name: part for name, part in observation._asdict().items() if part is not None}
        self._observation = {name: np.asarray(part) for name, part in parts.items()}
        return self._observation
