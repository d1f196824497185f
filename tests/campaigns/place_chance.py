"""Measures the chance of `put_back`: how often the best guess of a block's first place is right.

    python tests/campaigns/place_chance.py

The guess knows the plate and the other three blocks of a layout, but not the button, and maximises
the probability under the distribution of `memory_rules.start`, on grids of places. Printed beside
it is a guess by the free places alone.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.envs.memory_table import memory_rules, permanence
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.table import rules
from vla_jax.types import Array, Key

WORLD = JaxMemoryConfig(task="put_back")


def grid(num: int) -> jax.Array:
    """Returns the centres of `num` × `num` cells of the layouts' square, `[num², 2]` m."""
    line = (2 * (jnp.arange(num) + 0.5) / num - 1) * rules.LAYOUT_HALF_SIZE
    return jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)


def apart(one: Array, other: Array, least: float) -> jax.Array:
    """Returns which of the places `[m, 2]` and `[n, 2]` keep a distance, `[m, n]` of 0 and 1."""
    away = jnp.linalg.norm(jnp.asarray(one)[:, None] - jnp.asarray(other)[None], axis=-1)
    return (away >= least).astype(jnp.float32)


PLACES, BUTTONS = grid(33), grid(17)
COVERED = 1 - apart(PLACES, PLACES, permanence.RETURN_DISTANCE)
PLACE_PLACE = apart(PLACES, PLACES, rules.PLATE_SPACING)
PLACE_BUTTON = apart(PLACES, BUTTONS, rules.LAYOUT_SPACING)


def guess(key: Key) -> jax.Array:
    """Returns expected and found success of both guesses in one layout, `[2, 2]`; consumes a key.

    Objects are placed one after another: plate, button, blocks, each with equal density over what
    is free for it. The density of a layout is thus the product of 1 / free area over its objects.
    """
    state = memory_rules.start(WORLD, *jax.random.split(key))
    block, plate, blocks = state.cue.colour, state.layout.plate[None], state.layout.blocks
    numbers = jnp.arange(rules.NUM_BLOCKS)
    others = numbers != block
    from_plate = apart(PLACES, plate, rules.PLATE_SPACING)[:, 0]
    from_blocks = apart(PLACES, blocks, rules.PLATE_SPACING)
    free = from_plate * jnp.prod(jnp.where(others, from_blocks, 1.0), axis=1)
    of_button = apart(BUTTONS, plate, rules.PLATE_SPACING)[:, 0]
    from_button = apart(BUTTONS, blocks, rules.LAYOUT_SPACING)
    of_button *= jnp.prod(jnp.where(others, from_button, 1.0), axis=1)
    density = PLACE_BUTTON * of_button * free[:, None]  # [places, buttons]
    for number in range(rules.NUM_BLOCKS):  # area that was free for this block
        earlier = jnp.where(others & (numbers < number), from_blocks, 1.0)
        area = from_plate * jnp.prod(earlier, axis=1)
        beside = jnp.where(block < number, PLACE_PLACE, 1.0) * area
        density /= jnp.maximum(beside @ PLACE_BUTTON, 1.0)
    results = []
    for weight in (free, density.sum(axis=1)):
        covered = COVERED @ (weight / jnp.maximum(weight.sum(), 1e-30))
        away = jnp.linalg.norm(PLACES[jnp.argmax(covered)] - blocks[block])
        results.append(jnp.stack([covered.max(), away < permanence.RETURN_DISTANCE]))
    return jnp.stack(results)


def main() -> None:
    """Reads the options."""
    parser = argparse.ArgumentParser(description="Measures the chance of put_back.")
    parser.add_argument("--num-layouts", type=int, default=4000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the layouts (%(default)s)")
    options = parser.parse_args()
    keys = jax.random.split(jax.random.key(options.seed), options.num_layouts)
    found = np.asarray(jax.jit(lambda keys: jax.lax.map(guess, keys, batch_size=8))(keys))
    means, errors = found.mean(axis=0), found.std(axis=0) / np.sqrt(len(keys))
    for name, (expected, right), (_, error) in zip(
        ("free places", "distribution of layouts"), means, errors, strict=True
    ):
        print(f"{name}: right in {right:.3f} ± {error:.3f}, {expected:.3f} expected")


if __name__ == "__main__":
    main()
