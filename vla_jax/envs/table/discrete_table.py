"""The JAX table with discrete actions: each moves or rotates the tool, or opens or closes it.

Each discrete action is one action of `table_jax`, whose rules apply: an episode ends when the task
is done, with the right or a wrong block. The gripper keeps its last command.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.config import check_names, checked
from vla_jax.envs.table import jax_env, renderer, rules
from vla_jax.envs.table.jax_env import JaxTableConfig
from vla_jax.envs.table.quasi_static import TableState
from vla_jax.types import Array, DiscreteEnv, Env, Key, Observation, Transition

CHOICES = ("stay", "+x", "-x", "+y", "-y", "+z", "-z", "+yaw", "-yaw", "open", "close")
_AXES = {"x": 0, "y": 1, "z": 2, "yaw": 5}  # of the arm's six numbers
_UNIT = 0.1  # m, so that positions are numbers near one
_DRAWN_SIZE = 96  # pixels along each side of the image of `draw`


@dataclass(frozen=True)
@checked()
class TableChoicesConfig:
    """The JAX table with discrete actions."""

    kind: Literal["table"] = "table"
    tasks: tuple[str, ...] = ("touch",)  # tasks of an episode: touch, lift, place
    shaping: float = 0.0  # reward per metre of approach to the block; 0 = success only
    shaping_gamma: float = 0.97  # discount factor of the shaping reward: the learner's γ
    table: JaxTableConfig = JaxTableConfig(image_size=0)  # options of the table, without images

    def __post_init__(self):
        """Checks the tasks, the shaping and the image size."""
        check_names("tasks", self.tasks, rules.TASKS)
        if not self.tasks:
            raise ValueError(f"tasks must hold at least one of {rules.TASKS}, got none.")
        if self.shaping < 0 or not 0 <= self.shaping_gamma <= 1:
            raise ValueError(
                "shaping must be >= 0 and shaping_gamma in [0, 1], got "
                f"{self.shaping} and {self.shaping_gamma}."
            )
        if self.table.image_size:
            raise ValueError(
                f"image_size must be 0, got {self.table.image_size}; observations are features."
            )


class ChoicesState(NamedTuple):
    """State of one environment."""

    table: TableState
    opens: Array  # [] bool, last gripper command


@functools.cache  # the same functions for the same config, so that jit compiles them once
def make(config: TableChoicesConfig) -> DiscreteEnv:
    """Returns the table as a `DiscreteEnv` with the actions `CHOICES`.

    An observation is `environment_state [22]` and `proprio [8]` of the table, with positions of
    blocks and plate relative to the tool, in decimetres; then the one-hot instruction among those
    of `config.tasks`.

    The reward is 1 for success, and with `shaping` w

        w (γ Φ(s′) − Φ(s)),    Φ(s) = −‖tool − block of the instruction‖,    Φ(terminal) = 0

    which speeds up learning and leaves the optimal policy unchanged.

    Source: Ng, Harada and Russell 1999, "Policy Invariance Under Reward Transformations".
    """
    env = jax_env.make(config.table)
    allowed = [i for i, task in enumerate(env.tasks) if task in config.tasks]
    num_visible = rules.STATE_SIZE + rules.PROPRIO_SIZE
    return DiscreteEnv(
        reset=functools.partial(_reset, env, np.array(allowed)),
        step=functools.partial(_step, config, env, np.array(allowed)),
        draw=draw,
        observation_shape=(num_visible + len(allowed),),
        velocities=(),
        num_actions=len(CHOICES),
        max_steps=env.max_steps,
        instruction=tuple(range(num_visible, num_visible + len(allowed))),
    )


def draw(state: ChoicesState) -> Array:
    """Returns the primary camera's image of the table, `[h, w, 3]` uint8."""
    table = state.table
    poses = table.tool, table.turns, table.opening, table.blocks, table.yaws, table.plate
    return renderer.render(*poses, image_size=_DRAWN_SIZE)[0]


def _reset(env: Env, allowed: np.ndarray, key: Key) -> tuple[ChoicesState, Array]:
    layout_key, instruction_key = jax.random.split(key)
    state, observation = env.reset(layout_key)
    state = state._replace(instruction=jax.random.choice(instruction_key, allowed))
    return ChoicesState(state, jnp.ones((), bool)), _observe(state, observation, allowed)


def _step(
    config: TableChoicesConfig, env: Env, allowed: np.ndarray, state: ChoicesState, choice: Array
) -> tuple[ChoicesState, Transition]:
    choice = jnp.asarray(choice)
    if choice.shape != () or not jnp.issubdtype(choice.dtype, jnp.integer):
        raise ValueError(
            f"action must be one integer in 0 … {len(CHOICES) - 1} {CHOICES}, got "
            f"{choice.dtype}{list(choice.shape)}; vmap the step over environments."
        )
    is_open, is_close = (choice == CHOICES.index(name) for name in ("open", "close"))
    opens = is_open | (state.opens & ~is_close)
    action = jnp.append(
        jnp.asarray(np.stack([arm(name) for name in CHOICES]))[choice], jnp.where(opens, 1.0, -1.0)
    )
    table, transition = env.step(state.table, action)
    potential = jnp.where(transition.terminated, 0.0, _potential(table))
    shaping = config.shaping_gamma * potential - _potential(state.table)
    return ChoicesState(table, opens), transition._replace(
        observation=_observe(table, transition.observation, allowed),
        reward=transition.reward + config.shaping * shaping,
    )


def arm(choice: str) -> np.ndarray:
    """Returns the arm command `[6]` of a choice; zeros for those that do not move the arm."""
    command = np.zeros(6, np.float32)
    if choice[1:] in _AXES:
        command[_AXES[choice[1:]]] = float(f"{choice[0]}1")
    return command


def _potential(state: TableState) -> Array:
    block = state.blocks[state.instruction % rules.NUM_BLOCKS]
    return -jnp.linalg.norm(state.tool - block)


def _observe(state: TableState, observation: Observation, allowed: np.ndarray) -> Array:
    tool = state.tool[None]
    rotation = jnp.stack([jnp.sin(2 * state.yaws), jnp.cos(2 * state.yaws)], axis=1)
    blocks = jnp.concatenate([(state.blocks - tool) / _UNIT, rotation], axis=1)
    parts: list[Any] = [
        blocks.reshape(-1),
        (state.plate - state.tool[:2]) / _UNIT,
        state.tool / _UNIT,
        jnp.asarray(observation.proprio)[3:],
        state.instruction == allowed,
    ]
    return jnp.concatenate([jnp.asarray(part, jnp.float32) for part in parts])
