"""The MuJoCo table: a seven-joint arm, four coloured blocks and a plate, with contact physics.

A `types.Simulator`. Actions `[dx dy dz droll dpitch dyaw gripper]` in [-1, 1] move the tool at
10 Hz.

Needs the extra `sim`, and an OpenGL library for the two cameras.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from vla_jax.config import checked
from vla_jax.envs.table import expert, rules
from vla_jax.envs.table.mujoco_physics import MujocoPhysics, check_action
from vla_jax.envs.table.table_config import TableConfig
from vla_jax.types import SimulatorStep, SuccessRule

_expert = jax.jit(expert.act)


@dataclass(frozen=True)
@checked()
class MujocoTableConfig(TableConfig):
    """The MuJoCo table, whose images need OpenGL."""

    kind: Literal["table_mujoco"] = "table_mujoco"


class TableMujoco:
    """One MuJoCo table as a `types.Simulator`."""

    control_hz = rules.CONTROL_HZ
    action_dim = len(rules.ACTION_NAMES)

    def __init__(self, config: MujocoTableConfig | None = None):
        config = config or MujocoTableConfig()
        self.config, self.max_steps = config, config.max_steps
        self.success_rule: SuccessRule = "once"  # success ends the episode
        self.instruction, self.task = "", ""
        self._physics = MujocoPhysics(config)
        if config.image_size:
            self._physics.render("primary", config.image_size)  # a missing OpenGL is an error here

    def reset(self, seed: int) -> Mapping[str, np.ndarray]:
        """Starts the episode of a seed, which determines the layout and the instruction."""
        rng = np.random.default_rng(seed)
        chosen = rules.INSTRUCTIONS[rng.integers(len(rules.INSTRUCTIONS))]
        self.instruction, self.task, self._target = chosen.text, chosen.task, chosen.colour
        self._steps, self._touched = 0, None
        plate, blocks, yaws = sample_layout(rng, self.config.rotated_share)
        tool = np.array([*rng.uniform(-0.06, 0.06, 2), rng.uniform(0.16, 0.20), 0, 0, 0])
        self._physics.reset(plate, blocks, yaws, tool)
        return self._observe()

    def step(self, action: np.ndarray) -> SimulatorStep:
        """Applies `action [7]` for one tenth of a second.

        Raises:
          ValueError: the action is not 7 finite numbers.
        """
        action = check_action(action)
        for _ in self._physics.drive(action[:6], bool(action[6] > 0)):
            if self.task == "touch":
                self._note_touch()
        self._steps += 1
        done = self._finished_block()
        success = done == self._target
        return SimulatorStep(
            observation=self._observe(),
            reward=float(success),
            terminated=done is not None,
            truncated=done is None and self._steps >= self.max_steps,
            success=success,
        )

    def expert(self, *, target: int | None = None) -> np.ndarray:
        """Returns the scripted expert's action `[7]`.

        Args:
          target: index in `rules.COLOURS` of the block to reach for; None means the instruction's.
        """
        action = _expert(
            self._observation["environment_state"],
            self._observation["proprio"],
            rules.TASKS.index(self.task),
            self._target if target is None else target,
            step_size=self.config.step_size,
            turn_size=self.config.turn_size,
        )
        return np.asarray(action)

    def draw(self, size: int = 256) -> np.ndarray:
        """Returns an image `[size, size, 3]` uint8, with shadows, for viewing."""
        return self._physics.render("video", size)

    def close(self) -> None:
        """Frees the renderers."""
        self._physics.close()

    def _observe(self) -> Mapping[str, np.ndarray]:
        size, cameras = self.config.image_size, ("primary", "wrist")
        images = {f"image_{name}": self._physics.render(name, size) for name in cameras if size}
        state = {"proprio": self._proprio(), "environment_state": self._state()}
        self._observation = images | state
        return self._observation

    def _state(self) -> np.ndarray:
        centres, yaws = self._physics.block_poses()
        turned = np.stack([np.sin(2 * yaws), np.cos(2 * yaws)], axis=1)
        rows = np.concatenate([centres, turned], axis=1).ravel()
        return np.array([*rows, *self._physics.plate()[:2]], np.float32)

    def _proprio(self) -> np.ndarray:
        position, (roll, pitch, yaw) = self._physics.tool()
        opening = self._physics.opening()
        return np.array([*position, np.sin(yaw), np.cos(yaw), roll, pitch, opening], np.float32)

    def _contacts(self) -> set[int]:
        """Returns the blocks in contact with the hand."""
        touching = self._physics.touched(self._physics.block_geoms).any(axis=0)
        return set(np.flatnonzero(touching).tolist())

    def _note_touch(self) -> None:
        if self._touched is None and (touched := self._contacts()):
            right = self._target in touched
            self._touched = self._target if right else min(touched)

    def _finished_block(self) -> int | None:
        """Returns the block, right or wrong, that the task was done with; None if none."""
        if self.task == "touch":
            return self._touched
        centres, _ = self._physics.block_poses()
        height = centres[:, 2] - rules.BLOCK_HALF_SIZE[2]
        if self.task == "lift":
            done = height > rules.LIFT_HEIGHT
        else:
            away = np.linalg.norm(centres[:, :2] - self._physics.plate()[:2], axis=1)
            speed = self._physics.block_speeds()
            done = (away < rules.PLACE_DISTANCE) & (height < 0.02) & (speed < 0.05)
            done[list(self._contacts())] = False
        if done[self._target]:
            return self._target
        return int(np.argmax(done)) if done.any() else None


def sample_layout(rng: np.random.Generator, rotated_share: float):
    """Returns random positions of the plate and the blocks that keep their distances.

    Args:
      rng: source of randomness; advanced.
      rotated_share: share of layouts in which every block is rotated, in [0, 1].

    Returns:
      plate `[2]`, blocks `[4, 2]` in metres from the table's centre, yaws `[4]` in radians.
    """
    half = rules.LAYOUT_HALF_SIZE
    while True:
        points = rng.uniform(-half, half, (1 + rules.NUM_BLOCKS, 2))
        distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
        np.fill_diagonal(distance, np.inf)
        if distance[0].min() > rules.PLATE_SPACING and distance[1:, 1:].min() > (
            rules.LAYOUT_SPACING
        ):
            break
    turned = rng.uniform() < rotated_share
    yaws = rng.uniform(-rules.MAX_YAW, rules.MAX_YAW, rules.NUM_BLOCKS) * turned
    return points[0], points[1:], yaws
