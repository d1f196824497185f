"""Reference: which of several blocks was meant, shown by light. Members of the family `tasks`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vla_jax.envs.memory_table import memory_task, recall, task_captions
from vla_jax.envs.memory_table.memory_task import (
    OFF,
    WHITE,
    Cue,
    Display,
    MemoryState,
    MemoryTask,
)
from vla_jax.envs.memory_table.permanence import judge_touch, touch_target
from vla_jax.envs.table import rules
from vla_jax.types import Key, Recall

LIT_STEPS = 3  # steps for which a block is lit


def draw_order(num_items: int, shown: int, key: Key) -> Cue:
    """Returns a cue of blocks that are lit one after another; `key` is consumed.

    Args:
      num_items: number of blocks.
      shown: steps of the shown part.
      key: consumed.
    """
    order = jax.random.permutation(key, rules.NUM_BLOCKS)[:num_items]
    return memory_task.make_cue(shown=shown, order=order, colour=order[0])


def show_order(num_items: int, state: MemoryState, lamp: Array | None = None) -> Display:
    """Returns the display: the blocks of the cue's order light up one after another."""
    turn = memory_task.turn_of(state, first=1, steps=LIT_STEPS)
    which = state.cue.order[jnp.clip(turn, 0, num_items - 1)]
    is_lit = (state.table.num_steps >= 1) & (turn < num_items)
    lit = is_lit & (jnp.arange(rules.NUM_BLOCKS) == which)
    return memory_task.plain_display(lit=lit, lamp=lamp)


def num_shown(num_items: int, state: MemoryState) -> Array:
    """Returns how many blocks `show_order` has lit so far, `[]` int32."""
    return jnp.clip(memory_task.turn_of(state, first=1, steps=LIT_STEPS) + 1, 0, num_items)


def order_steps(num_items: int) -> int:
    """Returns the steps that `show_order` takes."""
    return 1 + LIT_STEPS * num_items


def _draw_kth(config: Any, key: Key) -> Cue:
    order_key, k_key = jax.random.split(key)
    num_items = memory_task.items(KTH, config)
    cue = draw_order(num_items, _kth_steps(config), order_key)
    k = memory_task.random_below(k_key, 1, num_items)
    return cue._replace(count=k, colour=cue.order[k - 1])


def _kth_steps(config: Any) -> int:
    num_items = memory_task.items(KTH, config)
    return order_steps(num_items) + 4 * num_items


def _show_kth(config: Any, state: MemoryState) -> Display:
    num_items = memory_task.items(KTH, config)
    is_on = memory_task.blinks_on(state, first=order_steps(num_items), count=state.cue.count)
    return show_order(num_items, state, lamp=jnp.where(is_on, jnp.array(WHITE), jnp.array(OFF)))


def _recall_kth(config: Any, state: MemoryState) -> Recall:
    """Returns the blocks in order, how often the lamp has blinked, and the block of that number."""
    num_items, cue = memory_task.items(KTH, config), state.cue
    order = cue.order[:num_items]
    begun = memory_task.turn_of(state, first=order_steps(num_items), steps=4) + 1
    blinks = jnp.clip(begun, 0, cue.count)
    block = recall.block(state, order[jnp.maximum(blinks - 1, 0)])
    numbers, choices = recall.from_when(blinks > 0, block)
    blocks = recall.each_of(order, rules.NUM_BLOCKS, num_shown(num_items, state))
    return Recall(numbers, (*choices, *blocks, jax.nn.one_hot(blinks, num_items + 1)))


def _recall_lit(config: Any, state: MemoryState) -> Recall:
    del config
    return recall.from_when(num_shown(1, state) > 0, recall.block(state, state.cue.colour))


LIT = MemoryTask(
    suite="reference",
    instructions=lambda config: (("touch the block that was lit", "lit"),),
    draw=lambda config, key: draw_order(1, order_steps(1), key),
    instruction=lambda config, cue: jnp.zeros((), jnp.int32),
    max_shown=lambda config: order_steps(1),
    act_steps=lambda config: 36,
    display=lambda config, state: show_order(1, state),
    judge=judge_touch,
    expert=touch_target,
    recall=_recall_lit,
    chance=lambda config: 1 / rules.NUM_BLOCKS,
    ends_at_block=True,
    shown_by=tuple(f"{colour}.lit" for colour in rules.COLOURS),
    cue_text=task_captions.block("the {} block lights up"),
    result_text=task_captions.nearest,
)
KTH = MemoryTask(
    suite="reference",
    instructions=lambda config: tuple(
        ("touch the block whose number the lamp blinks", f"kth {k}")
        for k in range(1, memory_task.items(KTH, config) + 1)
    ),
    draw=_draw_kth,
    instruction=lambda config, cue: cue.count - 1,
    max_shown=_kth_steps,
    act_steps=lambda config: 36,
    display=_show_kth,
    judge=judge_touch,
    expert=touch_target,
    recall=_recall_kth,
    chance=lambda config: 1 / rules.NUM_BLOCKS,
    items=4,
    ends_at_block=True,
    cue_text=lambda config, state: (
        f"{task_captions.colours(state, memory_task.items(KTH, config))}, then the lamp blinks "
        f"{task_captions.times(state.cue.count)}: {task_captions.colour(state.cue.colour)}"
    ),
    result_text=task_captions.nearest,
)
MEMBERS = {"lit": LIT, "kth": KTH}
