"""The table as pure JAX functions: thousands of environments in parallel.

It is the quasi-static counterpart of `table_mujoco`: same instructions, layouts, actions,
observations and rules, with geometry instead of contact forces. Fingers stop on top of a block;
they push a block that they hit from the side; fingers that close around the short side of a block
hold it; a released block falls straight down. Blocks do not push each other. At yaw 0 a block's
long axis is x and the fingers close along y.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vla_jax.config import checked
from vla_jax.envs.table import expert, renderer, rules
from vla_jax.envs.table.table_config import TableConfig
from vla_jax.types import Env, Key, Observation, Transition

_HALF = rules.BLOCK_HALF_SIZE
_TIP = 0.009  # m, from the tool's centre down to the fingertips
_FINGER = rules.FINGER_HALF_THICKNESS
_FINGER_REACH = rules.FINGER_HALF_WIDTH  # margin around a block within which a finger touches it
_FINGER_SPEED = 0.6  # share of the whole opening per step
_GRASP_ALONG, _GRASP_HEIGHT = 0.025, 0.02  # m, greatest distance of fingers that grasp a block
_GRASP_TILT = 0.2  # rad, greatest roll or pitch of fingers that grasp
_CANDIDATES = 32  # random positions per block, of which one is chosen


@dataclass(frozen=True)
@checked()
class JaxTableConfig(TableConfig):
    """The JAX table; it is hundreds of times slower with images than without."""

    kind: Literal["table_jax"] = "table_jax"


class TableState(NamedTuple):
    """State of one environment; metres from the table's centre, radians."""

    tool: Array  # [3] x y z of the point between the fingers
    turns: Array  # [3] roll pitch yaw of the hand; 0 = pointing straight down
    opening: Array  # [] from 0 = closed to 1 = MAX_OPENING
    blocks: Array  # [4, 3] centres
    yaws: Array  # [4]
    held: Array  # [4] bool, the block between the fingers (at most one)
    plate: Array  # [2] centre
    instruction: Array  # [] int32 into INSTRUCTIONS
    num_steps: Array  # [] int32


@functools.cache  # the same functions for the same config, so that jit compiles them once
def make(config: JaxTableConfig) -> Env:
    """Returns the table as an `Env`.

    Observations are those of `table_mujoco`: `environment_state [22]` and `proprio [8]` (names in
    `rules.STATE_NAMES` and `rules.PROPRIO_NAMES`), and two images if `image_size > 0`. They do not
    contain the instruction: `instruction_index` returns it, and the caller decides when the policy
    sees it.
    """
    return Env(
        reset=functools.partial(_reset, config),
        step=functools.partial(_step, config),
        expert=functools.partial(_expert, config),
        instructions=tuple(instruction.text for instruction in rules.INSTRUCTIONS),
        tasks=tuple(instruction.task for instruction in rules.INSTRUCTIONS),
        instruction_index=lambda state: state.instruction,
        max_steps=config.max_steps,
    )


def _reset(config: JaxTableConfig, key: Key) -> tuple[TableState, Observation]:
    layout_key, tool_key, instruction_key = jax.random.split(key, 3)
    plate, places, yaws = sample_layout(config.rotated_share, layout_key)
    low, high = jnp.array([-0.06, -0.06, 0.16]), jnp.array([0.06, 0.06, 0.20])
    state = TableState(
        tool=jax.random.uniform(tool_key, (3,), minval=low, maxval=high),
        turns=jnp.zeros(3),
        opening=jnp.ones(()),
        blocks=jnp.pad(places, ((0, 0), (0, 1)), constant_values=_HALF[2]),
        yaws=yaws,
        held=jnp.zeros(rules.NUM_BLOCKS, bool),
        plate=plate,
        instruction=jax.random.randint(instruction_key, (), 0, len(rules.INSTRUCTIONS)),
        num_steps=jnp.zeros((), jnp.int32),
    )
    return state, _observe(config, state)


def sample_layout(rotated_share: float, key: Key) -> tuple[Array, Array, Array]:
    """Returns random positions of the plate and the blocks that keep their distances.

    Objects are placed one after another, each at the first of a few random positions that keeps
    its distance from the earlier objects, or at the best of them if none does.

    Args:
      rotated_share: share of layouts in which every block is rotated, in [0, 1].
      key: consumed.

    Returns:
      plate `[2]`, blocks `[4, 2]` in metres from the table's centre, yaws `[4]` in radians.
    """
    place_key, turned_key, yaw_key = jax.random.split(key, 3)
    half = rules.LAYOUT_HALF_SIZE
    shape = (1 + rules.NUM_BLOCKS, _CANDIDATES, 2)
    candidates = jax.random.uniform(place_key, shape, minval=-half, maxval=half)
    spacing = jnp.array([rules.PLATE_SPACING] + [rules.LAYOUT_SPACING] * rules.NUM_BLOCKS)
    points = candidates[0, :1]
    for i in range(1, len(candidates)):
        distance = jnp.linalg.norm(candidates[i][:, None] - points[None], axis=-1)
        room = jnp.min(distance - spacing[None, :i], axis=-1)
        first = jnp.argmax(jnp.minimum(room, 0))  # all that have room tie at 0
        points = jnp.concatenate([points, candidates[i, first][None]])
    turned = jax.random.bernoulli(turned_key, rotated_share)
    limit = rules.MAX_YAW
    yaws = jax.random.uniform(yaw_key, (rules.NUM_BLOCKS,), minval=-limit, maxval=limit)
    return points[0], points[1:], yaws * turned


def _step(
    config: JaxTableConfig, state: TableState, action: Array | np.ndarray
) -> tuple[TableState, Transition]:
    if action.shape != (7,):
        raise ValueError(
            f"action must be 7 numbers {rules.ACTION_NAMES}, got shape {action.shape}; "
            "vmap the step over environments."
        )
    action = jnp.clip(action, -1, 1)
    state, hit = _move(config, state, action[:6])
    state = _grip(state, action[6] > 0)
    blocks = state.blocks.at[:, 2].set(
        jnp.where(state.held, state.blocks[:, 2], _support(state) + _HALF[2])
    )
    state = state._replace(blocks=blocks, num_steps=state.num_steps + 1)
    return state, _judge(config, state, hit | state.held)


def _move(config: JaxTableConfig, state: TableState, arm: Array) -> tuple[TableState, Array]:
    """Moves the hand and the blocks it pushes or holds; also returns the blocks `[4]` it hit."""
    low, high = jnp.array(rules.WORKSPACE_LOW), jnp.array(rules.WORKSPACE_HIGH)
    limit = jnp.array([rules.MAX_TILT, rules.MAX_TILT, rules.MAX_TOOL_YAW])
    tool = jnp.clip(state.tool + config.step_size * arm[:3], low, high)
    turns = jnp.clip(state.turns + config.turn_size * arm[3:], -limit, limit)
    fingers = _fingers(tool, turns[2], state.opening)
    over = jnp.any(_covers(state, fingers, _FINGER_REACH), axis=0) & ~state.held
    top = state.blocks[:, 2] + _HALF[2]
    from_above = over & (state.tool[2] - _TIP > top - 0.004)
    below = state.tool[2] - state.blocks[:, 2] + _HALF[2]  # m from a block's bottom to the tool
    stops = jnp.where(from_above, top + _TIP, jnp.where(state.held, _support(state) + below, 0))
    tool = tool.at[2].max(jnp.max(stops))
    hit = over & (tool[2] - _TIP < top + 0.002)
    pushed = state.blocks.at[:, :2].add((tool - state.tool)[None, :2])
    pushed = pushed.at[:, :2].set(jnp.clip(pushed[:, :2], low[None, :2], high[None, :2]))
    blocks = jnp.where((hit & ~from_above)[:, None], pushed, state.blocks)
    blocks = jnp.where(state.held[:, None], _carried(state, tool, turns[2]), blocks)
    yaws = jnp.where(state.held, turns[2], state.yaws)
    return state._replace(tool=tool, turns=turns, blocks=blocks, yaws=yaws), hit


def _carried(state: TableState, tool: Array, yaw: Array) -> Array:
    """Returns the positions `[4, 3]` of the blocks if held by a hand at `tool`."""
    centred = _in_hand_frame(state) * jnp.array([[1.0, 0.0]])  # the fingers close along y
    offset = jnp.concatenate([_rotate(centred, yaw), state.blocks[:, 2:] - state.tool[2]], axis=1)
    return tool[None] + offset


def _grip(state: TableState, opens: Array) -> TableState:
    """Opens or closes the fingers; they stop at a block, and hold it if they fit around it.

    A block of length a and width b at the angle θ needs an opening of a·|sin θ| + b·|cos θ|.
    """
    local, turn = _in_hand_frame(state), state.yaws - state.turns[2]
    width = 2 * (_HALF[0] * jnp.abs(jnp.sin(turn)) + _HALF[1] * jnp.abs(jnp.cos(turn)))
    between = (
        (jnp.abs(local[:, 0]) < _GRASP_ALONG)
        & (jnp.abs(local[:, 1]) < state.opening * rules.MAX_OPENING / 2)
        & (jnp.abs(state.tool[2] - state.blocks[:, 2]) < _GRASP_HEIGHT)
        & jnp.all(jnp.abs(state.turns[:2]) < _GRASP_TILT)
    )
    least = jnp.max(jnp.where(between, jnp.minimum(width / rules.MAX_OPENING, state.opening), 0))
    closed = jnp.maximum(state.opening - _FINGER_SPEED, least)
    opened = jnp.minimum(state.opening + _FINGER_SPEED, 1.0)
    grasped = between & (width < rules.MAX_OPENING) & (closed <= least)
    # at most one block: the one that is held already, if any
    best = jnp.argmax(grasped + 2 * state.held)
    held = (state.held | grasped) & (jnp.arange(rules.NUM_BLOCKS) == best) & ~opens
    return state._replace(opening=jnp.where(opens, opened, closed), held=held)


def _judge(config: JaxTableConfig, state: TableState, touching: Array) -> Transition:
    """Returns the transition; doing the task with a wrong block also terminates the episode."""
    task, target = jnp.divmod(state.instruction, rules.NUM_BLOCKS)
    height = state.blocks[:, 2] - _HALF[2]
    away = jnp.linalg.norm(state.blocks[:, :2] - state.plate[None], axis=-1)
    placed = (away < rules.PLACE_DISTANCE) & (height < 0.02) & ~touching
    done = jnp.stack([touching, height > rules.LIFT_HEIGHT, placed])[task]
    success, terminated = done[target], jnp.any(done)
    return Transition(
        observation=_observe(config, state),
        reward=success.astype(jnp.float32),
        terminated=terminated,
        truncated=~terminated & (state.num_steps >= config.max_steps),
        success=success,
    )


def _observe(config: JaxTableConfig, state: TableState) -> Observation:
    primary = wrist = None
    if config.image_size:
        primary, wrist = renderer.render(
            state.tool, state.turns, state.opening, state.blocks, state.yaws, state.plate,
            image_size=config.image_size,
        )  # fmt: skip
    return Observation(primary, wrist, _proprio(state), _environment_state(state))


def _environment_state(state: TableState) -> Array:
    turned = jnp.stack([jnp.sin(2 * state.yaws), jnp.cos(2 * state.yaws)], axis=1)
    return jnp.append(jnp.concatenate([state.blocks, turned], axis=1), state.plate)


def _proprio(state: TableState) -> Array:
    roll, pitch, yaw = state.turns
    hand = jnp.stack([jnp.sin(yaw), jnp.cos(yaw), roll, pitch, state.opening])
    return jnp.concatenate([state.tool, hand])


def _expert(config: JaxTableConfig, state: TableState) -> Array:
    task, target = jnp.divmod(state.instruction, rules.NUM_BLOCKS)
    return expert.act(
        _environment_state(state),
        _proprio(state),
        task,
        target,
        step_size=config.step_size,
        turn_size=config.turn_size,
    )


def _support(state: TableState) -> Array:
    """Returns the height `[4]` of the surface below each block: table, plate or another block."""
    on_plate = jnp.linalg.norm(state.blocks[:, :2] - state.plate[None], axis=-1)
    ground = jnp.where(on_plate < rules.PLATE_RADIUS, rules.PLATE_HEIGHT, 0.0)
    over = _covers(state, state.blocks[:, :2], _HALF[1])
    lower = state.blocks[:, None, 2] - state.blocks[None, :, 2] > 0.75 * 2 * _HALF[2]
    tops = jnp.where(over & lower, state.blocks[None, :, 2] + _HALF[2], 0.0)
    return jnp.maximum(ground, jnp.max(tops, axis=1))


def _covers(state: TableState, points: Array, margin: float) -> Array:
    """Returns `[Q, 4]` bool: points `[Q, 2]` inside the blocks' footprints grown by `margin`."""
    apart = points[:, None] - state.blocks[None, :, :2]
    local = jnp.abs(_rotate(apart, -state.yaws[None]))
    return jnp.all(local < jnp.array(_HALF[:2])[None, None] + margin, axis=-1)


def _fingers(tool: Array, yaw: Array, opening: Array) -> Array:
    """Returns the horizontal positions `[2, 2]` of the two fingers."""
    reach = opening * rules.MAX_OPENING / 2 + _FINGER
    sides = jnp.stack([jnp.zeros(2), jnp.array([-1.0, 1.0]) * reach], axis=1)
    return tool[None, :2] + _rotate(sides, yaw)


def _in_hand_frame(state: TableState) -> Array:
    """Returns block centres `[4, 2]` in the hand's frame: y along the opening, x across it."""
    return _rotate(state.blocks[:, :2] - state.tool[None, :2], -state.turns[2])


def _rotate(points: Array, angle: Array) -> Array:
    """Returns points `[..., 2]` rotated by `angle`, radians, which broadcasts to `[...]`."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return jnp.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)
