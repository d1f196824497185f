"""A grid environment with moving obstacles, as pure JAX functions.

Agent and goal start in random cells. Obstacles move back and forth along rows, initially not along
the agent's row. If the agent shares a cell with an obstacle after a step, the episode is lost, even
in the goal's cell. Rows count downwards, columns to the right, in cells.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.config import checked
from vla_jax.types import Array, DiscreteEnv, Key, Transition

ACTIONS = ("stay", "up", "down", "left", "right")
_MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # rows, columns
_GOAL_REWARD, _OBSTACLE_REWARD = 1.0, -1.0
# Okabe and Ito's colours: ground, goal, obstacle, agent.
_COLOURS = ((236, 238, 241), (0, 158, 115), (213, 94, 0), (0, 114, 178))
_DRAWN_CELL = 32  # pixels along each side of a cell in `draw`


@dataclass(frozen=True)
@checked(size=(0, 256), num_obstacles=(0, 100), cell_size=(0, 64))
class GridConfig:
    """The grid environment; more or faster obstacles make it harder."""

    kind: Literal["grid"] = "grid"
    size: int = 5  # cells along each side
    num_obstacles: int = 3  # moving obstacles; they do not block one another
    speed: int = 1  # speed of the obstacles, in cells per environment step
    max_steps: int = 50  # environment steps until truncation
    observation: Literal["features", "pixels", "index"] = "features"  # type of the observation
    cell_size: int = 1  # side of a cell in observations of type "pixels", in pixels

    def __post_init__(self):
        """Checks the sizes."""
        if self.size < 2:
            raise ValueError(f"size must be >= 2 cells, got {self.size}.")
        if not 1 <= self.speed < self.size:
            raise ValueError(
                f"speed must be in 1 … size - 1 = {self.size - 1} cells per step, got {self.speed}."
            )
        for name in ("num_obstacles", "max_steps", "cell_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}.")


class GridState(NamedTuple):
    """State of one environment."""

    agent: Array  # [2] int32 row, column
    goal: Array  # [2] int32 row, column
    obstacles: Array  # [num_obstacles, 2] int32 row, column
    velocities: Array  # [num_obstacles] int32 columns per environment step
    num_steps: Array  # [] int32


@functools.cache  # the same functions for the same config, so that jit compiles them once
def make(config: GridConfig) -> DiscreteEnv:
    """Returns the grid as a `DiscreteEnv`.

    Observations by `config.observation`:
      "features": for each obstacle and then the goal, its row and column relative to the agent, its
        velocity (cells per step) and its reward, `[4 · (num_obstacles + 1)]` float32.
      "pixels": an image `[h, w, 3]` uint8, which does not show velocities.
      "index": the number of the state, `[]` uint32, for tabular methods.
    """
    size = config.size * config.cell_size
    features = 4 * (config.num_obstacles + 1)
    shapes = {"features": (features,), "pixels": (size, size, 3), "index": ()}
    has_features = config.observation == "features"
    return DiscreteEnv(
        reset=functools.partial(_reset, config),
        step=functools.partial(_step, config),
        draw=functools.partial(pixels, config, cell_size=_DRAWN_CELL),
        observation_shape=shapes[config.observation],
        velocities=tuple(range(2, features, 4)) if has_features else (),
        num_actions=len(ACTIONS),
        max_steps=config.max_steps,
        object_size=4 if has_features else 0,
    )


def num_states(config: GridConfig) -> int:
    """Returns the number of states of the grid, as numbered by `index`."""
    return config.size**4 * (2 * config.size**2) ** config.num_obstacles


def index(config: GridConfig, state: GridState) -> Array:
    """Returns the number of a state, `[]` uint32; not unique if there are more than 2³² states."""
    cells = jnp.concatenate([state.agent[None], state.goal[None], state.obstacles])
    numbers = jnp.uint32(cells[:, 0] * config.size + cells[:, 1])
    directions = jnp.uint32(state.velocities > 0)
    number = numbers[0] * config.size**2 + numbers[1]
    for obstacle in range(config.num_obstacles):
        digit = 2 * numbers[2 + obstacle] + directions[obstacle]
        number = number * (2 * config.size**2) + digit
    return number


def features(config: GridConfig, state: GridState) -> Array:
    """Returns the features (see `make`), `[4 · (num_obstacles + 1)]` float32."""
    relative = jnp.concatenate([state.obstacles, state.goal[None]]) - state.agent[None]
    velocities = jnp.append(state.velocities, 0)
    rewards = jnp.full(len(velocities), _OBSTACLE_REWARD).at[-1].set(_GOAL_REWARD)
    return jnp.concatenate([relative, velocities[:, None], rewards[:, None]], axis=1).reshape(-1)


def pixels(config: GridConfig, state: GridState, cell_size: int | None = None) -> Array:
    """Returns an image of the grid, `[h, w, 3]` uint8; the agent is drawn on top."""
    image = jnp.zeros((config.size, config.size), jnp.int32)
    image = image.at[state.goal[0], state.goal[1]].set(1)
    image = image.at[state.obstacles[:, 0], state.obstacles[:, 1]].set(2)
    image = image.at[state.agent[0], state.agent[1]].set(3)
    image = jnp.asarray(_COLOURS, jnp.uint8)[image]
    cell_size = cell_size or config.cell_size
    return image.repeat(cell_size, axis=0).repeat(cell_size, axis=1)


_OBSERVE = {"features": features, "pixels": pixels, "index": index}


def _reset(config: GridConfig, key: Key) -> tuple[GridState, Array]:
    size, cells = config.size, config.size**2
    draws = jax.random.uniform(key, (2 + 3 * config.num_obstacles,))
    row, column, direction = draws[2:].reshape(3, -1)
    agent = jnp.int32(draws[0] * cells)
    goal = (agent + 1 + jnp.int32(draws[1] * (cells - 1))) % cells  # any other cell
    rows = (agent // size + 1 + jnp.int32(row * (size - 1))) % size  # any other row
    state = GridState(
        agent=jnp.stack(jnp.divmod(agent, size)),
        goal=jnp.stack(jnp.divmod(goal, size)),
        obstacles=jnp.stack([rows, jnp.int32(column * size)], axis=1),
        velocities=jnp.where(direction < 0.5, -config.speed, config.speed),
        num_steps=jnp.zeros((), jnp.int32),
    )
    return state, _OBSERVE[config.observation](config, state)


def _step(config: GridConfig, state: GridState, action: Array) -> tuple[GridState, Transition]:
    action = jnp.asarray(action)
    if action.shape != () or not jnp.issubdtype(action.dtype, jnp.integer):
        raise ValueError(
            f"action must be one integer in 0 … {len(ACTIONS) - 1} {ACTIONS}, got "
            f"{action.dtype}{list(action.shape)}; vmap the step over environments."
        )
    last = config.size - 1
    agent = jnp.clip(state.agent + jnp.asarray(_MOVES)[action], 0, last)
    column = state.obstacles[:, 1] + state.velocities
    bounced = jnp.where(column < 0, -column, jnp.where(column > last, 2 * last - column, column))
    velocities = jnp.where(bounced == column, state.velocities, -state.velocities)
    obstacles = jnp.stack([state.obstacles[:, 0], bounced], axis=1)
    state = GridState(agent, state.goal, obstacles, velocities, state.num_steps + 1)
    return state, _judge(config, state)


def _judge(config: GridConfig, state: GridState) -> Transition:
    hit = jnp.any(jnp.all(state.obstacles == state.agent[None], axis=1))
    success = jnp.all(state.agent == state.goal) & ~hit
    reward = jnp.where(hit, _OBSTACLE_REWARD, jnp.where(success, _GOAL_REWARD, 0.0))
    return Transition(
        observation=_OBSERVE[config.observation](config, state),
        reward=reward,
        terminated=hit | success,
        truncated=~(hit | success) & (state.num_steps >= config.max_steps),
        success=success,
    )
