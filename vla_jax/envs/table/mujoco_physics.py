"""Contact physics of the MuJoCo tables: the arm, four blocks, a plate, and two cameras.

Inverse kinematics by damped least squares gives the joint angles of the tool's goal pose.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vla_jax.actions.rotations import matrix_to_rotation_vector
from vla_jax.envs.table import rules, scene
from vla_jax.envs.table.quasi_static import HandConfig

_CHECKS = 4  # contact checks per control step
_IK_ITERATIONS = 4  # of inverse kinematics per control step
_DAMPING = 1e-3 * np.eye(6)
_POINTS_DOWN = np.diag([1.0, -1.0, -1.0])  # orientation of the hand at roll, pitch, yaw 0
_SLACK = 0.003  # m, greatest distance of the goal from the tool before a guarded action
_UPRIGHT = 0.7  # least vertical part of the direction of a contact from above
_PARKED = 9.0  # m from the table's centre, place of a block that is not on the table


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
    except Exception as error:  # a missing libEGL is an AttributeError deep inside PyOpenGL
        if isinstance(error, ModuleNotFoundError) and error.name == "mujoco":
            raise ImportError(
                "mujoco is missing; run pip install 'vla-jax[sim]', or use --world table_jax."
            ) from error
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


def check_action(action: np.ndarray) -> np.ndarray:
    """Returns an action `[7]`, clipped to [-1, 1].

    Raises:
      ValueError: the action is not 7 finite numbers.
    """
    action = np.asarray(action, np.float64)
    if action.shape != (7,) or not np.all(np.isfinite(action)):
        raise ValueError(
            f"action must be 7 finite numbers {rules.ACTION_NAMES}, got {action.tolist()}."
        )
    return np.clip(action, -1, 1)


class MujocoPhysics:
    """One arm at a table; its owner decides what is asked and what counts as success."""

    def __init__(self, config: HandConfig, *, further: str = ""):
        """Builds the scene.

        Args:
          config: step sizes of the hand.
          further: MJCF of further bodies.
        """
        self._mujoco = mujoco = import_mujoco()
        self._config = config
        self.model = model = mujoco.MjModel.from_xml_string(scene.mjcf(further))
        self.data, self._scratch = mujoco.MjData(model), mujoco.MjData(model)
        self._site = model.site("tool").id
        self._joints = [int(model.joint(c).qposadr[0]) for c in rules.COLOURS]
        self._speeds = [int(model.joint(c).dofadr[0]) for c in rules.COLOURS]
        self._bodies = [int(model.body(c).id) for c in rules.COLOURS]
        self.block_geoms = [int(model.geom(c).id) for c in rules.COLOURS]
        hand = ("left_finger", "right_finger", "palm")
        self._hand_geoms = [int(model.geom(name).id) for name in hand]
        self._renderers = {}

    def reset(
        self,
        plate: np.ndarray,
        blocks: np.ndarray,
        yaws: np.ndarray,
        tool: np.ndarray,
        *,
        opening: float = 1.0,
    ) -> None:
        """Starts an episode.

        Args:
          plate: centre `[2]`, metres from the table's centre.
          blocks: centres `[4, 2]`, metres.
          yaws: angles of the blocks `[4]`, radians.
          tool: x y z roll pitch yaw of the tool, metres and radians.
          opening: of the fingers, in [0, 1].
        """
        model, data = self.model, self.data
        self._mujoco.mj_resetData(model, data)
        centre = np.array(scene.TABLE_CENTRE)
        model.body("plate").pos[:] = centre + np.array([*plate, 0])
        for address, xy, yaw in zip(self._joints, blocks, yaws, strict=True):
            data.qpos[address : address + 3] = centre + np.array([*xy, rules.BLOCK_HALF_SIZE[2]])
            data.qpos[address + 3 : address + 7] = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        self._goal = np.array(tool, np.float64)
        data.qpos[:7] = self._solve(np.array(scene.HOME), self._goal, iterations=30)
        data.qpos[7:9] = scene.FINGER_TRAVEL * opening
        data.ctrl[:] = data.qpos[:9]
        self._mujoco.mj_forward(model, data)

    def drive(self, arm: np.ndarray, opens: bool) -> Iterator[None]:
        """Moves the hand for one tenth of a second; yields a few times, to look for contacts.

        Args:
          arm: `[6]` in [-1, 1].
          opens: whether the fingers open or close.
        """
        self._move_goal(arm)
        travel = scene.FINGER_TRAVEL * opens
        target = np.array([*self._solve(self.data.qpos[:7], self._goal), travel, travel])
        start = self.data.ctrl.copy()
        start[7:] = travel
        for i in range(1, _CHECKS + 1):
            self.data.ctrl[:] = start + (target - start) * (i / _CHECKS)
            self._mujoco.mj_step(self.model, self.data, nstep=scene.SUBSTEPS // _CHECKS)
            yield

    def drive_guarded(
        self, arm: np.ndarray, opens: bool, obstacles: Sequence[int]
    ) -> Iterator[None]:
        """Moves the hand like `drive`, but as an action moves that of the JAX table.

        The servos of `drive` follow the goal with a lag of one control step, 3 cm at full speed,
        and the goal moves on where an object stops the hand. Here the servos also get the goal's
        velocity, which removes the lag, and the hand stops on top of an obstacle. Not for carrying:
        it starts and stops within one step, so that a held block slips in the fingers.

        Args:
          arm: `[6]` in [-1, 1].
          opens: whether the fingers open or close.
          obstacles: numbers of geoms.
        """
        model, data = self.model, self.data
        lags = model.actuator_biasprm[:7, 2] / model.actuator_biasprm[:7, 1]  # kv / kp, seconds
        tool = self.tool()[0]
        self._goal[:3] = tool + np.clip(self._goal[:3] - tool, -_SLACK, _SLACK)
        self._move_goal(arm)
        data.ctrl[7:] = scene.FINGER_TRAVEL * opens
        path, left, on_top = self._plan(scene.SUBSTEPS, data.qvel[:7]), scene.SUBSTEPS, False
        for _ in range(scene.SUBSTEPS):
            position, speed = path[-left]
            data.ctrl[:7] = position + speed * lags
            self._mujoco.mj_step(model, data)
            left -= 1
            if not on_top and left and self._is_on_top(obstacles):
                on_top = True
                self._goal[2] = max(self._goal[2], self.tool()[0][2])
                path = self._plan(left, np.zeros(7))
            yield

    def _plan(self, substeps: int, speed: np.ndarray) -> np.ndarray:
        """Returns a smooth path of the joints to the goal: a cubic whose final speed is its mean.

        Args:
          substeps: number of its points.
          speed: of the joints now `[7]`, rad/s.

        Returns:
          Angles and speeds `[substeps, 2, 7]`, each in the middle of a substep.
        """
        start, duration = self.data.qpos[:7].copy(), substeps * scene.TIMESTEP
        way = self._solve(start, self._goal) - start
        first = speed * duration
        s = ((np.arange(substeps) + 0.5) / substeps)[:, None]
        # p(0) = 0, p'(0) = first, p(1) = p'(1) = way
        square, cube = 2 * (way - first), first - way
        angles = start + first * s + square * s**2 + cube * s**3
        speeds = (first + 2 * square * s + 3 * cube * s**2) / duration
        return np.stack([angles, speeds], axis=1)

    def _is_on_top(self, geoms: Sequence[int]) -> bool:
        """Returns whether the hand stands on a geom: the direction of the contact is upright."""
        return any(
            other in geoms and abs(self.data.contact.frame[number, 2]) > _UPRIGHT
            for _, other, number in self._hand_contacts()
        )

    def _hand_contacts(self) -> list[tuple[int, int, int]]:
        """Returns of each contact of the hand: its part, the other geom, the contact's number."""
        pairs = self.data.contact.geom[: self.data.ncon].tolist()  # NumPy is slower for so few
        both = [(a, b, number) for number, pair in enumerate(pairs) for a, b in (pair, pair[::-1])]
        return [contact for contact in both if contact[0] in self._hand_geoms]

    def park(self, blocks: Sequence[int]) -> None:
        """Moves blocks, given by number, far away from the table."""
        for i in blocks:
            place, speed = self._joints[i], self._speeds[i]
            self.data.qpos[place : place + 7] = [_PARKED, _PARKED + i, 0.02, 1, 0, 0, 0]
            self.data.qvel[speed : speed + 6] = 0
        if len(blocks):
            # the solver's first guess still depends on where the blocks were
            self.data.qacc_warmstart[:] = 0

    def refresh(self) -> None:
        """Computes poses after bodies were moved by hand."""
        self._mujoco.mj_kinematics(self.model, self.data)
        self._mujoco.mj_camlight(self.model, self.data)

    def block_poses(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns centres `[4, 3]`, metres from the table's centre, and yaws `[4]`, radians."""
        matrices = self.data.xmat[self._bodies].reshape(-1, 3, 3)
        yaws = np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0])
        return self.data.xpos[self._bodies] - scene.TABLE_CENTRE, yaws

    def block_speeds(self) -> np.ndarray:
        """Returns the greatest speed of each block along an axis `[4]`, m/s."""
        return np.abs(self.data.cvel[self._bodies, 3:]).max(axis=1)

    def plate(self) -> np.ndarray:
        """Returns the plate's centre `[3]`, metres from the table's centre."""
        return self.model.body("plate").pos - scene.TABLE_CENTRE

    def tool(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tool's position `[3]`, metres, and roll, pitch, yaw `[3]`, radians."""
        position = self.data.site_xpos[self._site] - scene.TABLE_CENTRE
        return position, np.array(_hand_angles(self.data.site_xmat[self._site].reshape(3, 3)))

    def opening(self) -> float:
        """Returns the opening of the fingers in [0, 1]."""
        return self.data.qpos[7:9].sum() / rules.MAX_OPENING

    def touched(self, geoms: Sequence[int]) -> np.ndarray:
        """Returns which geoms touch which part of the hand, `[3, n]` bool.

        Args:
          geoms: numbers of `n` geoms.

        Returns:
          Rows: left finger, right finger, palm.
        """
        touching = {(hand, other) for hand, other, _ in self._hand_contacts()}
        return np.array([[(hand, geom) in touching for geom in geoms] for hand in self._hand_geoms])

    def render(self, camera: str, size: int) -> np.ndarray:
        """Returns an image `[size, size, 3]` uint8 of a camera: primary, wrist or video.

        Raises:
          RuntimeError: there is no OpenGL.
        """
        if size not in self._renderers:
            self._renderers[size] = self._make_renderer(size)
        renderer = self._renderers[size]
        flags = renderer.scene.flags
        for flag in ("SHADOW", "REFLECTION", "SKYBOX"):  # a policy's images have none: 10x faster
            flags[getattr(self._mujoco.mjtRndFlag, f"mjRND_{flag}")] = camera == "video"
        renderer.update_scene(self.data, camera)
        return renderer.render()

    def close(self) -> None:
        """Frees the renderers; mujoco prints a traceback at exit if they are left open."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def _make_renderer(self, size: int):
        # A renderer clears a buffer of this size for every image, however small the image is.
        buffer = self.model.vis.global_
        buffer.offwidth = buffer.offheight = size
        try:
            return self._mujoco.Renderer(self.model, size, size)
        except Exception as error:  # the binding raises whatever the OpenGL loader raised
            raise RuntimeError(_NO_OPENGL.format(_backend(), error)) from error

    def _move_goal(self, arm: np.ndarray) -> None:
        """Moves the goal pose of the tool, which stays within two steps of the tool's position."""
        config = self._config
        goal = self._goal.copy()
        goal[:3] += arm[:3] * config.step_size
        goal[3:] += arm[3:] * config.turn_size
        tool = self.data.site_xpos[self._site] - scene.TABLE_CENTRE
        goal[:3] = tool + np.clip(goal[:3] - tool, -2 * config.step_size, 2 * config.step_size)
        goal[:3] = np.clip(goal[:3], rules.WORKSPACE_LOW, rules.WORKSPACE_HIGH)
        limit = np.array([rules.MAX_TILT, rules.MAX_TILT, rules.MAX_TOOL_YAW])
        goal[3:] = np.clip(goal[3:], -limit, limit)
        self._goal = goal

    def _solve(self, start: np.ndarray, goal: np.ndarray, iterations: int = _IK_ITERATIONS):
        """Returns joint angles `[7]` of the tool pose `goal` (x y z roll pitch yaw)."""
        mujoco, model, data = self._mujoco, self.model, self._scratch
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
