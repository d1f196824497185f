"""Contract of a memory task, and the records that its functions read and return."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from vla_jax.envs.memory_table.memory_table_config import MAX_COUNT
from vla_jax.envs.table import rules
from vla_jax.envs.table.quasi_static import TableState
from vla_jax.types import Key, Recall

NUM_CUPS = 4  # places of cups in an observation
RISEN = 0.08  # m, height of the tool above the table from which the next contact is a new one
INSTRUCTION_STEPS = 4  # steps for which the instruction is given; the arm is held still in them
OFF, WHITE, GREEN = (0.0, 0.0, 0.0), (1.0, 1.0, 0.7), (0.1, 0.9, 0.2)  # the lamp's rgb in [0, 1]


class Cue(NamedTuple):
    """Everything of an episode that the policy must remember; no observation repeats it."""

    colour: Array  # [] int32 index into COLOURS of the block that is meant
    order: Array  # [8] int32 blocks or dots in the order of the task
    places: Array  # [4] int32 place in the layout of each block
    count: Array  # [] int32 repetitions, blinks, swaps, or k
    swaps: Array  # [8, 2] int32 places of the cups that change places
    shown: Array  # [] int32 steps of the shown part
    delay: Array  # [] int32 steps between the shown part and the first action


class TablePlaces(NamedTuple):
    """Places of the objects at the start, metres from the table's centre."""

    blocks: Array  # [4, 2]
    plate: Array  # [2]
    button: Array  # [2]


class Progress(NamedTuple):
    """Events of an episode so far."""

    done: Array  # [] int32 events that count for the task
    since: Array  # [] int32 steps since the last of them
    armed: Array  # [] bool, the hand has risen since the last contact
    last: Array  # [] int32 object of the last contact; -1 = none
    is_up: Array  # [] bool, the block is lifted


class MemoryState(NamedTuple):
    """State of one environment."""

    table: TableState
    layout: TablePlaces
    cue: Cue
    progress: Progress


class Display(NamedTuple):
    """Visible state of everything but the hand, the blocks' poses and the plate."""

    seen: Array  # [4] bool, blocks that are visible
    lamp: Array  # [3] rgb in [0, 1]
    lit: Array  # [4] bool, blocks that light up
    button: Array  # [2] m; zeros where there is none
    cups: Array  # [4, 2] m, one row per place, places in order of x; zeros where there is none
    cups_down: Array  # [] bool
    cups_up: Array  # [4] bool, in the air while they change places
    marker: Array  # [3] x y in m, and 1 where it is visible
    dark: Array  # [] bool, nothing is visible but the hand


class Contacts(NamedTuple):
    """Result of the robot's motion in one step."""

    blocks: Array  # [4] bool, touched or held
    cups: Array  # [4] bool, touched, by place
    button: Array  # [] bool, pressed down


class Verdict(NamedTuple):
    """Judgement of one step."""

    progress: Progress
    success: Array  # [] bool, the task is done
    failed: Array  # [] bool, it cannot be done any more


class MemoryTask(NamedTuple):
    """One task; every function is pure, for one environment, and takes the config first."""

    suite: str  # counting, permanence, reference or procedure
    # config -> (sentence, group of the results) of every instruction
    instructions: Callable[[Any], tuple[tuple[str, str], ...]]
    draw: Callable[[Any, Key], Cue]  # (config, key), consumed -> cue
    instruction: Callable[[Any, Cue], Array]  # -> [] int32 into `instructions`
    max_shown: Callable[[Any], int]  # greatest number of steps of the shown part
    act_steps: Callable[[Any], int]  # steps of the acting part until truncation
    display: Callable[[Any, MemoryState], Display]
    judge: Callable[[Any, MemoryState, Contacts], Verdict]  # of a step of the acting part
    expert: Callable[[Any, MemoryState], Array]  # -> action [7], reads the cue
    recall: Callable[[Any, MemoryState], Recall]  # what the expert knows and no observation repeats
    chance: Callable[[Any], float]  # success rate of the best policy without memory
    # (config, last state as NumPy arrays) -> what must be remembered, for films
    cue_text: Callable[[Any, MemoryState], str]
    # last state as NumPy arrays -> what was done; empty if the state does not show it
    result_text: Callable[[MemoryState], str] = lambda state: ""
    # raised with every change of what is shown, judged or recalled: earlier results do not count
    rules_version: int = 1
    items: int = 1  # default
    updates: int = 1  # default
    most_items: int = rules.NUM_BLOCKS
    least_updates: int = 1  # below it there is nothing to remember
    ends_at_block: bool = False  # whether it is done by touching the block of the cue
    shown_by: tuple[str, ...] = ()  # numbers of `memory_state` that are 0 unless they show the cue
    has_delay: bool = True  # whether the shown part is followed by a delay
    has_blocks: bool = True  # whether the blocks are on the table
    has_cups: bool = False  # whether cups stand at the first `items` places, in order of x
    has_dots: bool = False  # whether there are dots on the table
    uses_gripper: bool = False  # whether gripper commands count; otherwise it is closed
    hand_over_button: bool = False  # whether the hand starts above the button and stays there


def items(task: MemoryTask, config: Any) -> int:
    """Returns the number of items of a config."""
    return config.items or task.items


def updates(task: MemoryTask, config: Any) -> int:
    """Returns the greatest number of updates of a config."""
    return config.updates or task.updates


def make_cue(
    *,
    shown: int | Array,
    colour: Array | int = 0,
    order: Array | None = None,
    places: Array | None = None,
    count: Array | int = 0,
    swaps: Array | None = None,
) -> Cue:
    """Returns a cue with zeros for what is left out; `order [n]` and `swaps [n, 2]` are padded.

    By default every block lies at the place of its own number.
    """

    def pad(part: Array | None, *shape: int) -> Array:
        full = jnp.zeros(shape, jnp.int32)
        return full if part is None else full.at[: len(part)].set(jnp.asarray(part, jnp.int32))

    return Cue(
        colour=jnp.int32(colour),
        order=pad(order, MAX_COUNT),
        places=jnp.arange(rules.NUM_BLOCKS, dtype=jnp.int32) if places is None else places,
        count=jnp.int32(count),
        swaps=pad(swaps, MAX_COUNT, 2),
        shown=jnp.int32(shown),
        delay=jnp.int32(0),
    )


def by_colour(sentence: str, name: str) -> tuple[tuple[str, str], ...]:
    """Returns one instruction per colour, all in the group `name`."""
    return tuple((sentence.format(colour), name) for colour in rules.COLOURS)


def plain_display(
    *,
    seen: Array | None = None,
    lamp: Array | None = None,
    lit: Array | None = None,
    button: Array | None = None,
    cups: Array | None = None,
    cups_down: Array | None = None,
    cups_up: Array | None = None,
    marker: Array | None = None,
    dark: Array | None = None,
) -> Display:
    """Returns the display of the bare table in the light, but for the fields that are given."""
    no = jnp.zeros((), bool)
    return Display(
        seen=jnp.ones(rules.NUM_BLOCKS, bool) if seen is None else seen,
        lamp=jnp.array(OFF) if lamp is None else lamp,
        lit=jnp.zeros(rules.NUM_BLOCKS, bool) if lit is None else lit,
        button=jnp.zeros(2) if button is None else button,
        cups=jnp.zeros((NUM_CUPS, 2)) if cups is None else cups,
        cups_down=no if cups_down is None else cups_down,
        cups_up=jnp.zeros(NUM_CUPS, bool) if cups_up is None else cups_up,
        marker=jnp.zeros(3) if marker is None else marker,
        dark=no if dark is None else dark,
    )


def turn_of(state: MemoryState, *, first: int, steps: int) -> Array:
    """Returns which item is shown now, `[]` int32, if items are shown one after another.

    Args:
      state: of one environment.
      first: step at which the first item appears.
      steps: steps for which each item is shown.

    Returns:
      0 for the first item; negative before it.
    """
    return (state.table.num_steps - first) // steps


def blinks_on(state: MemoryState, *, first: int, count: Array) -> Array:
    """Returns `[]` bool: whether a lamp is on that blinks `count` times, 2 steps on, 2 off."""
    elapsed = state.table.num_steps - first
    return (elapsed >= 0) & (elapsed // 4 < count) & (elapsed % 4 < 2)


def new_contact(state: MemoryState, touched: Array) -> tuple[Array, Array, Progress]:
    """Returns which contact began at this step.

    A contact with the object of the last one counts only after the hand has risen in between.

    Args:
      state: after the motion, with the progress before it.
      touched: `[n]` bool, objects that the hand touches now.

    Returns:
      `[]` bool, a contact began; `[]` int32, its object; and the progress with both recorded.
    """
    progress = state.progress
    numbers = jnp.arange(len(touched))
    fresh = touched & (progress.armed | (numbers != progress.last))
    begins, touched_one = jnp.any(fresh), jnp.argmax(fresh).astype(jnp.int32)
    progress = progress._replace(
        armed=~jnp.any(touched) & (progress.armed | (state.table.tool[2] > RISEN)),
        last=jnp.where(begins, touched_one, progress.last),
    )
    return begins, touched_one, progress


def count_event(progress: Progress, happened: Array) -> Progress:
    """Returns the progress with one more event where one happened."""
    return progress._replace(
        done=progress.done + happened,
        since=jnp.where(happened, 0, progress.since),
    )


def random_below(key: Key, low: int, high: int) -> Array:
    """Returns a random `[]` int32 in `low … high`; `key` is consumed."""
    return jax.random.randint(key, (), low, high + 1)
