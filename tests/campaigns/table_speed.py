"""Speed of the JAX memory table beside the plain JAX table: steps per second of CPU time.

    python tests/campaigns/table_speed.py

The programs run in turns in one process, so that other work on the machine slows all of them. The
goal is 70 % of the plain table or more.
"""

import time
from collections.abc import Callable

import jax
import numpy as np

from vla_jax.envs.memory_table import memory_env
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.table import jax_env
from vla_jax.envs.table.jax_env import JaxTableConfig
from vla_jax.types import Env, Key

TASKS = ("touch_times", "blinks", "cups_swapped", "lit", "path")
NUM_ENVS, NUM_STEPS, ROUNDS = 1024, 64, 9


def make_program(env: Env) -> Callable[[Key], jax.Array]:
    """Returns a program that plays random actions, and uses all that a step returns."""

    def step(state, key):
        action = jax.random.uniform(key, (NUM_ENVS, 7), minval=-1.0, maxval=1.0)
        state, transition = jax.vmap(env.step)(state, action)
        used = jax.tree.map(lambda part: part.sum(), transition)
        return state, sum(jax.tree.leaves(used))

    def play(key):
        state, _ = jax.vmap(env.reset)(jax.random.split(key, NUM_ENVS))
        return jax.lax.scan(step, state, jax.random.split(key, NUM_STEPS))[1].sum()

    return jax.jit(play)


def main() -> None:
    """Prints a line per task."""
    envs = {"plain table": jax_env.make(JaxTableConfig(image_size=0))}
    envs |= {task: memory_env.make(JaxMemoryConfig(task=task)) for task in TASKS}
    programs = {name: make_program(env) for name, env in envs.items()}
    seconds = {name: [] for name in programs}
    for number in range(-1, ROUNDS):  # the first round compiles
        for name, program in programs.items():
            start = time.process_time()
            program(jax.random.key(number + 1)).block_until_ready()
            if number >= 0:
                seconds[name].append(time.process_time() - start)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    for name, each in median.items():
        rate = NUM_ENVS * NUM_STEPS / each
        print(f"{name:14} {rate:9.0f} steps/s   {median['plain table'] / each:.2f}")


if __name__ == "__main__":
    main()
