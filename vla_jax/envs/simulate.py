"""A JAX environment as a Python simulator, for evaluation and recording."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.types import Env, SimulatorStep, SuccessRule


class EnvSimulator:
    """One environment of an `Env` as a `types.Simulator`."""

    def __init__(self, env: Env, *, control_hz: float = 10.0):
        """Compiles the environment; `control_hz` are actions per second."""
        self.control_hz = control_hz
        self._env = env
        self._state: Any = None
        self._observation: Any = None
        self._reset, self._step = jax.jit(env.reset), jax.jit(env.step)
        self._expert = jax.jit(env.expert) if env.expert else None
        self._is_acting = jax.jit(env.is_acting) if env.is_acting else None
        self.is_acting: bool | None = None  # None = the robot always acts
        self.max_steps = env.max_steps
        self.success_rule: SuccessRule = env.success_rule
        self.instruction, self.task = "", ""

    def reset(self, seed: int) -> Mapping[str, np.ndarray]:
        """Starts the episode of a seed; returns its first observation."""
        self._state, observation = self._reset(jax.random.key(seed))
        index = int(self._env.instruction_index(self._state))
        self.instruction, self.task = self._env.instructions[index], self._env.tasks[index]
        self._note_acting()
        return self._observe(observation)

    def step(self, action: np.ndarray) -> SimulatorStep:
        """Applies `action [A]`."""
        self._state, transition = self._step(self._state, jnp.asarray(action, jnp.float32))
        self._note_acting()
        return SimulatorStep(
            observation=self._observe(transition.observation),
            reward=float(transition.reward),
            terminated=bool(transition.terminated),
            truncated=bool(transition.truncated),
            success=bool(transition.success),
        )

    def expert(self) -> np.ndarray:
        """Returns the expert's action `[A]`.

        Raises:
          ValueError: the environment has no expert.
        """
        return self._act_as_expert(self._state)

    def _act_as_expert(self, state: Any) -> np.ndarray:
        if self._expert is None:
            raise ValueError("env must have an expert, got None; choose another world.")
        return np.asarray(self._expert(state))

    def draw(self, size: int = 256) -> np.ndarray:
        """Returns the primary camera's image `[size, size, 3]`, enlarged; grey if there is none."""
        image = self._observation.get("image_primary", np.full((1, 1, 3), 128, np.uint8))
        rows = np.arange(size) * image.shape[0] // size
        return image[rows][:, rows]

    def close(self) -> None:
        """Does nothing: there is nothing to free."""

    def _note_acting(self) -> None:
        if self._is_acting is not None:
            self.is_acting = bool(self._is_acting(self._state))

    def _observe(self, observation) -> Mapping[str, np.ndarray]:
        parts = {name: part for name, part in observation._asdict().items() if part is not None}
        self._observation = {name: np.asarray(part) for name, part in parts.items()}
        return self._observation
