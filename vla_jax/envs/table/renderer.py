"""Ray-cast images of the JAX table: boxes, cylinders, plate and table, from two cameras.

The camera poses are those of the MuJoCo table (`scene`). Soft shadows, cast straight down, show
the height of the hand. Everything is computed on planes `[h, w]`, which XLA fuses into one
loop over the pixels; arrays `[h, w, 3]` and matrix products were many times slower.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vla_jax.actions.rotations import euler_to_matrix
from vla_jax.envs.table import rules

BLOCK_COLOURS = ((0.95, 0.20, 0.20), (0.16, 0.74, 0.28), (0.20, 0.40, 0.96), (0.98, 0.85, 0.13))
_WOOD, _FLOOR, _PLATE, _RIM = (0.80, 0.70, 0.59), (0.86, 0.88, 0.91), (0.98,) * 3, (0.84,) * 3
_FINGER_SHADE, _PALM_SHADE, _WRIST_SHADE = (0.20, 0.20, 0.22), (0.35, 0.36, 0.40), (0.88, 0.88, 0.9)
_LIGHT = (0.35, -0.25, 0.90)  # direction towards the light
_AMBIENT = 0.55  # brightness of a side without direct light
# position (m, from the table's centre or the tool), right, up, vertical field of view (degrees)
_PRIMARY = (*rules.PRIMARY_CAMERA, rules.PRIMARY_FOVY)
_WRIST = ((0.07, 0.0, 0.098), (0.0, -1.0, 0.0), (0.97, 0.0, -0.22), rules.WRIST_FOVY)


class _Boxes(NamedTuple):
    """Boxes of the scene: blocks, fingers, palm, wrist."""

    centre: Array  # [M, 3] m
    rotation: Array  # [M, 3, 3] from the box's frame into the table's
    half_size: Array  # [M, 3] m
    colour: Array  # [M, 3] in [0, 1]


class Cylinders(NamedTuple):
    """Further objects of a scene: upright cylinders, which cast no shadows."""

    centre: Array  # [n, 3] m, of the bottom
    radius: Array  # [n] m
    height: Array  # [n] m
    colour: Array  # [n, 3] in [0, 1]


def render(
    tool: Array,
    turns: Array,
    opening: Array,
    blocks: Array,
    yaws: Array,
    plate: Array,
    *,
    image_size: int,
    block_colours: Array | None = None,
    cylinders: Cylinders | None = None,
) -> tuple[Array, Array]:
    """Returns the images of the camera in front of the table and of the camera on the hand.

    Args:
      tool: point between the fingers `[3]`, metres from the table's centre.
      turns: roll, pitch, yaw of the hand `[3]`, radians.
      opening: opening of the fingers `[]`, in [0, 1].
      blocks: centres `[4, 3]`, metres.
      yaws: angles of the blocks `[4]`, radians.
      plate: centre `[2]`, metres.
      image_size: pixels along each side.
      block_colours: `[4, 3]` in [0, 1]; None = `BLOCK_COLOURS`.
      cylinders: further objects; None = none.

    Returns:
      image_primary and image_wrist, each `[h, w, 3]` uint8.
    """
    hand = euler_to_matrix(turns)
    boxes = _boxes(tool, hand, opening, blocks, yaws)
    if block_colours is not None:
        boxes = boxes._replace(colour=boxes.colour.at[: rules.NUM_BLOCKS].set(block_colours))
    cameras = (
        (jnp.array(_PRIMARY[0]), _rays(_PRIMARY, image_size)),
        (tool + hand @ jnp.array(_WRIST[0]), _turned(hand, _rays(_WRIST, image_size))),
    )
    origins, rays = jax.tree.map(lambda *parts: jnp.stack(parts), *cameras)
    primary, wrist = jax.vmap(lambda o, r: _look(o, r, boxes, tool, plate, cylinders))(
        origins, rays
    )
    return primary, wrist


def _look(origin, rays, boxes, tool, plate, cylinders):
    """Returns the image `[h, w, 3]` uint8 of a camera at `origin`; `rays` are three planes."""
    image = _ground(origin, rays, boxes, tool, plate)
    image, _ = jax.lax.scan(lambda i, box: (_draw(i, origin, rays, box), None), image, boxes)
    if cylinders is not None:
        image, _ = jax.lax.scan(
            lambda i, each: (_draw_cylinder(i, origin, rays, each), None), image, cylinders
        )
    return jnp.round(255 * jnp.clip(jnp.stack(image[1:], axis=-1), 0, 1)).astype(jnp.uint8)


def _rays(camera: tuple, size: int) -> tuple[np.ndarray, ...]:
    """Returns directions x, y, z of the pixels, planes `[h, w]` in the camera's parent frame."""
    _, right, up, field_of_view = camera
    right, up = np.array(right), np.array(up) / np.linalg.norm(up)
    half = math.tan(math.radians(field_of_view) / 2)
    steps = half * ((np.arange(size) + 0.5) / size * 2 - 1)
    rays = steps[None, :, None] * right - steps[:, None, None] * up - np.cross(right, up)
    return tuple(np.moveaxis(rays, -1, 0).astype(np.float32))


def _turned(rotation, planes):
    """Returns the vectors of three planes `[h, w]`, rotated by `rotation [3, 3]`."""
    return tuple(sum(row[j] * planes[j] for j in range(3)) for row in rotation)


def _boxes(tool, hand, opening, blocks, yaws) -> _Boxes:
    reach = opening * rules.MAX_OPENING / 2 + rules.FINGER_HALF_THICKNESS
    finger = (rules.FINGER_HALF_WIDTH, rules.FINGER_HALF_THICKNESS, 0.027)
    middle = jnp.zeros(())
    parts = jnp.array(
        [
            [middle, -reach, 0.018],
            [middle, reach, 0.018],
            [middle, middle, 0.073],
            [middle, middle, 0.155],
        ]
    )
    block_angles = jnp.pad(yaws[:, None], ((0, 0), (2, 0)))
    hands = jnp.broadcast_to(hand, (len(parts), 3, 3))
    halves = [rules.BLOCK_HALF_SIZE] * rules.NUM_BLOCKS
    halves += [finger, finger, rules.PALM_HALF_SIZE, (0.030, 0.030, 0.060)]
    shades = (*BLOCK_COLOURS, _FINGER_SHADE, _FINGER_SHADE, _PALM_SHADE, _WRIST_SHADE)
    return _Boxes(
        centre=jnp.concatenate([blocks, tool[None] + parts @ hand.T]),
        rotation=jnp.concatenate([euler_to_matrix(block_angles), hands]),
        half_size=jnp.array(halves),
        colour=jnp.array(shades),
    )


def _ground(origin, rays, boxes, tool, plate):
    """Returns depth and colour, four planes `[h, w]`, of the table, the plate and the floor."""
    depth = -origin[2] / jnp.minimum(rays[2], -1e-6)
    x, y = origin[0] + depth * rays[0], origin[1] + depth * rays[1]
    on_table = jnp.maximum(jnp.abs(x), jnp.abs(y)) < rules.TABLE_HALF_SIZE
    from_plate = (x - plate[0]) ** 2 + (y - plate[1]) ** 2
    light = _shadow((x - tool[0]) ** 2 + (y - tool[1]) ** 2, 0.04, tool[2])
    for i in range(rules.NUM_BLOCKS):
        (cos, _, _), (sin, _, _), _ = boxes.rotation[i]
        dx, dy = x - boxes.centre[i, 0], y - boxes.centre[i, 1]
        along = jnp.maximum(jnp.abs(cos * dx + sin * dy) - rules.BLOCK_HALF_SIZE[0], 0)
        across = jnp.maximum(jnp.abs(cos * dy - sin * dx) - rules.BLOCK_HALF_SIZE[1], 0)
        height = boxes.centre[i, 2] - rules.BLOCK_HALF_SIZE[2]
        light *= _shadow(along**2 + across**2, 0.01, height)
    planes = []
    for wood, floor, white, rim in zip(_WOOD, _FLOOR, _PLATE, _RIM, strict=True):
        plane = jnp.where(on_table, wood, floor)
        plane = jnp.where(from_plate < rules.PLATE_RADIUS**2, rim, plane)
        planes.append(light * jnp.where(from_plate < (0.8 * rules.PLATE_RADIUS) ** 2, white, plane))
    return depth, *planes


def _shadow(squared_distance, radius, height):
    """Returns the light in [0, 1] near an object at `height`; higher ones have softer shadows."""
    softness = radius + 0.2 * height
    return 1 - 0.4 / (1 + 6 * height) / (1 + squared_distance / softness**2)


def _draw(image, origin, rays, box):
    """Returns the image with a box drawn where it is nearer than the depth so far."""
    start, lamp = (origin - box.centre) @ box.rotation, jnp.array(_LIGHT) @ box.rotation
    enter, leave, side = 0.0, jnp.inf, 0.0
    for i, direction in enumerate(_turned(box.rotation.T, rays)):
        inverse = 1 / jnp.where(jnp.abs(direction) < 1e-6, 1e-6, direction)
        middle, reach = -start[i] * inverse, box.half_size[i] * jnp.abs(inverse)
        side = jnp.where(middle - reach > enter, -lamp[i] * jnp.sign(inverse), side)
        enter = jnp.maximum(enter, middle - reach)
        leave = jnp.minimum(leave, middle + reach)
    return _paint(image, enter, leave, side, box.colour)


def _draw_cylinder(image, origin, rays, cylinder):
    """Returns the image with an upright cylinder drawn where it is nearer than the depth so far."""
    x, y, z = origin - cylinder.centre
    dx, dy, dz = rays
    # (x + t·dx)² + (y + t·dy)² = r², a quadratic equation in t
    square = jnp.maximum(dx**2 + dy**2, 1e-9)
    middle = -(x * dx + y * dy) / square
    root = middle**2 - (x**2 + y**2 - cylinder.radius**2) / square
    reach = jnp.sqrt(jnp.maximum(root, 0))
    inverse = 1 / jnp.where(jnp.abs(dz) < 1e-6, 1e-6, dz)
    half = cylinder.height / 2
    from_top = (half - z) * inverse - half * jnp.abs(inverse)
    enter = jnp.maximum(middle - reach, from_top)
    leave = jnp.minimum(middle + reach, (half - z) * inverse + half * jnp.abs(inverse))
    round_side = ((x + enter * dx) * _LIGHT[0] + (y + enter * dy) * _LIGHT[1]) / cylinder.radius
    side = jnp.where(from_top >= enter, -_LIGHT[2] * jnp.sign(inverse), round_side)
    return _paint(image, enter, jnp.where(root > 0, leave, -jnp.inf), side, cylinder.colour)


def _paint(image, enter, leave, side, colour):
    """Returns the image with an object where its surface is nearer than the depth so far.

    Args:
      image: depth and colour, four planes `[h, w]`.
      enter: depth at which rays enter the object `[h, w]`.
      leave: depth at which they leave it `[h, w]`; those below `enter` miss it.
      side: cosine of the angle between the surface and the light `[h, w]`.
      colour: of the object `[3]`.
    """
    depth, *planes = image
    visible = (enter < leave) & (enter > 0) & (enter < depth)
    light = _AMBIENT + (1 - _AMBIENT) * jnp.maximum(side, 0)
    planes = (jnp.where(visible, light * c, p) for c, p in zip(colour, planes, strict=True))
    return jnp.where(visible, enter, depth), *planes
