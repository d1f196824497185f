"""Words for what an episode of a memory task shows, and for what was done in it."""

from collections.abc import Callable
from types import MappingProxyType

import numpy as np

from vla_jax.envs.memory_table import memory_task, tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_task import MemoryState
from vla_jax.envs.table import rules
from vla_jax.types import Array


def shown(world: JaxMemoryConfig, last: MemoryState) -> str:
    """Returns what must be remembered, such as "the red block lights up".

    Args:
      world: with the task.
      last: state at the end of the episode, as NumPy arrays.
    """
    cue, colour = last.cue, rules.COLOURS[int(last.cue.colour)]
    order = cue.order[: memory_task.items(tasks.get(world.task), world)]
    colours = " → ".join(rules.COLOURS[block] for block in order % rules.NUM_BLOCKS)
    swaps = _number(cue.count, "swap", "swaps")
    texts = {
        "touch_times": "the number of touches, told at the first step",
        "lift_times": "the number of lifts, told at the first step",
        "blinks": f"the lamp blinks {_times(int(cue.count))}",
        "timing": f"the lamp turns green at step {int(cue.count)}",
        "cups": f"the {colour} block before the cups",
        "cups_swapped": f"the {colour} block before the cups, then {swaps}",
        "dark": f"the place of the {colour} block, before the dark",
        "put_back": f"the first place of the {colour} block",
        "lit": f"the {colour} block lights up",
        "kth": f"{colours}, then the lamp blinks {_times(int(cue.count))}: {colour}",
        "sequence": colours,
        "path": "the dots " + " → ".join(str(dot + 1) for dot in order),
    }
    return texts.get(world.task, "")


def done(world: JaxMemoryConfig, last: MemoryState) -> str:
    """Returns what was done, such as "touched the red block"; empty if the state does not tell.

    Args:
      world: with the task.
      last: state at the end of the episode, as NumPy arrays.
    """
    return _DONE[world.task](last) if world.task in _DONE else ""


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _counted(one: str, many: str) -> Callable[[MemoryState], str]:
    return lambda last: _number(last.progress.done, one, many)


def _number(count: Array, one: str, many: str) -> str:
    return f"{int(count)} {one if int(count) == 1 else many}"


def _nearest(last: MemoryState) -> str:
    """Returns the block at the hand: the one whose touch ended the episode."""
    away = np.linalg.norm(last.table.blocks[:, :2] - last.table.tool[:2], axis=1)
    return f"the hand at the {rules.COLOURS[int(np.argmin(away))]} block"


_DONE = MappingProxyType(
    {
        "touch_times": _counted("touch", "touches"),
        "lift_times": _counted("lift", "lifts"),
        "blinks": _counted("press", "presses"),
        "dark": _nearest,
        "lit": _nearest,
        "kth": _nearest,
        "sequence": lambda last: f"{int(last.progress.done)} in order",
        "path": lambda last: f"{int(last.progress.done)} in order",
    }
)
