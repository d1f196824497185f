"""The options that both memory tables share."""

from dataclasses import dataclass

from vla_jax.config import checked

MAX_DELAY = 100_000  # greatest mean number of steps to remember
MAX_COUNT = 8  # greatest number of items, swaps or repetitions


@dataclass(frozen=True)
@checked(
    delay=(0, MAX_DELAY),
    items=(0, MAX_COUNT),
    updates=(0, MAX_COUNT),
    step_size=(1e-4, 1.0),
    turn_size=(1e-4, 3.2),
)
class MemoryTableConfig:
    """A memory task on a table; both cameras give square images.

    Three axes of difficulty: `delay` is how long something must be remembered, `items` how much,
    `updates` how often it changes. Each task uses some of them.
    """

    kind: str  # name of the simulator, fixed by each subclass
    task: str = "lit"  # name of the task, of `tasks.TASKS`
    delay: int = 16  # mean environment steps between what is shown and the first action
    items: int = 0  # blocks, dots or cups to remember; 0 = the task's default
    updates: int = 0  # greatest number of repetitions, blinks or swaps; 0 = the task's default
    image_size: int = 0  # pixels of both cameras; 0 = no images
    step_size: float = 0.03  # metres per unit of action and step
    turn_size: float = 0.2  # radians per unit of action and step
