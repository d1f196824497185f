"""The grid environment in plain Python with Gymnasium's API: a second implementation."""

from typing import Any

import gymnasium
import numpy as np

from vla_jax.envs.grid import ACTIONS, GridConfig

_MOVES = {"stay": (0, 0), "up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


class GridEnv(gymnasium.Env):
    """Grid environment with public state, so that a test can set it."""

    def __init__(self, config: GridConfig):
        self.config = config
        size = 4 * (config.num_obstacles + 1)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))
        self.agent, self.goal, self.num_steps = (0, 0), (0, 0), 0
        self.obstacles: list[tuple[int, int, int]] = []  # row, column, columns per step

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; returns the observation and an empty info dict."""
        super().reset(seed=seed, options=options)
        size, draw = self.config.size, self.np_random.integers
        start = int(draw(size**2))
        end = (start + 1 + int(draw(size**2 - 1))) % size**2
        self.agent, self.goal = divmod(start, size), divmod(end, size)
        self.obstacles = [
            (
                (self.agent[0] + 1 + int(draw(size - 1))) % size,
                int(draw(size)),
                self.config.speed * (2 * int(draw(2)) - 1),
            )
            for _ in range(self.config.num_obstacles)
        ]
        self.num_steps = 0
        return self.observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves the agent, then the obstacles; returns Gymnasium's step results."""
        last = self.config.size - 1
        down, right = _MOVES[ACTIONS[action]]
        self.agent = (
            min(max(self.agent[0] + down, 0), last),
            min(max(self.agent[1] + right, 0), last),
        )
        self.obstacles = [self._move(*obstacle) for obstacle in self.obstacles]
        self.num_steps += 1
        hit = any((row, column) == self.agent for row, column, _ in self.obstacles)
        success = not hit and self.agent == self.goal
        reward, ended = float(success) - float(hit), hit or success
        truncated = not ended and self.num_steps >= self.config.max_steps
        return self.observe(), reward, ended, truncated, {"is_success": success}

    def observe(self) -> np.ndarray:
        """Returns the features of the state."""
        agent_row, agent_column = self.agent
        objects = [(*obstacle, -1) for obstacle in self.obstacles] + [(*self.goal, 0, 1)]
        relative = [
            (row - agent_row, column - agent_column, *rest) for row, column, *rest in objects
        ]
        return np.array(relative, np.float32).reshape(-1)

    def _move(self, row: int, column: int, velocity: int) -> tuple[int, int, int]:
        last, column = self.config.size - 1, column + velocity
        if column < 0:
            return row, -column, -velocity
        if column > last:
            return row, 2 * last - column, -velocity
        return row, column, velocity
