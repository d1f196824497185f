"""Demonstrations of a world's own expert, written as a LeRobot v3.0 data set.

    python -m train.record --dataset demos/table --num-episodes 2000
    python -m train.record --preset table_jax --dataset demos/table_jax

The robot is sent the expert's action plus noise while the action without it is recorded: the
states go astray and the labels show the way back (DART, Laskey et al. 2017, arXiv:1703.09327).
With `--disturbance 0.05` bursts of random actions come on top on the MuJoCo table: missed grasps
and lost blocks, and the way back from them.
"""

import math
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import jax
import numpy as np
from rich.progress import track

from vla_jax.command_line import run
from vla_jax.data.dataset import Episode
from vla_jax.data.readers.lerobot import writer
from vla_jax.envs.table import jax_env, mujoco_env, rules
from vla_jax.envs.worlds import make_simulator

BURST = 3  # steps of random actions, gripper too: enough to miss a grasp or lose a block
SHARE = 20  # episodes that a process plays before it hands them over
CHUNK_BYTES = 64e6  # of the episodes of a JAX world that are played side by side; it needs 4x


@dataclass(frozen=True)
class RecordConfig:
    """What to record."""

    dataset: str = "demos/table"  # folder of the data set to write
    world: mujoco_env.TableConfig | jax_env.TableConfig = field(
        default_factory=mujoco_env.TableConfig
    )
    num_episodes: int = 2000  # episodes to play; seeds 0, 1, …
    noise: float = 0.25  # standard deviation on the arm's dims, in units of action
    disturbance: float = 0.0  # probability per step that a burst of random actions starts
    num_processes: int = 0  # MuJoCo worlds side by side; 0 = one per core
    overwrite: bool = False  # replace a data set that is there

    def __post_init__(self):
        """Checks the numbers."""
        if self.num_episodes < 1 or self.num_processes < 0:
            raise ValueError(
                "num_episodes must be >= 1 and num_processes >= 0, got "
                f"{self.num_episodes} and {self.num_processes}."
            )
        if self.noise < 0:
            raise ValueError(f"noise must be >= 0 units of action, got {self.noise}.")
        if not 0 <= self.disturbance <= 1:
            raise ValueError(f"disturbance must be in [0, 1] per step, got {self.disturbance}.")


def mujoco() -> RecordConfig:
    """The MuJoCo table, two cameras of 64 × 64 pixels."""
    return RecordConfig()


def twin() -> RecordConfig:
    """Its pure-JAX twin, for machines without OpenGL; --image-size 0 takes seconds."""
    return RecordConfig(world=jax_env.TableConfig())


PRESETS = {"table_mujoco": mujoco, "table_jax": twin}


def record(config: RecordConfig) -> pathlib.Path:
    """Plays, keeps what succeeded, writes; returns the data set's folder."""
    if isinstance(config.world, jax_env.TableConfig):
        played = _side_by_side(config.world, config)
    else:
        make_simulator(config.world).close()  # what is missing shows itself here, not in a process
        played = _in_processes(config)
    return writer.write(
        config.dataset,
        _successes(played, config.num_episodes),
        fps=rules.CONTROL_HZ,
        robot_type=config.world.kind,
        names={
            "action": rules.ACTION_NAMES,
            "proprio": rules.PROPRIO_NAMES,
            "environment_state": rules.STATE_NAMES,
        },
        overwrite=config.overwrite,
    )


def demonstrate(simulator, seed: int, noise: float, disturbance: float) -> Episode | None:
    """One episode of the expert; None where it failed."""
    observation = simulator.reset(seed)
    rng = np.random.default_rng([seed, 1])  # another stream than the layout's
    observations, actions, burst = [], [], 0
    while True:
        action = simulator.expert()
        observations.append(observation)
        actions.append(action)
        burst = BURST if rng.uniform() < disturbance else burst - 1
        sent = action.copy()
        sent[:-1] += rng.normal(0, noise, len(action) - 1)
        if burst > 0:
            sent = np.append(rng.uniform(-1, 1, len(action) - 1), rng.choice([-1.0, 1.0]))
        step = simulator.step(sent)
        observation = step.observation
        if step.terminated or step.truncated:
            break
    if not step.success:
        return None
    stacked = {name: np.stack([o[name] for o in observations]) for name in observations[0]}
    return Episode(stacked, np.stack(actions), simulator.instruction)


def _successes(played: Iterable[Episode | None], num_episodes: int) -> Iterator[Episode]:
    kept = 0
    for episode in track(played, "record", num_episodes):
        if episode is not None:
            kept += 1
            yield episode
    print(f"kept {kept} of {num_episodes} episodes", file=sys.stderr)


def _side_by_side(world: jax_env.TableConfig, config: RecordConfig) -> Iterator[Episode | None]:
    """Plays a chunk of episodes at once; chunk n is that of key n."""
    env = jax_env.make(world)
    numbers = 4 * (rules.STATE_SIZE + rules.PROPRIO_SIZE + len(rules.ACTION_NAMES))
    episode_bytes = world.max_steps * (6 * world.image_size**2 + numbers)
    chunk = min(config.num_episodes, max(1, int(CHUNK_BYTES / episode_bytes)))
    for number in range(math.ceil(config.num_episodes / chunk)):
        demonstrations = jax.device_get(
            jax_env.collect(env, jax.random.key(number), chunk, noise=config.noise)
        )
        for index in range(min(chunk, config.num_episodes - number * chunk)):
            yield _episode(env.instructions, demonstrations, index)


def _episode(
    instructions: tuple[str, ...], demonstrations: jax_env.Demonstrations, index: int
) -> Episode | None:
    if not demonstrations.success[index]:
        return None
    steps = slice(int(demonstrations.length[index]))
    parts = demonstrations.observation._asdict()
    return Episode(
        {name: part[index, steps] for name, part in parts.items() if part is not None},
        np.asarray(demonstrations.action[index, steps]),
        instructions[int(demonstrations.instruction[index])],
    )


def _in_processes(config: RecordConfig) -> Iterator[Episode | None]:
    """Plays in several processes, each with a simulator of its own."""
    starts = range(0, config.num_episodes, SHARE)
    jobs = [(config, range(start, min(start + SHARE, config.num_episodes))) for start in starts]
    num_processes = config.num_processes or os.cpu_count() or 1
    # spawn: a fork of a process that runs JAX threads may hang.
    with multiprocessing.get_context("spawn").Pool(num_processes, _stay_on_cpu) as pool:
        for episodes in pool.imap(_play, jobs):
            yield from episodes


def _stay_on_cpu() -> None:
    """Keeps the processes off the GPU, most of whose memory the first one would take."""
    jax.config.update("jax_platforms", "cpu")


_SIMULATORS: dict = {}  # of this process: building one takes longer than playing an episode


def _play(job) -> list[Episode | None]:
    config, seeds = job
    if config.world not in _SIMULATORS:
        _SIMULATORS[config.world] = make_simulator(config.world)
    simulator = _SIMULATORS[config.world]
    return [demonstrate(simulator, seed, config.noise, config.disturbance) for seed in seeds]


if __name__ == "__main__":
    run(record, PRESETS, description="Records demonstrations.")
