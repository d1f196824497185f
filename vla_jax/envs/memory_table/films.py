"""Films of the memory tasks: an episode under the expert, as a viewer sees it."""

from typing import NamedTuple

import numpy as np

from vla_jax.envs.memory_table.jax_memory import JaxMemory
from vla_jax.envs.memory_table.mujoco_memory import MemoryMujoco


class Film(NamedTuple):
    """Pictures of one episode of `T` steps."""

    frames: list[np.ndarray]  # T + 1 images [size, size, 3] uint8
    is_acting: list[bool]  # for each frame, False while the robot only watches
    instruction: str
    success: bool


def film_expert(simulator: JaxMemory | MemoryMujoco, seed: int, *, size: int = 128) -> Film:
    """Returns the film of the expert in one episode.

    Args:
      simulator: a memory table; the JAX table draws its observed image, so its config needs
        `image_size > 0`.
      seed: of the episode.
      size: pixels along each side.
    """
    simulator.reset(seed)
    frames, acting = [simulator.draw(size)], [bool(simulator.is_acting)]
    while True:
        step = simulator.step(simulator.expert())
        frames.append(simulator.draw(size))
        acting.append(bool(simulator.is_acting))
        if step.terminated or step.truncated:
            return Film(frames, acting, simulator.instruction, step.success)
