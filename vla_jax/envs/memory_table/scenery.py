"""Objects that the memory tasks add to the table, for the pictures of both twins.

All are upright cylinders: the lamp, the button, the marker, the cups and, where the task has them,
the dots. Cups are alike and drawn by place, so that a picture tells nothing about what is below.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from vla_jax.envs.memory_table import motions
from vla_jax.envs.memory_table.dots import dots
from vla_jax.envs.memory_table.memory_task import NUM_CUPS, Display, MemoryState
from vla_jax.envs.table import renderer, rules
from vla_jax.envs.table.renderer import Cylinders

FAR = 9.0  # m, place of blocks that are not on the table
_BELOW = -9.0  # m, height of objects that are absent: the table hides them
_IN_THE_AIR = motions.CUP_HEIGHT + 0.01  # m, height of cups that pass over the other cups
_LAMP_PLACE = (-0.25, 0.20)  # m, at the far edge, beside the arm
_LAMP_OFF = 0.12  # brightness of a lamp that is off
_BUTTON, _CUP = (0.75, 0.08, 0.10), (0.46, 0.50, 0.60)  # rgb in [0, 1]
_MARKER, _DOT = (0.90, 0.15, 0.75), (0.22, 0.22, 0.25)
_LIT = 0.6  # share of white in the colour of a lit block
NUM_FIXED = 3 + NUM_CUPS  # cylinders of every task: lamp, button, marker, cups
# radius and height in m; a dot is a little higher than the plate, which may lie below it
_SIZES = (
    (0.035, 0.050),
    (motions.BUTTON_RADIUS, motions.BUTTON_HEIGHT),
    (0.014, 0.035),
    *[(motions.CUP_RADIUS, motions.CUP_HEIGHT)] * NUM_CUPS,
    *[(0.012, rules.PLATE_HEIGHT + 0.002)] * len(dots()),
)


def sizes(has_dots: bool) -> np.ndarray:
    """Returns radius and height of the cylinders `[n, 2]` in metres."""
    return np.array(_SIZES if has_dots else _SIZES[:NUM_FIXED], np.float32)


def cylinders(display: Display, *, has_dots: bool) -> Cylinders:
    """Returns the cylinders of a display; absent ones are far below the table.

    Args:
      display: of one environment.
      has_dots: whether the task has dots on the table.
    """
    lamp = jnp.maximum(display.lamp, _LAMP_OFF)
    places = [
        _standing(jnp.array([_LAMP_PLACE])),
        _standing(display.button[None]),
        jnp.append(display.marker[:2], jnp.where(display.marker[2] > 0, 0.0, _BELOW))[None],
        _standing(display.cups, jnp.where(display.cups_up, _IN_THE_AIR, 0.0)),
    ]
    colours = [lamp[None], jnp.array([_BUTTON, _MARKER]), jnp.array([_CUP] * NUM_CUPS)]
    if has_dots:
        places.append(jnp.pad(jnp.asarray(dots(), jnp.float32), ((0, 0), (0, 1))))
        colours.append(jnp.array([_DOT] * len(dots())))
    size = sizes(has_dots)
    return Cylinders(
        centre=jnp.concatenate(places),
        radius=jnp.asarray(size[:, 0]),
        height=jnp.asarray(size[:, 1]),
        colour=jnp.concatenate(colours),
    )


def light_up(colours: Array, lit: Array) -> Array:
    """Returns the colours `[4, 3]` of the blocks; those that are lit, `[4]` bool, are brighter."""
    return colours + _LIT * lit[:, None] * (1 - colours)


def pictures(
    state: MemoryState, display: Display, *, image_size: int, has_dots: bool
) -> tuple[Array, Array]:
    """Returns the JAX table's images of both cameras, each `[h, w, 3]` uint8, black in the dark.

    Args:
      state: of one environment.
      display: what is visible of it.
      image_size: pixels along each side.
      has_dots: whether the task has dots on the table.
    """
    table = state.table
    absent = jnp.array([[FAR, FAR, rules.BLOCK_HALF_SIZE[2]]])
    images = renderer.render(
        table.tool,
        table.turns,
        table.opening,
        jnp.where(display.seen[:, None], table.blocks, absent),
        table.yaws,
        table.plate,
        image_size=image_size,
        block_colours=light_up(jnp.array(renderer.BLOCK_COLOURS), display.lit),
        cylinders=cylinders(display, has_dots=has_dots),
    )
    primary, wrist = (jnp.where(display.dark, jnp.uint8(0), image) for image in images)
    return primary, wrist


def _standing(places: Array, height: Array | float = 0.0) -> Array:
    """Returns places `[n, 2]` at a height `[n]` as `[n, 3]`; zeros stand for absent objects."""
    exists = jnp.any(places != 0, axis=1)
    return jnp.append(places, jnp.where(exists, height, _BELOW)[:, None], axis=1)
