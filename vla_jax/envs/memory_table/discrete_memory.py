"""The memory table with discrete actions: each moves the tool, or opens or closes the gripper.

Each discrete action is one action of `memory_env`, whose rules apply. The gripper keeps its last
command; it has no actions in tasks that do not use it.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from vla_jax.config import checked
from vla_jax.envs.memory_table import memory_env, memory_rules, memory_state, scenery, tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_task import INSTRUCTION_STEPS, MemoryState
from vla_jax.envs.table import discrete_table, rules
from vla_jax.types import Array, DiscreteEnv, Env, Key, Observation, Transition

MOVES = ("stay", "+x", "-x", "+y", "-y", "+z", "-z")
GRIPS = ("open", "close")
_UNIT = 0.1  # m, so that positions are numbers near one
_DRAWN_SIZE = 96  # pixels along each side of the image of `draw`


@dataclass(frozen=True)
@checked()
class MemoryChoicesConfig:
    """A memory task on the JAX table, with discrete actions."""

    kind: Literal["memory"] = "memory"
    shaping: float = 0.0  # reward per metre of approach to the block; 0 = success only
    shaping_gamma: float = 0.97  # discount factor of the shaping reward: the learner's γ
    table: JaxMemoryConfig = JaxMemoryConfig()  # task and difficulty, without images

    def __post_init__(self):
        """Checks the shaping and the image size."""
        if self.shaping < 0 or not 0 <= self.shaping_gamma <= 1:
            raise ValueError(
                "shaping must be >= 0 and shaping_gamma in [0, 1], got "
                f"{self.shaping} and {self.shaping_gamma}."
            )
        if self.shaping and not tasks.get(self.table.task).ends_at_block:
            shaped = [name for name, task in tasks.TASKS.items() if task.ends_at_block]
            raise ValueError(
                f"shaping must be 0 for task '{self.table.task}', got {self.shaping}; only "
                f"{', '.join(shaped)} have one block to approach."
            )
        if self.table.image_size:
            raise ValueError(
                f"image_size must be 0, got {self.table.image_size}; observations are features."
            )


class MemoryChoicesState(NamedTuple):
    """State of one environment."""

    memory: MemoryState
    opens: Array  # [] bool, last gripper command


def choices(config: MemoryChoicesConfig) -> tuple[str, ...]:
    """Returns the names of the actions."""
    return MOVES + GRIPS if tasks.get(config.table.task).uses_gripper else MOVES


@functools.cache  # the same functions for the same config, so that jit compiles them once
def make(config: MemoryChoicesConfig) -> DiscreteEnv:
    """Returns a memory table as a `DiscreteEnv` with the actions `choices`.

    An observation is `environment_state [52]` and `proprio [8]` of the memory table, with positions
    in decimetres, those of visible blocks relative to the tool; then the one-hot sentence. Where
    sentences differ, only the first `INSTRUCTION_STEPS` observations have it, and the others zeros;
    a task that has only one sentence keeps it.

    The reward is 1 for success; `shaping` w adds, as for the table,

        w (γ Φ(s′) − Φ(s)),    Φ(s) = −‖tool − block of the cue‖,    Φ(terminal) = 0

    Source: Ng, Harada and Russell 1999, "Policy Invariance Under Reward Transformations".
    """
    env = memory_env.make(config.table)
    num_visible = len(memory_state.STATE_NAMES) + rules.PROPRIO_SIZE
    num_sentences = len(_sentences(env))
    return DiscreteEnv(
        reset=functools.partial(_reset, env),
        step=functools.partial(_step, config, env),
        draw=functools.partial(draw, config.table),
        observation_shape=(num_visible + num_sentences,),
        velocities=(),
        num_actions=len(choices(config)),
        max_steps=env.max_steps,
        instruction=tuple(range(num_visible, num_visible + num_sentences)),
        cue=tuple(map(memory_state.STATE_NAMES.index, tasks.get(config.table.task).shown_by)),
    )


def draw(config: JaxMemoryConfig, state: MemoryChoicesState) -> Array:
    """Returns the primary camera's image `[h, w, 3]` uint8, with all that is visible of the task.

    Args:
      config: of the memory table.
      state: of one environment.
    """
    display = memory_rules.display(config, state.memory)
    has_dots = tasks.get(config.task).has_dots
    return scenery.pictures(state.memory, display, image_size=_DRAWN_SIZE, has_dots=has_dots)[0]


def _reset(env: Env, key: Key) -> tuple[MemoryChoicesState, Array]:
    memory, observation = env.reset(key)
    return MemoryChoicesState(memory, jnp.ones((), bool)), _observe(env, memory, observation)


def _step(
    config: MemoryChoicesConfig, env: Env, state: MemoryChoicesState, choice: Array
) -> tuple[MemoryChoicesState, Transition]:
    names, choice = choices(config), jnp.asarray(choice)
    if choice.shape != () or not jnp.issubdtype(choice.dtype, jnp.integer):
        raise ValueError(
            f"action must be one integer in 0 … {len(names) - 1} {names}, got "
            f"{choice.dtype}{list(choice.shape)}; vmap the step over environments."
        )
    is_open, is_close = (choice == len(MOVES) + i for i in range(len(GRIPS)))
    opens = is_open | (state.opens & ~is_close)
    arms = np.stack([discrete_table.arm(name) for name in names])
    action = jnp.append(jnp.asarray(arms)[choice], jnp.where(opens, 1.0, -1.0))
    memory, transition = env.step(state.memory, action)
    potential = jnp.where(transition.terminated, 0.0, _potential(memory))
    shaping = config.shaping_gamma * potential - _potential(state.memory)
    return MemoryChoicesState(memory, opens), transition._replace(
        observation=_observe(env, memory, transition.observation),
        reward=transition.reward + config.shaping * shaping,
    )


def _potential(state: MemoryState) -> Array:
    return -jnp.linalg.norm(state.table.tool - state.table.blocks[state.cue.colour])


def _sentences(env: Env) -> tuple[str, ...]:
    """Returns each sentence once, since instructions tell groups of results too, which are cues."""
    return tuple(dict.fromkeys(env.instructions))


def _sentence(env: Env, state: MemoryState) -> Array:
    """Returns the one-hot sentence, or zeros where it is not visible any more."""
    sentences = _sentences(env)
    numbers = jnp.array([sentences.index(sentence) for sentence in env.instructions])
    is_visible = (state.table.num_steps < INSTRUCTION_STEPS) | (len(sentences) == 1)
    return is_visible & (numbers[env.instruction_index(state)] == jnp.arange(len(sentences)))


def _observe(env: Env, state: MemoryState, observation: Observation) -> Array:
    """Returns the observation; a block or plate that cannot be seen is still all zeros."""
    visible, proprio = jnp.asarray(observation.environment_state), jnp.asarray(observation.proprio)
    num_blocks = rules.NUM_BLOCKS
    seen = visible[rules.STATE_SIZE : rules.STATE_SIZE + num_blocks, None]
    blocks = visible[: rules.STATE_SIZE - 2].reshape(num_blocks, -1)
    is_light = 1 - visible[memory_state.STATE_NAMES.index("dark")]
    relative = seen * (blocks[:, :3] - proprio[None, :3]) / _UNIT
    parts = (
        jnp.concatenate([relative, blocks[:, 3:]], axis=1).reshape(-1),
        (visible[rules.STATE_SIZE - 2 : rules.STATE_SIZE] - proprio[:2]) / _UNIT * is_light,
        visible[rules.STATE_SIZE :],
        proprio[:3] / _UNIT,
        proprio[3:],
        _sentence(env, state),
    )
    return jnp.concatenate([jnp.asarray(part, jnp.float32) for part in parts])
