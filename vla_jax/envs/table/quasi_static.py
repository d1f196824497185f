"""Motion of the JAX table's hand and blocks: geometry in place of contact forces.

Fingers stop on top of a block; they push a block that they hit from the side; fingers that close
around the short side of a block hold it; a released block falls straight down. Blocks do not push
each other. At yaw 0 a block's long axis is x and the fingers close along y.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from vla_jax.envs.table import rules
from vla_jax.types import Key

_HALF = rules.BLOCK_HALF_SIZE
TIP = 0.009  # m, from the tool's centre down to the fingertips
_FINGER = rules.FINGER_HALF_THICKNESS
_FINGER_REACH = rules.FINGER_HALF_WIDTH  # margin around a block within which a finger touches it
_FINGER_SPEED = 0.6  # share of the whole opening per step
_GRASP_ALONG, _GRASP_HEIGHT = 0.025, 0.02  # m, greatest distance of fingers that grasp a block
_GRASP_TILT = 0.2  # rad, greatest roll or pitch of fingers that grasp
_CANDIDATES = 32  # random positions per object, of which one is chosen


class HandConfig(Protocol):
    """The options of a table that the motion of the hand depends on."""

    @property
    def step_size(self) -> float:
        """Metres per unit of action and step."""
        ...

    @property
    def turn_size(self) -> float:
        """Radians per unit of action and step."""
        ...


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


def sample_layout(rotated_share: float, key: Key) -> tuple[Array, Array, Array]:
    """Returns random positions of the plate and the blocks that keep their distances.

    Args:
      rotated_share: share of layouts in which every block is rotated, in [0, 1].
      key: consumed.

    Returns:
      plate `[2]`, blocks `[4, 2]` in metres from the table's centre, yaws `[4]` in radians.
    """
    place_key, turned_key, yaw_key = jax.random.split(key, 3)
    spacing = [rules.PLATE_SPACING] + [rules.LAYOUT_SPACING] * rules.NUM_BLOCKS
    points = sample_places(spacing, place_key)
    turned = jax.random.bernoulli(turned_key, rotated_share)
    limit = rules.MAX_YAW
    yaws = jax.random.uniform(yaw_key, (rules.NUM_BLOCKS,), minval=-limit, maxval=limit)
    return points[0], points[1:], yaws * turned


def sample_places(spacing: Sequence[float], key: Key) -> Array:
    """Returns random positions of objects that keep their distances.

    Objects are placed one after another, each at the first of a few random positions that keeps
    its distance from the earlier objects, or at the best of them if none does.

    Args:
      spacing: least distance of the centres of later objects from each object, in metres.
      key: consumed.

    Returns:
      Centres `[num_objects, 2]`, metres from the table's centre.
    """
    half, least = rules.LAYOUT_HALF_SIZE, jnp.array(spacing)
    shape = (len(spacing), _CANDIDATES, 2)
    candidates = jax.random.uniform(key, shape, minval=-half, maxval=half)
    points = candidates[0, :1]
    for i in range(1, len(candidates)):
        distance = jnp.linalg.norm(candidates[i][:, None] - points[None], axis=-1)
        room = jnp.min(distance - least[None, :i], axis=-1)
        first = jnp.argmax(jnp.minimum(room, 0))  # all that have room tie at 0
        points = jnp.concatenate([points, candidates[i, first][None]])
    return points


def settle(state: TableState) -> TableState:
    """Lets every block that is not held fall onto what is below it."""
    height = jnp.where(state.held, state.blocks[:, 2], support(state) + _HALF[2])
    return state._replace(blocks=state.blocks.at[:, 2].set(height))


def move(config: HandConfig, state: TableState, arm: Array) -> tuple[TableState, Array]:
    """Moves the hand and the blocks it pushes or holds; also returns the blocks `[4]` it hit."""
    low, high = jnp.array(rules.WORKSPACE_LOW), jnp.array(rules.WORKSPACE_HIGH)
    limit = jnp.array([rules.MAX_TILT, rules.MAX_TILT, rules.MAX_TOOL_YAW])
    tool = jnp.clip(state.tool + config.step_size * arm[:3], low, high)
    turns = jnp.clip(state.turns + config.turn_size * arm[3:], -limit, limit)
    fingers = _fingers(tool, turns[2], state.opening)
    over = jnp.any(_covers(state, fingers, _FINGER_REACH), axis=0) & ~state.held
    top = state.blocks[:, 2] + _HALF[2]
    from_above = over & (state.tool[2] - TIP > top - 0.004)
    below = state.tool[2] - state.blocks[:, 2] + _HALF[2]  # m from a block's bottom to the tool
    stops = jnp.where(from_above, top + TIP, jnp.where(state.held, support(state) + below, 0))
    tool = tool.at[2].max(jnp.max(stops))
    hit = over & (tool[2] - TIP < top + 0.002)
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


def grip(state: TableState, opens: Array) -> TableState:
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


def environment_state(state: TableState) -> Array:
    """Returns the positions of blocks and plate `[22]`, named in `rules.STATE_NAMES`."""
    turned = jnp.stack([jnp.sin(2 * state.yaws), jnp.cos(2 * state.yaws)], axis=1)
    return jnp.append(jnp.concatenate([state.blocks, turned], axis=1), state.plate)


def proprio(state: TableState) -> Array:
    """Returns the pose of the hand `[8]`, named in `rules.PROPRIO_NAMES`."""
    roll, pitch, yaw = state.turns
    hand = jnp.stack([jnp.sin(yaw), jnp.cos(yaw), roll, pitch, state.opening])
    return jnp.concatenate([state.tool, hand])


def support(state: TableState) -> Array:
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
