"""Counting: the robot repeats a motion as often as it was asked to or as it saw, then stops.

The hand is a counter: a policy without memory can go a little to one side at each repetition, and
read off where it is how many there were. What it cannot know is the number to reach, which is gone
when the arm moves. Policies that see the instruction at every step can do `touch_times` in this way
without memory. Members of the family `tasks`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vla_jax.envs.memory_table import memory_task, motions, recall, task_captions
from vla_jax.envs.memory_table.memory_task import (
    GREEN,
    OFF,
    WHITE,
    Contacts,
    Cue,
    Display,
    MemoryState,
    MemoryTask,
    Verdict,
)
from vla_jax.envs.table import rules
from vla_jax.types import Key, Recall

TIMES = ("once", "twice", "three times", "four times", "five times", "six times", "seven times",
         "eight times")  # fmt: skip
_LEAST_REPEATS = 2  # of touch_times and lift_times
# Steps without a press after the last one of "blinks"; the expert's presses are at most 10 apart,
# with the noise of demonstrations.
STAY_STEPS = 14
TIMING_TOLERANCE = 3  # steps
_LAMP_FIRST, _LAMP_LAST = 4, 12  # steps between which the lamp of "timing" turns green
_DOWN = 0.005  # m of free space below a block that is down again
_FREE = 0.9  # opening of fingers that have let go of a block
_BESIDE, _BESIDE_HEIGHT = 0.03, 0.075  # m from a block and above the table: the hand is around it
_BUTTON = rules.NUM_BLOCKS  # number of the button among the things touched


def _repeat_instructions(
    task: MemoryTask, name: str, sentence: str, config: Any
) -> tuple[tuple[str, str], ...]:
    """Returns one instruction per count and colour; results are grouped by count."""
    return tuple(
        (sentence.format(colour=colour, times=TIMES[count - 1]), f"{name} {count}")
        for count in range(_LEAST_REPEATS, memory_task.updates(task, config) + 1)
        for colour in rules.COLOURS
    )


def _repeat_index(config: Any, cue: Cue) -> Array:
    del config
    return (cue.count - _LEAST_REPEATS) * rules.NUM_BLOCKS + cue.colour


def _draw_repeats(task: MemoryTask, config: Any, key: Key) -> Cue:
    colour_key, count_key = jax.random.split(key)
    return memory_task.make_cue(
        shown=memory_task.INSTRUCTION_STEPS,
        colour=memory_task.random_below(colour_key, 0, rules.NUM_BLOCKS - 1),
        count=memory_task.random_below(
            count_key, _LEAST_REPEATS, memory_task.updates(task, config)
        ),
    )


def _with_button(config: Any, state: MemoryState) -> Display:
    del config
    return memory_task.plain_display(button=state.layout.button)


def _repeat_chance(task: MemoryTask, config: Any) -> float:
    """Returns the share of one colour and one count among all of them.

    No observation of the acting part depends on either before the episode is decided. So the colour
    and the number of repetitions that a policy without memory ends up with are independent of those
    that were asked for, and agree with them in one of so many cases, whether they are fixed or
    random. To commit to one number needs a counter, such as the hand; a policy that stops with the
    same probability q after each repetition has less, q (1 − q)^(N − 1) for N of them.
    """
    num_counts = memory_task.updates(task, config) - _LEAST_REPEATS + 1
    return 1 / (rules.NUM_BLOCKS * num_counts)


def _recall_repeats(task: MemoryTask, config: Any, state: MemoryState) -> Recall:
    """Returns colour and number of the instruction, how many are done, and where the next is."""
    most, cue, done = memory_task.updates(task, config), state.cue, state.progress.done
    block = state.table.blocks[cue.colour, :2]
    next_place = jnp.where(done < cue.count, block, state.layout.button)
    choices = (
        jax.nn.one_hot(cue.colour, rules.NUM_BLOCKS),
        jax.nn.one_hot(cue.count, most + 1),
        jax.nn.one_hot(done, most + 1),
    )
    return Recall(recall.offset(state, next_place), choices)


# touch_times ------------------------------------------------------------------------------------


def _judge_touches(config: Any, state: MemoryState, contacts: Contacts) -> Verdict:
    del config
    touched = jnp.append(contacts.blocks, contacts.button)
    begins, which, progress = memory_task.new_contact(state, touched)
    progress = memory_task.count_event(progress, begins & (which == state.cue.colour))
    ends = begins & (which == _BUTTON)
    success = ends & (progress.done == state.cue.count)
    wrong = begins & (which != _BUTTON) & (which != state.cue.colour)
    return Verdict(progress, success, wrong | (ends & ~success))


def _touch_repeatedly(config: Any, state: MemoryState) -> Array:
    progress, cue = state.progress, state.cue
    contact = jnp.where(
        progress.done < cue.count, motions.touch_block(state, cue.colour), motions.press(state)
    )
    return motions.send(config, motions.touch_again(state, contact))


# lift_times -------------------------------------------------------------------------------------


def _judge_lifts(config: Any, state: MemoryState, contacts: Contacts) -> Verdict:
    del config
    progress = state.progress
    height = state.table.blocks[:, 2] - rules.BLOCK_HALF_SIZE[2]
    own = height[state.cue.colour]
    is_up = jnp.where(progress.is_up, own > _DOWN, own > rules.LIFT_HEIGHT)
    came_down = progress.is_up & ~is_up
    progress = memory_task.count_event(progress._replace(is_up=is_up), came_down)
    success = contacts.button & (progress.done == state.cue.count) & ~is_up
    other = jnp.arange(rules.NUM_BLOCKS) != state.cue.colour
    wrong = jnp.any(other & (height > rules.LIFT_HEIGHT))
    return Verdict(progress, success, wrong | (contacts.button & ~success))


def _lift_repeatedly(config: Any, state: MemoryState) -> Array:
    progress, cue, table = state.progress, state.cue, state.table
    lift = motions.handle(config, state, "lift", cue.colour, state.layout.plate)
    lower = motions.send(config, jnp.array([0.0, 0.0, -config.step_size]))
    release = motions.send(config, motions.stay(), opens=True)
    leave = motions.send(config, motions.rise(state), opens=True)
    press = motions.send(config, motions.press(state))
    distance = jnp.linalg.norm(table.tool[:2] - table.blocks[cue.colour, :2])
    is_beside = (distance < _BESIDE) & (table.tool[2] < _BESIDE_HEIGHT)
    let_go = jnp.where(table.opening < _FREE, release, leave)
    away = jnp.where(is_beside, let_go, press)
    return jnp.where(progress.done < cue.count, jnp.where(progress.is_up, lower, lift), away)


# blinks -----------------------------------------------------------------------------------------


def _draw_blinks(config: Any, key: Key) -> Cue:
    most = memory_task.updates(BLINKS, config)
    return memory_task.make_cue(
        shown=_blinking_steps(config), count=memory_task.random_below(key, 1, most)
    )


def _blinking_steps(config: Any) -> int:
    return 1 + 4 * memory_task.updates(BLINKS, config)


def _show_blinks(config: Any, state: MemoryState) -> Display:
    del config
    is_on = memory_task.blinks_on(state, first=1, count=state.cue.count)
    lamp = jnp.where(is_on, jnp.array(WHITE), jnp.array(OFF))
    return memory_task.plain_display(lamp=lamp, button=state.layout.button)


def _judge_presses(config: Any, state: MemoryState, contacts: Contacts) -> Verdict:
    """Judges the presses before the first pause: a pause after too few of them is an answer too.

    Without this, a policy that presses and pauses in turn would be right for every count.
    """
    del config
    begins, _, progress = memory_task.new_contact(state, contacts.button[None])
    progress = memory_task.count_event(progress, begins)
    count = state.cue.count
    answers = (progress.done > 0) & (progress.since >= STAY_STEPS)
    success = answers & (progress.done == count)
    return Verdict(progress, success, (answers & ~success) | (progress.done > count))


def _press_repeatedly(config: Any, state: MemoryState) -> Array:
    progress = state.progress
    enough = progress.done >= state.cue.count
    next_press = jnp.where(enough, motions.stay(), motions.press(state))
    return motions.send(config, motions.touch_again(state, next_press))


def _recall_presses(config: Any, state: MemoryState) -> Recall:
    """Returns how many presses are left, of the blinks so far."""
    blinks = jnp.clip(memory_task.turn_of(state, first=1, steps=4) + 1, 0, state.cue.count)
    left = jnp.maximum(blinks - state.progress.done, 0)
    return Recall(jnp.zeros(0), (jax.nn.one_hot(left, memory_task.updates(BLINKS, config) + 1),))


# timing -----------------------------------------------------------------------------------------


def _draw_timing(config: Any, key: Key) -> Cue:
    del config
    green = memory_task.random_below(key, _LAMP_FIRST, _LAMP_LAST)
    return memory_task.make_cue(shown=0, count=green)


def _show_timing(config: Any, state: MemoryState) -> Display:
    del config
    lamp = jnp.where(state.table.num_steps >= state.cue.count, jnp.array(GREEN), jnp.array(OFF))
    return memory_task.plain_display(lamp=lamp, button=state.layout.button)


def _judge_timing(config: Any, state: MemoryState, contacts: Contacts) -> Verdict:
    del contacts
    pressed = state.table.opening < 0.5
    late = state.table.num_steps - (state.cue.count + config.delay)
    success = pressed & (jnp.abs(late) <= TIMING_TOLERANCE)
    return Verdict(state.progress, success, pressed & ~success)


def _press_in_time(config: Any, state: MemoryState) -> Array:
    # an action of step t shows in the state of step t + 1
    waits = state.table.num_steps + 1 < state.cue.count + config.delay
    return motions.send(config, motions.stay(), opens=waits)


def _recall_time(config: Any, state: MemoryState) -> Recall:
    """Returns the share of the delay that has passed since the lamp."""
    passed = jnp.maximum(state.table.num_steps - state.cue.count, 0)
    return Recall(jnp.atleast_1d(passed / max(config.delay, 1)))


def _timing_chance(config: Any) -> float:
    """Returns max over r of r^(T − 4) (1 − r^7): a policy that waits with probability r per step.

    The 7 steps of the tolerance begin T − 3 steps after the lamp. With a delay of up to 4 steps the
    chance is 1: a press in reply to the lamp is right.
    """
    waits = np.linspace(0.001, 0.999, 999)
    before = max(0, config.delay - TIMING_TOLERANCE - 1)
    return float(np.max(waits**before * (1 - waits ** (2 * TIMING_TOLERANCE + 1))))


_TOUCH = "touch the {colour} block {times}, then press the button"
_LIFT = "lift the {colour} block {times}, then press the button"
TOUCH_TIMES = MemoryTask(
    suite="counting",
    instructions=lambda config: _repeat_instructions(TOUCH_TIMES, "touch_times", _TOUCH, config),
    draw=lambda config, key: _draw_repeats(TOUCH_TIMES, config, key),
    instruction=_repeat_index,
    max_shown=lambda config: memory_task.INSTRUCTION_STEPS,
    act_steps=lambda config: 36 + 9 * memory_task.updates(TOUCH_TIMES, config),
    display=_with_button,
    judge=_judge_touches,
    expert=_touch_repeatedly,
    recall=lambda config, state: _recall_repeats(TOUCH_TIMES, config, state),
    chance=lambda config: _repeat_chance(TOUCH_TIMES, config),
    updates=4,
    least_updates=_LEAST_REPEATS,
    has_delay=False,
    cue_text=lambda config, state: "the number of touches, given at the start",
    result_text=task_captions.events("touch", "touches"),
)
LIFT_TIMES = MemoryTask(
    suite="counting",
    instructions=lambda config: _repeat_instructions(LIFT_TIMES, "lift_times", _LIFT, config),
    draw=lambda config, key: _draw_repeats(LIFT_TIMES, config, key),
    instruction=_repeat_index,
    max_shown=lambda config: memory_task.INSTRUCTION_STEPS,
    act_steps=lambda config: 44 + 12 * memory_task.updates(LIFT_TIMES, config),
    display=_with_button,
    judge=_judge_lifts,
    expert=_lift_repeatedly,
    recall=lambda config, state: _recall_repeats(LIFT_TIMES, config, state),
    chance=lambda config: _repeat_chance(LIFT_TIMES, config),
    updates=3,
    least_updates=_LEAST_REPEATS,
    has_delay=False,
    uses_gripper=True,
    cue_text=lambda config, state: "the number of lifts, given at the start",
    result_text=task_captions.events("lift", "lifts"),
)
BLINKS = MemoryTask(
    suite="counting",
    instructions=lambda config: tuple(
        ("press the button as often as the lamp blinks", f"blinks {count}")
        for count in range(1, memory_task.updates(BLINKS, config) + 1)
    ),
    draw=_draw_blinks,
    instruction=lambda config, cue: cue.count - 1,
    max_shown=_blinking_steps,
    act_steps=lambda config: 24 + STAY_STEPS + 8 * memory_task.updates(BLINKS, config),
    display=_show_blinks,
    judge=_judge_presses,
    expert=_press_repeatedly,
    recall=_recall_presses,
    # one number of presses is right in one of so many cases
    chance=lambda config: 1 / memory_task.updates(BLINKS, config),
    updates=4,
    rules_version=2,  # since 2 a pause is an answer
    least_updates=2,  # a lamp that always blinks once says nothing
    has_blocks=False,
    cue_text=lambda config, state: f"the lamp blinks {task_captions.times(state.cue.count)}",
    result_text=task_captions.events("press", "presses"),
)
TIMING = MemoryTask(
    suite="counting",
    instructions=lambda config: (
        (f"press the button {config.delay} steps after the lamp", "timing"),
    ),
    draw=_draw_timing,
    instruction=lambda config, cue: jnp.zeros((), jnp.int32),
    max_shown=lambda config: 0,
    act_steps=lambda config: _LAMP_LAST + config.delay + 2 * TIMING_TOLERANCE,
    display=_show_timing,
    judge=_judge_timing,
    expert=_press_in_time,
    recall=_recall_time,
    chance=_timing_chance,
    has_delay=False,
    has_blocks=False,
    uses_gripper=True,
    hand_over_button=True,
    cue_text=lambda config, state: f"the lamp turns green at step {int(state.cue.count)}",
)
MEMBERS = {
    "touch_times": TOUCH_TIMES,
    "blinks": BLINKS,
    "lift_times": LIFT_TIMES,
    "timing": TIMING,
}
