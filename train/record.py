"""Records demonstrations of a simulator's scripted expert as a LeRobot v3.0 data set.

    python -m train.record --dataset demos/table --num-episodes 2000
    python -m train.record --preset table_jax --dataset demos/table_jax
    python -m train.record --preset memory_mujoco --task cups --dataset demos/cups

The robot executes the expert's action plus noise, while the action without noise is recorded. The
data thus covers states off the expert's path, with labels that lead back to it (DART, Laskey et al.
2017, arXiv:1703.09327). On the MuJoCo table, `--disturbance 0.05` adds bursts of random actions,
which cause missed grasps and dropped blocks, and recoveries from them. `--wander-steps 12` begins
each episode with a random motion of up to 12 steps, so that the path of the hand does not show the
goal to policies that remember it (`envs.demonstrations.collect`).
"""

import contextlib
import math
import os
import pathlib
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from vla_jax import compile_cache, workers
from vla_jax import config as configs
from vla_jax.command_line import run
from vla_jax.config import checked
from vla_jax.data.dataset import Episode
from vla_jax.data.readers.lerobot import writer
from vla_jax.envs import worlds
from vla_jax.envs.demonstrations import WANDER_STEPS, Demonstrations, collect
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.mujoco_memory import MujocoMemoryConfig
from vla_jax.envs.table import jax_env, mujoco_env
from vla_jax.training.progress import progress_bar
from vla_jax.types import Env

BURST = 3  # steps of random actions, gripper included: enough to miss a grasp or drop a block
EPISODES_PER_JOB = 20  # episodes per job of a process
SETTINGS = "record.json"  # file in the data set with the config of its recording
OnEpisode = Callable[[int], None]
CHUNK_BYTES = 64e6  # bytes of the episodes played at once in JAX; peak memory is 4 times that


@dataclass(frozen=True)
@checked(wander_steps=(0, 100_000))
class RecordConfig:
    """Config of a recording of demonstrations."""

    dataset: str = "demos/table"  # folder of the data set to write
    # environment to record in
    world: worlds.WorldConfig = field(default_factory=mujoco_env.MujocoTableConfig)
    num_episodes: int = 2000  # episodes to play, with seeds 0, 1, …; only successes are kept
    noise: float = 0.25  # standard deviation of the noise on the arm dims, in action units
    disturbance: float = 0.0  # probability per step that a burst of random actions begins
    # greatest number of steps of a random motion at the start, for policies with memory
    wander_steps: int = 0
    num_processes: int = 0  # processes with a MuJoCo simulator each; 0 = one per core
    overwrite: bool = False  # replace an existing data set

    def __post_init__(self):
        """Checks the numbers."""
        if self.num_episodes < 1:
            raise ValueError(f"num_episodes must be at least 1, got {self.num_episodes}.")
        if self.noise < 0:
            raise ValueError(f"noise must be >= 0 units of action, got {self.noise}.")
        if not 0 <= self.disturbance <= 1:
            raise ValueError(f"disturbance must be in [0, 1] per step, got {self.disturbance}.")


def mujoco_table() -> RecordConfig:
    """The MuJoCo table with two cameras of 64 × 64 pixels."""
    return RecordConfig()


def jax_table() -> RecordConfig:
    """The JAX table, which needs no OpenGL; takes seconds with --image-size 0."""
    return RecordConfig(world=jax_env.JaxTableConfig())


def mujoco_memory_task() -> RecordConfig:
    """A memory task on the MuJoCo table, with images: --task lit; steps of watching are masked."""
    return RecordConfig(
        "demos/memory",
        MujocoMemoryConfig(image_size=64),
        num_episodes=1800,
        wander_steps=WANDER_STEPS,
    )


def jax_memory_task() -> RecordConfig:
    """A memory task on the JAX table, from its state unless --image-size is above 0."""
    return RecordConfig(
        "demos/memory_jax", JaxMemoryConfig(), num_episodes=1000, wander_steps=WANDER_STEPS
    )


PRESETS = {
    "table_mujoco": mujoco_table,
    "table_jax": jax_table,
    "memory_mujoco": mujoco_memory_task,
    "memory_jax": jax_memory_task,
}


def record(config: RecordConfig, *, on_episode: OnEpisode | None = None) -> pathlib.Path:
    """Records the successful episodes of the expert; returns the data set's folder.

    Args:
      config: options.
      on_episode: called after every episode with the number of episodes so far.

    Raises:
      ValueError: the environment has no expert.
      RuntimeError: a process was killed.
    """
    world = worlds.get(config.world.kind)
    if "expert" not in world.references:
        raise ValueError(
            f"world must have an expert to record, got '{config.world.kind}'; choose another world."
        )
    simulator = world.make_simulator(config.world)  # a missing package is an error here
    control_hz = simulator.control_hz
    simulator.close()
    if world.make_env:
        played = _in_parallel(world.make_env(config.world), config)
    else:
        played = _in_processes(config)
    with contextlib.closing(played):  # ends its processes, after an error too
        return writer.write(
            config.dataset,
            _successes(played, config.num_episodes, on_episode),
            fps=control_hz,
            robot_type=config.world.kind,
            names=world.names,
            overwrite=config.overwrite,
            finish=lambda folder: configs.save(config, folder / SETTINGS),
        )


def is_recorded(config: RecordConfig) -> bool:
    """Returns True if the data set exists.

    Raises:
      ValueError: it was recorded with other settings, or by another program.
    """
    folder = pathlib.Path(config.dataset)
    if not (folder / "meta" / "info.json").exists():
        return False
    settings = folder / SETTINGS
    saved = configs.load(RecordConfig, settings) if settings.exists() else None
    if saved is None:
        raise ValueError(
            f"data set {folder} must have the {SETTINGS} of a recording, got none; choose another "
            "folder."
        )
    same = {"dataset": config.dataset, "num_processes": config.num_processes, "overwrite": False}
    changed = configs.differences(
        configs.to_dict(replace(saved, **same)), configs.to_dict(replace(config, overwrite=False))
    )
    if changed:
        raise ValueError(
            f"data set {folder} was recorded with other settings: {'; '.join(changed)}; choose "
            "another folder, or delete this one."
        )
    return True


def demonstrate(
    simulator, seed: int, noise: float, disturbance: float, wander_steps: int = 0
) -> Episode | None:
    """Plays one episode of the expert; returns None if it failed.

    Args:
      simulator: with an expert.
      seed: of the episode.
      noise: as in `RecordConfig`, like the next two.
      disturbance: probability of a burst.
      wander_steps: greatest number of steps of the motion at the start.
    """
    observation = simulator.reset(seed)
    rng = np.random.default_rng([seed, 1])  # independent of the layout's random stream
    wander_rng = np.random.default_rng([seed, 2])  # the noise is the same with and without it
    wandering = int(wander_rng.integers(wander_steps + 1))
    motion = wander_rng.uniform(-1, 1, len(simulator.expert()) - 1)
    observations, actions, masks, burst = [], [], [], 0
    while True:
        action = simulator.expert()
        observations.append(observation)
        actions.append(action)
        masks.append(getattr(simulator, "is_acting", None))  # an attribute that it may lack
        burst = BURST if rng.uniform() < disturbance else burst - 1
        noisy_action = action.copy()
        if wandering > 0:
            noisy_action[:-1] = motion
            if masks[-1] is None or masks[-1]:  # a robot that only watches does not move yet
                wandering -= 1
        noisy_action[:-1] += rng.normal(0, noise, len(action) - 1)
        if burst > 0:
            noisy_action = np.append(rng.uniform(-1, 1, len(action) - 1), rng.choice([-1.0, 1.0]))
        step = simulator.step(noisy_action)
        observation = step.observation
        if step.terminated or step.truncated:
            break
    if not step.success:
        return None
    stacked = {name: np.stack([o[name] for o in observations]) for name in observations[0]}
    mask = None if masks[0] is None else np.array(masks)
    return Episode(stacked, np.stack(actions), simulator.instruction, mask)


def _successes(
    played: Iterable[Episode | None], num_episodes: int, on_episode: OnEpisode | None
) -> Iterator[Episode]:
    num_successes = 0
    with progress_bar("record", num_episodes, unit="episodes") as show:
        for count, episode in enumerate(played, 1):
            if episode is not None:
                num_successes += 1
                yield episode
            show(count, f"{num_successes} kept")
            if on_episode:
                on_episode(count)
    print(f"kept {num_successes} of {num_episodes} episodes", file=sys.stderr)


def _in_parallel(env: Env, config: RecordConfig) -> Generator[Episode | None, None, None]:
    """Plays chunks of episodes in parallel on the device; chunk n uses random key n."""
    shapes = jax.eval_shape(lambda key: collect(env, key, 1), jax.random.key(0))
    arrays = jax.tree.leaves((shapes.observation, shapes.action))
    episode_bytes = sum(array.size * array.dtype.itemsize for array in arrays)
    chunk = min(config.num_episodes, max(1, int(CHUNK_BYTES / episode_bytes)))
    for number in range(math.ceil(config.num_episodes / chunk)):
        played = collect(
            env,
            jax.random.key(number),
            chunk,
            noise=config.noise,
            wander_steps=config.wander_steps,
        )
        demonstrations = jax.device_get(played)
        for index in range(min(chunk, config.num_episodes - number * chunk)):
            yield _episode(env, demonstrations, index)


def _episode(env: Env, demonstrations: Demonstrations, index: int) -> Episode | None:
    if not demonstrations.success[index]:
        return None
    steps = slice(int(demonstrations.length[index]))
    columns = demonstrations.observation._asdict()
    return Episode(
        {name: column[index, steps] for name, column in columns.items() if column is not None},
        np.asarray(demonstrations.action[index, steps]),
        env.instructions[int(demonstrations.instruction[index, 0])],
        np.asarray(demonstrations.is_acting[index, steps]) if env.is_acting else None,
    )


def _in_processes(config: RecordConfig) -> Generator[Episode | None, None, None]:
    """Plays episodes in several processes with one simulator each."""
    starts = range(0, config.num_episodes, EPISODES_PER_JOB)
    stops = (min(start + EPISODES_PER_JOB, config.num_episodes) for start in starts)
    jobs = [(config, range(*seeds)) for seeds in zip(starts, stops, strict=True)]
    num_processes = config.num_processes or os.cpu_count() or 1
    pool = ProcessPoolExecutor(min(num_processes, len(jobs)), workers.CONTEXT, _start_process)
    try:
        for episodes in pool.map(_play, jobs):
            yield from episodes
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that played episodes was killed, perhaps for lack of memory; record again "
            "with fewer --num-processes."
        ) from error
    except BaseException:  # the recording ends early
        workers.kill_all()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    """Keeps JAX of this process on the CPU, and OpenGL in software on one core."""
    compile_cache.protect()
    jax.config.update("jax_platforms", "cpu")  # else it would reserve most of the GPU's memory
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's threads would contend for busy cores


_SIMULATORS: dict = {}  # reused by this process: building one takes longer than an episode


def _play(job) -> list[Episode | None]:
    config, seeds = job
    if config.world not in _SIMULATORS:
        _SIMULATORS[config.world] = worlds.make_simulator(config.world)
    simulator = _SIMULATORS[config.world]
    return [
        demonstrate(simulator, seed, config.noise, config.disturbance, config.wander_steps)
        for seed in seeds
    ]


if __name__ == "__main__":
    run(record, PRESETS, description="Records demonstrations of a scripted expert.")
