"""Demonstrations of a world's own expert, written as a LeRobot v3.0 data set.

    python -m train.record --dataset demos/table --num-episodes 2000

The robot is sent the expert's action plus noise while the action without it is recorded: the
states go astray and the labels show the way back (DART, Laskey et al. 2017, arXiv:1703.09327).
Episodes that fail are not kept.
"""

import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from rich.progress import track

from train.command_line import command_line
from vla_jax.data import lerobot_writer
from vla_jax.data.dataset import Episode
from vla_jax.envs import table
from vla_jax.envs.table_jax import TableConfig as JaxTableConfig
from vla_jax.envs.table_mujoco import TableConfig as MujocoTableConfig
from vla_jax.envs.worlds import WorldConfig, make_simulator

SHARE = 20  # episodes that a process plays before it hands them over


@dataclass(frozen=True)
class RecordConfig:
    """What to record."""

    dataset: str = "demos/table"  # folder of the data set to write
    world: WorldConfig = field(default_factory=MujocoTableConfig)
    num_episodes: int = 2000  # episodes to play; seeds 0, 1, …
    noise: float = 0.25  # standard deviation on the arm's dims, in units of action
    num_processes: int = 0  # worlds side by side; 0 = one per core
    overwrite: bool = False  # replace a data set that is there


def table_mujoco() -> RecordConfig:
    """The MuJoCo table, two cameras of 64 × 64 pixels."""
    return RecordConfig()


def table_jax() -> RecordConfig:
    """Its pure-JAX twin, for machines without OpenGL."""
    return RecordConfig(world=JaxTableConfig())


PRESETS = {"table_mujoco": table_mujoco, "table_jax": table_jax}


def record(config: RecordConfig) -> pathlib.Path:
    """Plays, keeps what succeeded, writes; returns the data set's folder."""
    probe = make_simulator(config.world)  # what is missing shows itself here, not in a process
    probe.close()
    return lerobot_writer.write(
        config.dataset,
        _successes(config),
        fps=probe.control_hz,
        robot_type=config.world.kind,
        names={
            "action": table.ACTION_NAMES,
            "proprio": table.PROPRIO_NAMES,
            "environment_state": table.STATE_NAMES,
        },
        overwrite=config.overwrite,
    )


def demonstrate(simulator, seed: int, noise: float) -> Episode | None:
    """One episode of the expert; None where it failed."""
    observation = simulator.reset(seed)
    rng = np.random.default_rng([seed, 1])  # another stream than the layout's
    observations, actions = [], []
    while True:
        action = simulator.expert()
        observations.append(observation)
        actions.append(action)
        sent = action.copy()
        sent[:-1] += rng.normal(0, noise, len(action) - 1)
        step = simulator.step(sent)
        observation = step.observation
        if step.terminated or step.truncated:
            break
    if not step.success:
        return None
    stacked = {name: np.stack([o[name] for o in observations]) for name in observations[0]}
    return Episode(stacked, np.stack(actions), simulator.instruction)


def _successes(config: RecordConfig) -> Iterator[Episode]:
    starts = range(0, config.num_episodes, SHARE)
    jobs = [
        (config.world, range(start, min(start + SHARE, config.num_episodes)), config.noise)
        for start in starts
    ]
    kept = 0
    for episodes in track(_in_processes(jobs, config.num_processes), "record", len(jobs)):
        for episode in episodes:
            if episode is not None:
                kept += 1
                yield episode
    print(f"kept {kept} of {config.num_episodes} episodes", file=sys.stderr)


def _in_processes(jobs: list, num_processes: int) -> Iterable[list[Episode | None]]:
    num_processes = num_processes or os.cpu_count() or 1
    # spawn: a fork of a process that runs JAX threads may hang.
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        yield from pool.imap(_play, jobs)


_SIMULATORS: dict = {}  # of this process: building one takes longer than playing an episode


def _play(job) -> list[Episode | None]:
    world, seeds, noise = job
    if world not in _SIMULATORS:
        _SIMULATORS[world] = make_simulator(world)
    return [demonstrate(_SIMULATORS[world], seed, noise) for seed in seeds]


if __name__ == "__main__":
    print(record(command_line(PRESETS, description="Records demonstrations.")))
