"""The memory tasks by name, and what a config of one means."""

from types import MappingProxyType

from vla_jax.config import did_you_mean
from vla_jax.envs.memory_table import counting, lit_blocks, memory_task, permanence, procedures
from vla_jax.envs.memory_table.memory_table_config import MemoryTableConfig
from vla_jax.envs.memory_table.memory_task import MemoryTask

TASKS = MappingProxyType(
    {**counting.MEMBERS, **permanence.MEMBERS, **lit_blocks.MEMBERS, **procedures.MEMBERS}
)
SUITES = tuple(dict.fromkeys(task.suite for task in TASKS.values()))
DELAY_SPREAD = 0.25  # the delay is drawn from its mean ± this share, so that it is no clock


def get(name: str) -> MemoryTask:
    """Returns the task of a name.

    Raises:
      ValueError: there is no task of this name.
    """
    if name not in TASKS:
        raise ValueError(f"unknown memory task '{name}'; {did_you_mean(name, TASKS)}")
    return TASKS[name]


def check(config: MemoryTableConfig) -> None:
    """Raises a ValueError if a config has no meaning for its task."""
    task = get(config.task)
    if memory_task.items(task, config) > task.most_items:
        raise ValueError(
            f"items of task '{config.task}' must be at most {task.most_items}, got {config.items}."
        )
    if task.items > 1 and memory_task.items(task, config) < 2:
        raise ValueError(
            f"items of task '{config.task}' must be at least 2, or 0 for {task.items}, got "
            f"{config.items}."
        )
    if memory_task.updates(task, config) < task.least_updates:
        raise ValueError(
            f"updates of task '{config.task}' must be at least {task.least_updates}, or 0 for "
            f"{task.updates}, got {config.updates}; with fewer there is nothing to remember."
        )


def delay_range(config: MemoryTableConfig) -> tuple[int, int]:
    """Returns the least and the greatest delay of a config, in steps."""
    if not get(config.task).has_delay:
        return 0, 0
    spread = int(DELAY_SPREAD * config.delay)
    return config.delay - spread, config.delay + spread


def max_steps(config: MemoryTableConfig) -> int:
    """Returns the environment steps of the longest episode of a config."""
    task = get(config.task)
    return task.max_shown(config) + delay_range(config)[1] + task.act_steps(config)


def chance(config: MemoryTableConfig) -> float:
    """Returns the success rate in [0, 1] of the best policy without memory."""
    return get(config.task).chance(config)
