"""Permanence: objects that can no longer be seen are where they were, or where they were moved.

Members of the family `tasks`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vla_jax.envs.memory_table import memory_task, motions, recall, task_captions
from vla_jax.envs.memory_table.memory_table_config import MAX_COUNT
from vla_jax.envs.memory_table.memory_task import (
    GREEN,
    NUM_CUPS,
    OFF,
    Contacts,
    Cue,
    Display,
    MemoryState,
    MemoryTask,
    Verdict,
)
from vla_jax.envs.table import rules
from vla_jax.types import Key, Recall

_UNCOVERED = 4  # steps before the cups come down, or the light goes out
SWAP_STEPS = 6  # steps in which two cups change places
_ARC = 0.05  # m from the straight line at which two cups pass each other
RETURN_DISTANCE = 0.03  # m from its first place within which a block counts as put back
# Share of layouts in which the best guess of a block's first place is right (0.158 ± 0.006 of
# 4,000; 0.160 expected): the best of 33 × 33 places by the distribution of layouts, given the plate
# and the other blocks and summed over the button, which is not visible. The place that covers most
# of what is free is right in 0.13. Measured by `python tests/campaigns/place_chance.py`.
PLACE_CHANCE = 0.16
# m from its goal at which the expert puts a block down; it may then lie 1.5 cm further away
_PUT_DOWN = 0.010


# cups and cups_swapped --------------------------------------------------------------------------


def _draw_cups(task: MemoryTask, config: Any, key: Key) -> Cue:
    place_key, target_key = jax.random.split(key)
    num_cups = memory_task.items(task, config)
    places = jax.random.permutation(place_key, rules.NUM_BLOCKS)
    target = memory_task.random_below(target_key, 0, num_cups - 1)
    return memory_task.make_cue(
        shown=task.max_shown(config), colour=jnp.argmax(places == target), places=places
    )


def _draw_swapped(config: Any, key: Key) -> Cue:
    cue_key, count_key, swap_key = jax.random.split(key, 3)
    most = memory_task.updates(CUPS_SWAPPED, config)
    num_cups = memory_task.items(CUPS_SWAPPED, config)
    pairs = jax.vmap(lambda k: jax.random.permutation(k, num_cups)[:2])
    swaps = jnp.zeros((MAX_COUNT, 2), jnp.int32)
    return _draw_cups(CUPS_SWAPPED, config, cue_key)._replace(
        count=memory_task.random_below(count_key, 1, most),
        swaps=swaps.at[:most].set(pairs(jax.random.split(swap_key, most))),
    )


def _cups(task: MemoryTask, config: Any, state: MemoryState) -> Display:
    """Returns the display: first the blocks, then cups over them, which change places in pairs.

    A row of cups is a place, not a cup: of two cups that change places it has the nearer one, so
    that no row tells which cup came from where. They pass each other on flat arcs in the air, since
    another cup may be in their way.
    """
    num_cups, cue = memory_task.items(task, config), state.cue
    elapsed = state.table.num_steps - _UNCOVERED
    swap, share = elapsed // SWAP_STEPS, (elapsed % SWAP_STEPS) / SWAP_STEPS
    places = state.layout.blocks
    swap_now = jnp.clip(swap, 0, len(cue.swaps) - 1)
    one, other = cue.swaps[swap_now]
    moves = (elapsed >= 0) & (swap < cue.count)
    centre, half = (places[one] + places[other]) / 2, (places[one] - places[other]) / 2
    angle = jnp.pi * jnp.where(share > 0.5, share - 1, share)  # of the cup nearer to `one`
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    aside = jnp.stack([-half[1], half[0]]) * _ARC / jnp.maximum(jnp.linalg.norm(half), _ARC)
    from_centre = cos * half + sin * aside
    moved = places.at[one].set(centre + from_centre).at[other].set(centre - from_centre)
    is_down = elapsed >= 0
    exists = (jnp.arange(NUM_CUPS) < num_cups) & is_down
    are_between = moves & (share > 0)
    shown = jnp.where(are_between, moved, places)
    return memory_task.plain_display(
        seen=(cue.places < num_cups) & ~is_down,
        cups=jnp.where(exists[:, None], shown, 0.0),
        cups_down=is_down,
        cups_up=jnp.zeros(NUM_CUPS, bool).at[cue.swaps[swap_now]].set(are_between),
    )


def place_of_target(config: Any, state: MemoryState) -> Array:
    """Returns the place `[]` int32 of the cup over the target, after all swaps."""
    del config
    return _place_after(state.cue, state.cue.count)


def _place_after(cue: Cue, num_swaps: Array) -> Array:
    """Returns the place `[]` int32 of the target after the first swaps."""

    def swap(i, place):
        one, other = cue.swaps[i]
        moved = jnp.where(place == one, other, jnp.where(place == other, one, place))
        return jnp.where(i < num_swaps, moved, place)

    return jax.lax.fori_loop(0, len(cue.swaps), swap, cue.places[cue.colour])


def _recall_cup(task: MemoryTask, config: Any, state: MemoryState) -> Recall:
    """Returns the target's place after the swaps so far: offset and number."""
    swaps_so_far = (state.table.num_steps - _UNCOVERED) // SWAP_STEPS
    place = _place_after(state.cue, jnp.minimum(swaps_so_far, state.cue.count))
    number = jax.nn.one_hot(place, memory_task.items(task, config))
    return Recall(recall.offset(state, state.layout.blocks[place]), (number,))


def _judge_cups(config: Any, state: MemoryState, contacts: Contacts) -> Verdict:
    touched = contacts.cups
    success = touched[place_of_target(config, state)] & (jnp.sum(touched) == 1)
    return Verdict(state.progress, success, jnp.any(touched) & ~success)


def _touch_cup(config: Any, state: MemoryState) -> Array:
    return motions.send(config, motions.touch_cup(state, place_of_target(config, state)))


# dark -------------------------------------------------------------------------------------------


def _draw_colour(config: Any, key: Key) -> Cue:
    del config
    colour = memory_task.random_below(key, 0, rules.NUM_BLOCKS - 1)
    return memory_task.make_cue(shown=_UNCOVERED, colour=colour)


def _darken(config: Any, state: MemoryState) -> Display:
    del config
    dark = state.table.num_steps >= _UNCOVERED
    seen = jnp.full(rules.NUM_BLOCKS, ~dark)
    return memory_task.plain_display(seen=seen, dark=dark)


def judge_touch(config: Any, state: MemoryState, contacts: Contacts) -> Verdict:
    """Judges the first contact: the block of the cue is right."""
    del config
    touched = contacts.blocks
    success = touched[state.cue.colour] & (jnp.sum(touched) == 1)
    return Verdict(state.progress, success, jnp.any(touched) & ~success)


def touch_target(config: Any, state: MemoryState) -> Array:
    """Returns the expert's action: it touches the block of the cue."""
    return motions.send(config, motions.touch_block(state, state.cue.colour))


def recall_target(config: Any, state: MemoryState) -> Recall:
    """Returns which block is meant, which the instruction says at once, and where it is."""
    del config
    return recall.block(state, state.cue.colour)


# put_back ---------------------------------------------------------------------------------------


def _draw_return(config: Any, key: Key) -> Cue:
    del config
    return memory_task.make_cue(
        shown=memory_task.INSTRUCTION_STEPS,
        colour=memory_task.random_below(key, 0, rules.NUM_BLOCKS - 1),
    )


def _is_time_to_return(config: Any, state: MemoryState) -> Array:
    return (state.progress.done > 0) & (state.progress.since >= config.delay)


def _show_return(config: Any, state: MemoryState) -> Display:
    lamp = jnp.where(_is_time_to_return(config, state), jnp.array(GREEN), jnp.array(OFF))
    return memory_task.plain_display(lamp=lamp)


def _judge_return(config: Any, state: MemoryState, contacts: Contacts) -> Verdict:
    """Judges the first place off the plate at which the block is let go once the lamp is green.

    Else a policy without memory could try one place after another until one is right. Other blocks
    must not be lifted, nor brought to the plate.
    """
    block = state.cue.colour
    height = state.table.blocks[:, 2] - rules.BLOCK_HALF_SIZE[2]
    rests = (height[block] < 0.02) & ~contacts.blocks[block]
    place = state.table.blocks[block, :2]

    def is_within(goal: Array, distance: float) -> Array:
        return rests & (jnp.linalg.norm(place - goal) < distance)

    on_plate = is_within(state.table.plate, rules.PLACE_DISTANCE)
    progress = memory_task.count_event(state.progress, on_plate & (state.progress.done == 0))
    is_back = is_within(state.layout.blocks[block], RETURN_DISTANCE)
    answers = _is_time_to_return(config, state) & rests & ~on_plate
    other = jnp.arange(rules.NUM_BLOCKS) != block
    from_plate = jnp.linalg.norm(state.table.blocks[:, :2] - state.table.plate[None], axis=1)
    wrong = other & ((height > rules.LIFT_HEIGHT) | (from_plate < rules.PLACE_DISTANCE))
    return Verdict(progress, answers & is_back, (answers & ~is_back) | jnp.any(wrong))


def _carry_there_and_back(config: Any, state: MemoryState) -> Array:
    block = state.cue.colour
    back = _is_time_to_return(config, state)
    goal = jnp.where(back, state.layout.blocks[block], state.table.plate)
    return motions.handle(config, state, "place", block, goal, release_distance=_PUT_DOWN)


def _recall_first_place(config: Any, state: MemoryState) -> Recall:
    del config
    colour = state.cue.colour
    block, first = recall.block(state, colour), recall.offset(state, state.layout.blocks[colour])
    return block._replace(numbers=jnp.concatenate([block.numbers, first]))


def _return_chance(config: Any) -> float:
    """Returns the chance of one colour and one place.

    The colour is given while the arm is held, and a wrong one fails; the first place is gone when
    the lamp is green. The place on the plate could tell it: a policy that shrinks the table to the
    plate on the way there, and the reverse on the way back, would need no memory. The expert puts
    all blocks in the middle.
    """
    del config
    return PLACE_CHANCE / rules.NUM_BLOCKS


CUPS = MemoryTask(
    suite="permanence",
    instructions=lambda config: memory_task.by_colour("touch the cup over the {} block", "cups"),
    draw=lambda config, key: _draw_cups(CUPS, config, key),
    instruction=lambda config, cue: cue.colour,
    max_shown=lambda config: _UNCOVERED + 1,
    act_steps=lambda config: 36,
    display=lambda config, state: _cups(CUPS, config, state),
    judge=_judge_cups,
    expert=_touch_cup,
    recall=lambda config, state: _recall_cup(CUPS, config, state),
    chance=lambda config: 1 / memory_task.items(CUPS, config),
    rules_version=2,  # since 2 the places of cups are in order of x
    items=3,
    has_cups=True,
    cue_text=task_captions.block("the {} block before the cups"),
)

CUPS_SWAPPED = CUPS._replace(
    instructions=lambda config: tuple(
        (f"touch the cup over the {colour} block", f"cups_swapped {count}")
        for count in range(1, memory_task.updates(CUPS_SWAPPED, config) + 1)
        for colour in rules.COLOURS
    ),
    draw=_draw_swapped,
    instruction=lambda config, cue: (cue.count - 1) * rules.NUM_BLOCKS + cue.colour,
    max_shown=lambda config: (
        _UNCOVERED + 1 + SWAP_STEPS * memory_task.updates(CUPS_SWAPPED, config)
    ),
    display=lambda config, state: _cups(CUPS_SWAPPED, config, state),
    recall=lambda config, state: _recall_cup(CUPS_SWAPPED, config, state),
    chance=lambda config: 1 / memory_task.items(CUPS_SWAPPED, config),
    rules_version=3,  # since 3 as `cups`, and the state says which cups are in the air
    updates=3,
    cue_text=lambda config, state: (
        f"{CUPS.cue_text(config, state)}, then "
        f"{task_captions.number(state.cue.count, 'swap', 'swaps')}"
    ),
)
DARK = MemoryTask(
    suite="permanence",
    instructions=lambda config: memory_task.by_colour("touch the {} block in the dark", "dark"),
    draw=_draw_colour,
    instruction=lambda config, cue: cue.colour,
    max_shown=lambda config: _UNCOVERED,
    act_steps=lambda config: 40,
    display=_darken,
    judge=judge_touch,
    expert=touch_target,
    recall=recall_target,
    chance=lambda config: 1 / rules.NUM_BLOCKS,  # of a hand that searches until it touches a block
    rules_version=2,  # since 2 the plate is hidden too
    ends_at_block=True,
    cue_text=task_captions.block("the place of the {} block, before the dark"),
    result_text=task_captions.nearest,
)
PUT_BACK = MemoryTask(
    suite="permanence",
    instructions=lambda config: memory_task.by_colour(
        "put the {} block on the plate, and back when the lamp is green", "put_back"
    ),
    draw=_draw_return,
    instruction=lambda config, cue: cue.colour,
    max_shown=lambda config: memory_task.INSTRUCTION_STEPS,
    act_steps=lambda config: 90 + config.delay,
    display=_show_return,
    judge=_judge_return,
    expert=_carry_there_and_back,
    recall=_recall_first_place,
    chance=_return_chance,
    rules_version=2,  # since 2 the first place after the light decides
    has_delay=False,
    uses_gripper=True,
    cue_text=task_captions.block("the first place of the {} block"),
)
MEMBERS = {
    "cups": CUPS,
    "cups_swapped": CUPS_SWAPPED,
    "dark": DARK,
    "put_back": PUT_BACK,
}
