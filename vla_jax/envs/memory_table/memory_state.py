"""Observation of the memory tables: the table's 22 numbers, then what the tasks add to them."""

import jax.numpy as jnp
from jax import Array

from vla_jax.envs.memory_table.memory_task import NUM_CUPS, Display, MemoryState
from vla_jax.envs.table import quasi_static, rules

_EXTRA_NAMES = (
    *(f"{colour}.seen" for colour in rules.COLOURS),
    "lamp.red",
    "lamp.green",
    "lamp.blue",
    *(f"{colour}.lit" for colour in rules.COLOURS),
    "button.x",
    "button.y",
    *(f"cup_{i}.{axis}" for i in range(NUM_CUPS) for axis in "xy"),
    "cups.down",
    "marker.x",
    "marker.y",
    "marker.on",
    "dark",
    *(f"cup_{i}.up" for i in range(NUM_CUPS)),
)
STATE_NAMES = (*rules.STATE_NAMES, *_EXTRA_NAMES)
NAMES = {**rules.NAMES, "environment_state": STATE_NAMES}


def environment_state(state: MemoryState, display: Display) -> Array:
    """Returns what is visible of the scene, `[52]`, named in `STATE_NAMES`.

    The first 22 numbers are those of the table. The numbers of a block that cannot be seen are 0,
    and those of the plate in the dark.
    """
    table = quasi_static.environment_state(state.table)
    blocks = table[:-2].reshape(rules.NUM_BLOCKS, -1) * display.seen[:, None]
    extra = (
        display.seen,
        display.lamp,
        display.lit,
        display.button,
        display.cups.reshape(-1),
        display.cups_down[None],
        display.marker,
        display.dark[None],
        display.cups_up,
    )
    parts = (blocks.reshape(-1), table[-2:] * ~display.dark, *extra)
    return jnp.concatenate([jnp.asarray(part, jnp.float32) for part in parts])
