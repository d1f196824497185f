"""The MuJoCo table: a seven-joint arm, four coloured blocks and a plate, with contact physics.

A `types.Simulator`. Actions `[dx dy dz droll dpitch dyaw gripper]` in [-1, 1] move the tool at
10 Hz; inverse kinematics by damped least squares gives the joint angles.

Needs the extra `sim`, and an OpenGL library for the two cameras.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from vla_jax.actions.rotations import matrix_to_rotation_vector
from vla_jax.config import checked
from vla_jax.envs.table import expert, rules, scene
from vla_jax.envs.table.table_config import TableConfig
from vla_jax.types import SimulatorStep, SuccessRule

_CHECKS = 4  # contact checks per control step
_IK_ITERATIONS = 4  # of inverse kinematics per control step
_DAMPING = 1e-3 * np.eye(6)
_POINTS_DOWN = np.diag([1.0, -1.0, -1.0])  # orientation of the hand at roll, pitch, yaw 0

_expert = jax.jit(expert.act)


@dataclass(frozen=True)
@checked()
class MujocoTableConfig(TableConfig):
    """The MuJoCo table, whose images need OpenGL."""

    kind: Literal["table_mujoco"] = "table_mujoco"


def import_mujoco() -> Any:
    """Imports mujoco; on Linux without a display it uses the rendering backend EGL.

    Raises:
      ImportError: the package is missing; the message names the extra.
      RuntimeError: there is no OpenGL library.
    """
    before = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = _backend()  # mujoco reads it only while it is imported
    try:
        import mujoco
    except ImportError as error:
        raise ImportError(
            "mujoco is missing; run pip install 'vla-jax[sim]', or use --world table_jax."
        ) from error
    except Exception as error:  # a missing libEGL is an AttributeError deep inside PyOpenGL
        raise RuntimeError(_NO_OPENGL.format(_backend(), error)) from error
    finally:
        if before is None:
            del os.environ["MUJOCO_GL"]
    return mujoco


def _backend() -> str:
    """Returns mujoco's rendering backend: the user's choice, or EGL on Linux without a display."""
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    return os.environ.get("MUJOCO_GL") or ("egl" if headless else "")


_NO_OPENGL = (
    "mujoco found no OpenGL to draw with (MUJOCO_GL={}: {}); run apt-get install libegl1 "
    "libopengl0 libgl1-mesa-dri, or use --world table_jax (in train.record: --preset table_jax), "
    "which needs none."
)


class TableMujoco:
    """One MuJoCo table as a `types.Simulator`."""

    control_hz = rules.CONTROL_HZ
    action_dim = len(rules.ACTION_NAMES)

    def __init__(self, config: MujocoTableConfig | None = None):
        config = config or MujocoTableConfig()
        self._mujoco = mujoco = import_mujoco()
        self.config, self.max_steps = config, config.max_steps
        self.success_rule: SuccessRule = "once"  # success ends the episode
        self.instruction, self.task = "", ""
        self._model = model = mujoco.MjModel.from_xml_string(scene.mjcf())
        self._data, self._scratch = mujoco.MjData(model), mujoco.MjData(model)
        self._site = model.site("tool").id
        self._joints = [int(model.joint(c).qposadr[0]) for c in rules.COLOURS]
        self._bodies = [int(model.body(c).id) for c in rules.COLOURS]
        self._block_geoms = {int(model.geom(c).id): i for i, c in enumerate(rules.COLOURS)}
        self._hand_geoms = {int(model.geom(g).id) for g in ("palm", "left_finger", "right_finger")}
        self._renderers = {}
        if config.image_size:
            self._render("primary", config.image_size)  # a missing OpenGL is an error here

    def reset(self, seed: int) -> Mapping[str, np.ndarray]:
        """Starts the episode of a seed, which determines the layout and the instruction."""
        rng = np.random.default_rng(seed)
        chosen = rules.INSTRUCTIONS[rng.integers(len(rules.INSTRUCTIONS))]
        self.instruction, self.task, self._target = chosen.text, chosen.task, chosen.colour
        self._steps, self._touched = 0, None
        model, data = self._model, self._data
        self._mujoco.mj_resetData(model, data)
        plate, blocks, yaws = sample_layout(rng, self.config.rotated_share)
        centre = np.array(scene.TABLE_CENTRE)
        model.body("plate").pos[:] = centre + np.array([*plate, 0])
        for address, xy, yaw in zip(self._joints, blocks, yaws, strict=True):
            data.qpos[address : address + 3] = centre + np.array([*xy, rules.BLOCK_HALF_SIZE[2]])
            data.qpos[address + 3 : address + 7] = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        self._goal = np.array([*rng.uniform(-0.06, 0.06, 2), rng.uniform(0.16, 0.20), 0, 0, 0])
        data.qpos[:7] = self._solve(np.array(scene.HOME), self._goal, iterations=30)
        data.qpos[7:9] = scene.FINGER_TRAVEL
        data.ctrl[:] = data.qpos[:9]
        self._mujoco.mj_forward(model, data)
        return self._observe()

    def step(self, action: np.ndarray) -> SimulatorStep:
        """Applies `action [7]` for one tenth of a second.

        Raises:
          ValueError: the action is not 7 finite numbers.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.all(np.isfinite(action)):
            raise ValueError(
                f"action must be 7 finite numbers {rules.ACTION_NAMES}, got {action.tolist()}."
            )
        action = np.clip(action, -1, 1)
        self._move_goal(action[:6])
        travel = scene.FINGER_TRAVEL * (action[6] > 0)
        target = np.array([*self._solve(self._data.qpos[:7], self._goal), travel, travel])
        start = self._data.ctrl.copy()
        start[7:] = travel
        for i in range(1, _CHECKS + 1):
            self._data.ctrl[:] = start + (target - start) * (i / _CHECKS)
            self._mujoco.mj_step(self._model, self._data, nstep=scene.SUBSTEPS // _CHECKS)
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
        return self._render("video", size)

    def _render(self, camera: str, size: int) -> np.ndarray:
        if size not in self._renderers:
            self._renderers[size] = self._make_renderer(size)
        renderer = self._renderers[size]
        flags = renderer.scene.flags
        for flag in ("SHADOW", "REFLECTION", "SKYBOX"):  # a policy's images have none: 10x faster
            flags[getattr(self._mujoco.mjtRndFlag, f"mjRND_{flag}")] = camera == "video"
        renderer.update_scene(self._data, camera)
        return renderer.render()

    def close(self) -> None:
        """Frees the renderers; mujoco prints a traceback at exit if they are left open."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def _make_renderer(self, size: int):
        # A renderer clears a buffer of this size for every image, however small the image is.
        buffer = self._model.vis.global_
        buffer.offwidth = buffer.offheight = size
        try:
            return self._mujoco.Renderer(self._model, size, size)
        except Exception as error:  # the binding raises whatever the OpenGL loader raised
            raise RuntimeError(_NO_OPENGL.format(_backend(), error)) from error

    def _observe(self) -> Mapping[str, np.ndarray]:
        size, cameras = self.config.image_size, ("primary", "wrist")
        images = {f"image_{name}": self._render(name, size) for name in cameras if size}
        state = {"proprio": self._proprio(), "environment_state": self._state()}
        self._observation = images | state
        return self._observation

    def _state(self) -> np.ndarray:
        rows = []
        for body in self._bodies:
            matrix = self._data.xmat[body].reshape(3, 3)
            yaw = 2 * np.arctan2(matrix[1, 0], matrix[0, 0])
            position = self._data.xpos[body] - scene.TABLE_CENTRE
            rows += [*position, np.sin(yaw), np.cos(yaw)]
        plate = self._model.body("plate").pos - scene.TABLE_CENTRE
        return np.array([*rows, *plate[:2]], np.float32)

    def _proprio(self) -> np.ndarray:
        position = self._data.site_xpos[self._site] - scene.TABLE_CENTRE
        hand = self._data.site_xmat[self._site].reshape(3, 3)
        roll, pitch, yaw = _hand_angles(hand)
        opening = self._data.qpos[7:9].sum() / rules.MAX_OPENING
        return np.array([*position, np.sin(yaw), np.cos(yaw), roll, pitch, opening], np.float32)

    def _move_goal(self, arm: np.ndarray) -> None:
        """Moves the goal pose of the tool, which stays within two steps of the tool's position."""
        config = self.config
        goal = self._goal.copy()
        goal[:3] += arm[:3] * config.step_size
        goal[3:] += arm[3:] * config.turn_size
        tool = self._data.site_xpos[self._site] - scene.TABLE_CENTRE
        goal[:3] = tool + np.clip(goal[:3] - tool, -2 * config.step_size, 2 * config.step_size)
        goal[:3] = np.clip(goal[:3], rules.WORKSPACE_LOW, rules.WORKSPACE_HIGH)
        limit = np.array([rules.MAX_TILT, rules.MAX_TILT, rules.MAX_TOOL_YAW])
        goal[3:] = np.clip(goal[3:], -limit, limit)
        self._goal = goal

    def _solve(self, start: np.ndarray, goal: np.ndarray, iterations: int = _IK_ITERATIONS):
        """Returns joint angles `[7]` of the tool pose `goal` (x y z roll pitch yaw)."""
        mujoco, model, data = self._mujoco, self._model, self._scratch
        data.qpos[:7] = start
        position = goal[:3] + scene.TABLE_CENTRE
        rotation = _hand_rotation(goal[3:])
        jacobian = np.zeros((6, model.nv))
        low, high = model.jnt_range[:7, 0] + 0.01, model.jnt_range[:7, 1] - 0.01
        for _ in range(iterations):
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], self._site)
            turn = rotation @ data.site_xmat[self._site].reshape(3, 3).T
            offset = position - data.site_xpos[self._site]
            error = np.concatenate([offset, matrix_to_rotation_vector(turn)])
            J = jacobian[:, :7]
            angles = data.qpos[:7] + J.T @ np.linalg.solve(J @ J.T + _DAMPING, error)
            data.qpos[:7] = np.minimum(np.maximum(angles, low), high)
        return data.qpos[:7].copy()

    def _contacts(self) -> set[int]:
        """Returns the blocks in contact with the hand."""
        pairs = self._data.contact.geom[: self._data.ncon]
        return {
            self._block_geoms[int(b)]
            for pair in pairs
            for a, b in (pair, pair[::-1])
            if int(a) in self._hand_geoms and int(b) in self._block_geoms
        }

    def _note_touch(self) -> None:
        if self._touched is None and (touched := self._contacts()):
            right = self._target in touched
            self._touched = self._target if right else min(touched)

    def _finished_block(self) -> int | None:
        """Returns the block, right or wrong, that the task was done with; None if none."""
        if self.task == "touch":
            return self._touched
        height = self._data.xpos[self._bodies, 2] - rules.BLOCK_HALF_SIZE[2]
        if self.task == "lift":
            done = height > rules.LIFT_HEIGHT
        else:
            plate = self._model.body("plate").pos
            away = np.linalg.norm(self._data.xpos[self._bodies, :2] - plate[:2], axis=1)
            speed = np.abs(self._data.cvel[self._bodies, 3:]).max(axis=1)
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


# Not `actions.rotations`, which rounds the last bit of float64 differently: contact physics would
# amplify that, and the episodes of earlier evaluations could not be reproduced.
def _hand_rotation(angles: np.ndarray) -> np.ndarray:
    """Returns the rotation matrix `[3, 3]` of the hand with these roll, pitch, yaw."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(angles), np.sin(angles)
    yaw = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    pitch = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    roll = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return yaw @ pitch @ roll @ _POINTS_DOWN


def _hand_angles(matrix: np.ndarray) -> tuple[float, float, float]:
    """Returns roll, pitch, yaw of the hand; the inverse of `_hand_rotation`."""
    m = matrix @ _POINTS_DOWN
    pitch = np.arcsin(np.clip(-m[2, 0], -1, 1))
    return np.arctan2(m[2, 1], m[2, 2]), pitch, np.arctan2(m[1, 0], m[0, 0])
