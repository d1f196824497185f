"""The JAX table as a `DiscreteEnv`: one choice per step moves an axis, turns, or opens and closes.

Each choice is one action of `table_jax`, whose rules hold: an episode ends with what was asked
for, or with the same done to a wrong block. The fingers keep their last command.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.config import did_you_mean
from vla_jax.envs.table import jax_env, renderer, rules
from vla_jax.envs.table.jax_env import JaxTableConfig, TableState
from vla_jax.types import Array, DiscreteEnv, Env, Key, Observation, Transition

CHOICES = ("stay", "+x", "-x", "+y", "-y", "+z", "-z", "+yaw", "-yaw", "open", "close")
_AXES = {"x": 0, "y": 1, "z": 2, "yaw": 5}  # of the arm's six numbers
_UNIT = 0.1  # m, so that places are numbers near one
_PICTURE = 96  # pixels of a picture for people


@dataclass(frozen=True)
class TableChoicesConfig:
    """The table with choices for actions."""

    kind: Literal["table"] = "table"
    tasks: tuple[str, ...] = ("touch",)  # what may be asked for, of table.TASKS
    shaping: float = 0.0  # reward for each metre nearer to the asked block; 0 = for success alone
    shaping_gamma: float = 0.97  # γ of that reward, the learner's; else the best policy may change
    table: JaxTableConfig = JaxTableConfig(image_size=0)  # sizes of steps; there are no pictures

    def __post_init__(self):
        """Refuses tasks that are none, and pictures that nobody would see."""
        for task in self.tasks:
            if task not in rules.TASKS:
                raise ValueError(f"unknown task '{task}'; {did_you_mean(task, rules.TASKS)}")
        if not self.tasks:
            raise ValueError(f"tasks must hold at least one of {rules.TASKS}, got none.")
        if self.shaping < 0 or not 0 <= self.shaping_gamma <= 1:
            raise ValueError(
                "shaping must be >= 0 and shaping_gamma in [0, 1], got "
                f"{self.shaping} and {self.shaping_gamma}."
            )
        if self.table.image_size:
            raise ValueError(
                f"image_size must be 0, got {self.table.image_size}; what is shown are numbers."
            )


class ChoicesState(NamedTuple):
    """All that one world remembers."""

    table: TableState
    opens: Array  # [] bool, last command of the fingers


@functools.cache  # the same functions for the same config, so that jit compiles them once
def make(config: TableChoicesConfig) -> DiscreteEnv:
    """The table as a `DiscreteEnv`, with `CHOICES` for actions.

    An observation is `environment_state [22]` and `proprio [8]` of the table, with the blocks and
    the plate as seen from the tool and all places in decimetres; then the instruction, one-hot
    among the sentences that `tasks` allow.

    The reward is 1 for success, and with `shaping` w

        w (γ Φ(s′) − Φ(s)),    Φ(s) = −‖tool − block asked for‖,    Φ = 0 at a true end

    which changes how fast the best policy is found, but not which it is.

    Source: Ng, Harada and Russell 1999, "Policy Invariance Under Reward Transformations".
    """
    env = jax_env.make(config.table)
    asked = [i for i, task in enumerate(env.tasks) if task in config.tasks]
    num_visible = rules.STATE_SIZE + rules.PROPRIO_SIZE
    return DiscreteEnv(
        reset=functools.partial(_reset, env, np.array(asked)),
        step=functools.partial(_step, config, env, np.array(asked)),
        draw=draw,
        observation_shape=(num_visible + len(asked),),
        velocities=(),
        num_actions=len(CHOICES),
        max_steps=env.max_steps,
        instruction=tuple(range(num_visible, num_visible + len(asked))),
    )


def draw(state: ChoicesState) -> Array:
    """Returns a picture of the table from in front of it, `[h, w, 3]` uint8."""
    now = state.table
    places = now.tool, now.turns, now.opening, now.blocks, now.yaws, now.plate
    return renderer.paint(*places, image_size=_PICTURE)[0]


def _reset(env: Env, asked: np.ndarray, key: Key) -> tuple[ChoicesState, Array]:
    layout_key, instruction_key = jax.random.split(key)
    state, observation = env.reset(layout_key)
    state = state._replace(instruction=jax.random.choice(instruction_key, asked))
    return ChoicesState(state, jnp.ones((), bool)), _show(state, observation, asked)


def _step(
    config: TableChoicesConfig, env: Env, asked: np.ndarray, state: ChoicesState, choice: Array
) -> tuple[ChoicesState, Transition]:
    choice = jnp.asarray(choice)
    if choice.shape != () or not jnp.issubdtype(choice.dtype, jnp.integer):
        raise ValueError(
            f"action must be one whole number in 0 … {len(CHOICES) - 1} {CHOICES}, got "
            f"{choice.dtype}{list(choice.shape)}; vmap the step over worlds."
        )
    is_open, is_close = (choice == CHOICES.index(name) for name in ("open", "close"))
    opens = is_open | (state.opens & ~is_close)
    action = jnp.append(jnp.asarray(_arms())[choice], jnp.where(opens, 1.0, -1.0))
    now, transition = env.step(state.table, action)
    after = jnp.where(transition.terminated, 0.0, _potential(now))
    nearer = config.shaping_gamma * after - _potential(state.table)
    return ChoicesState(now, opens), transition._replace(
        observation=_show(now, transition.observation, asked),
        reward=transition.reward + config.shaping * nearer,
    )


def _arms() -> np.ndarray:
    """Returns the arm command of each choice, `[11, 6]`."""
    arms = np.zeros((len(CHOICES), 6), np.float32)
    for i, name in enumerate(CHOICES):
        if name[1:] in _AXES:
            arms[i, _AXES[name[1:]]] = float(f"{name[0]}1")
    return arms


def _potential(state: TableState) -> Array:
    block = state.blocks[state.instruction % rules.NUM_BLOCKS]
    return -jnp.linalg.norm(state.tool - block)


def _show(state: TableState, observation: Observation, asked: np.ndarray) -> Array:
    tool = state.tool[None]
    turned = jnp.stack([jnp.sin(2 * state.yaws), jnp.cos(2 * state.yaws)], axis=1)
    blocks = jnp.concatenate([(state.blocks - tool) / _UNIT, turned], axis=1)
    parts: list[Any] = [
        blocks.reshape(-1),
        (state.plate - state.tool[:2]) / _UNIT,
        state.tool / _UNIT,
        jnp.asarray(observation.proprio)[3:],
        state.instruction == asked,
    ]
    return jnp.concatenate([jnp.asarray(part, jnp.float32) for part in parts])
