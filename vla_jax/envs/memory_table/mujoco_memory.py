"""The memory table with MuJoCo's contact physics: a `types.Simulator`.

Rules, display and expert are the functions of the JAX twin, on a state that is read from MuJoCo,
and the episode of a seed has the same layout and cue in both twins. While the robot only watches,
the arm is held and no physics runs. Contacts are MuJoCo's: of the hand with blocks, with cups and
with the button, at any of the checks of a step; a hand that holds a block cannot press the button.
Cups and the button stop the hand only, not the blocks.

Where the gripper is not used, an action moves the hand as in the JAX twin, so that replayed actions
give the same successes. Tasks with the gripper have the servos of `table_mujoco`, which lag by one
step: held blocks slip if the hand moves without that lag.

Needs the extra `sim`, and an OpenGL library for the two cameras.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vla_jax.config import checked
from vla_jax.envs.memory_table import memory_rules, scenery, tasks
from vla_jax.envs.memory_table.memory_table_config import MemoryTableConfig
from vla_jax.envs.memory_table.memory_task import NUM_CUPS, Contacts, Display, MemoryState
from vla_jax.envs.table import rules, scene
from vla_jax.envs.table.mujoco_physics import MujocoPhysics, check_action
from vla_jax.envs.table.quasi_static import TableState
from vla_jax.envs.table.renderer import Cylinders
from vla_jax.types import Observation, SimulatorStep, SuccessRule

_BUTTON, _FIRST_CUP = 1, 3  # numbers of cylinders
_COLOURS = tuple(tuple(map(float, rgba.split()[:3])) for rgba in scene.COLOURS.values())
_DIMMED = 4  # the dark in pictures for viewers has 1 / this of the brightness


@dataclass(frozen=True)
@checked()
class MujocoMemoryConfig(MemoryTableConfig):
    """A memory task on the MuJoCo table, whose images need OpenGL."""

    kind: Literal["memory_mujoco"] = "memory_mujoco"

    def __post_init__(self):
        """Checks that the task exists and has so many items."""
        tasks.check(self)


class _View(NamedTuple):
    """Everything of a state that is shown."""

    numbers: Observation
    display: Display
    cylinders: Cylinders
    block_colours: Array  # [4, 3] in [0, 1]
    is_acting: Array  # [] bool


class _Functions(NamedTuple):
    """Compiled functions of the rules."""

    start: Callable[..., MemoryState]
    usable_action: Callable[..., tuple[Array, Array]]
    advance: Callable[..., tuple[MemoryState, memory_rules.Judgement, _View]]
    view: Callable[[MemoryState], _View]
    expert: Callable[[MemoryState], Array]


@functools.cache  # for all simulators of a config
def _functions(config: MujocoMemoryConfig) -> _Functions:
    def view(state: MemoryState) -> _View:
        display = memory_rules.display(config, state)
        return _View(
            numbers=memory_rules.numbers(config, state),
            display=display,
            cylinders=scenery.cylinders(display, has_dots=tasks.get(config.task).has_dots),
            block_colours=scenery.light_up(jnp.array(_COLOURS), display.lit),
            is_acting=memory_rules.is_acting(state),
        )

    def advance(state: MemoryState, table: TableState, touched: Array):
        state, judgement = memory_rules.advance(config, state, table, _contacts(touched))
        return state, judgement, view(state)

    return _Functions(
        start=jax.jit(lambda key: memory_rules.start(config, *jax.random.split(key))),
        usable_action=jax.jit(functools.partial(memory_rules.usable_action, config)),
        advance=jax.jit(advance),
        view=jax.jit(view),
        expert=jax.jit(functools.partial(memory_rules.expert, config)),
    )


class MemoryMujoco:
    """One MuJoCo memory table as a `types.Simulator`."""

    control_hz = rules.CONTROL_HZ
    action_dim = len(rules.ACTION_NAMES)

    def __init__(self, config: MujocoMemoryConfig | None = None):
        self.config = config = config or MujocoMemoryConfig()
        task = tasks.get(config.task)
        self.max_steps = tasks.max_steps(config)
        self.success_rule: SuccessRule = "once"  # success ends the episode
        self.instruction, self.task, self.is_acting = "", "", False
        self._carries = task.uses_gripper
        self._instructions = task.instructions(config)
        self._functions = _functions(config)
        sizes = scenery.sizes(task.has_dots)
        self._physics = MujocoPhysics(config, further=_mjcf(sizes))
        model = self._physics.model
        self._geoms = [int(model.geom(f"scenery_{i}").id) for i in range(len(sizes))]
        # everything that can be touched, in the order of `_contacts`
        self._obstacles = [*self._physics.block_geoms, *self._geoms[: scenery.NUM_FIXED]]
        self._state: Any = None
        self._table: Any = None  # that of the state, as NumPy arrays
        self._drawn, self._images = b"", {}  # the last scene that was rendered, and its images
        if config.image_size:
            self._physics.render("primary", config.image_size)  # a missing OpenGL is an error here

    def reset(self, seed: int) -> Mapping[str, np.ndarray]:
        """Starts the episode of a seed, the same as that of the JAX twin."""
        return self.begin(self._functions.start(jax.random.key(seed)))

    def begin(self, state: MemoryState) -> Mapping[str, np.ndarray]:
        """Starts an episode from a state of `memory_rules.start`, such as of two chosen keys."""
        table = jax.device_get(state.table)
        self.instruction, self.task = self._instructions[int(table.instruction)]
        tool = np.concatenate([table.tool, table.turns])
        blocks = table.blocks[:, :2]
        self._physics.reset(table.plate, blocks, table.yaws, tool, opening=float(table.opening))
        self._park(table)
        self._table, self._drawn = self._read(table), b""
        self._state = state._replace(table=self._table)
        return self._show(jax.device_get(self._functions.view(self._state)))

    def step(self, action: np.ndarray) -> SimulatorStep:
        """Applies `action [7]` for one tenth of a second, unless the robot only watches.

        Raises:
          ValueError: the action is not 7 finite numbers.
        """
        action = check_action(action)
        table = self._table
        touched = np.zeros(rules.NUM_BLOCKS + scenery.NUM_FIXED, bool)
        if self.is_acting:
            self._park(table)  # a block that is not on the table falls
            arm, opens = jax.device_get(self._functions.usable_action(action))
            for _ in self._drive(np.asarray(arm, np.float64), bool(opens)):
                touched |= self._touched()
            table = self._read(table)
        state, judgement, view = self._functions.advance(self._state, table, touched)
        self._state = state
        self._table, judgement, view = jax.device_get((state.table, judgement, view))
        self._park(self._table)
        return SimulatorStep(
            observation=self._show(view),
            reward=float(judgement.success),
            terminated=bool(judgement.terminated),
            truncated=bool(judgement.truncated),
            success=bool(judgement.success),
        )

    def expert(self) -> np.ndarray:
        """Returns the scripted expert's action `[7]`, which depends on the cue."""
        return np.asarray(self._functions.expert(self._state))

    def draw(self, size: int = 256) -> np.ndarray:
        """Returns an image `[size, size, 3]` uint8, with shadows, for viewing; dim in the dark."""
        image = self._physics.render("video", size)
        return image // _DIMMED if self._is_dark else image

    def close(self) -> None:
        """Frees the renderers."""
        self._physics.close()

    def _drive(self, arm: np.ndarray, opens: bool) -> Iterator[None]:
        if self._carries:
            return self._physics.drive(arm, opens)
        return self._physics.drive_guarded(arm, opens, self._obstacles)

    def _park(self, table: TableState) -> None:
        self._physics.park(np.flatnonzero(table.blocks[:, 0] >= scenery.FAR).tolist())

    def _read(self, table: TableState) -> TableState:
        """Returns the table with the poses of MuJoCo; blocks that are not on it stay away."""
        physics = self._physics
        (tool, turns), (centres, yaws) = physics.tool(), physics.block_poses()
        is_away = table.blocks[:, 0] >= scenery.FAR
        return table._replace(
            tool=tool.astype(np.float32),
            turns=turns.astype(np.float32),
            opening=np.float32(physics.opening()),
            blocks=np.where(is_away[:, None], table.blocks, centres).astype(np.float32),
            yaws=np.where(is_away, table.yaws, yaws).astype(np.float32),
            held=self._held(),
        )

    def _held(self) -> np.ndarray:
        """Returns the blocks between the fingers, `[4]` bool."""
        left, right, _ = self._physics.touched(self._physics.block_geoms)
        return left & right

    def _touched(self) -> np.ndarray:
        """Returns which blocks, then cylinders, the hand touches now, `[n]` bool."""
        physics = self._physics
        touched = np.logical_or.reduce(
            physics.touched(self._obstacles)
        )  # over the parts of the hand
        touched[rules.NUM_BLOCKS + _BUTTON] &= not self._held().any()
        return touched

    def _show(self, view: _View) -> Mapping[str, np.ndarray]:
        """Moves and colours the objects, and returns the observation."""
        self.is_acting, self._is_dark = bool(view.is_acting), bool(view.display.dark)
        physics = self._physics
        physics.data.mocap_pos[:] = view.cylinders.centre + np.array(scene.TABLE_CENTRE)
        colours = physics.model.geom_rgba
        colours[self._geoms, :3] = view.cylinders.colour
        colours[physics.block_geoms, :3] = view.block_colours
        colours[physics.block_geoms, 3] = view.display.seen | self._is_dark
        physics.refresh()
        numbers = view.numbers
        parts = {
            "proprio": np.asarray(numbers.proprio),
            "environment_state": np.asarray(numbers.environment_state),
        }
        for name, image in self._render().items():
            parts[name] = image * (not self._is_dark)
        return parts

    def _render(self) -> Mapping[str, np.ndarray]:
        """Returns the images of the cameras: the last ones if nothing has changed since.

        While the robot only watches, most steps look like the one before.
        """
        physics, size = self._physics, self.config.image_size
        if not size:
            return {}
        data, colours = physics.data, physics.model.geom_rgba
        seen = b"".join(part.tobytes() for part in (data.qpos, data.mocap_pos, colours))
        if seen != self._drawn:
            self._images = {
                f"image_{camera}": physics.render(camera, size) for camera in ("primary", "wrist")
            }
            self._drawn = seen  # not if rendering failed
        return self._images


def _contacts(touched: Array) -> Contacts:
    """Returns the contacts of a step in which the hand touched `[n]` blocks and cylinders."""
    blocks, cylinders = jnp.split(touched, [rules.NUM_BLOCKS])
    return Contacts(blocks, cylinders[_FIRST_CUP:], cylinders[_BUTTON])


def _mjcf(sizes: np.ndarray) -> str:
    """Returns the bodies of the cylinders, which `_show` moves.

    Args:
      sizes: radius and height `[n, 2]` in metres.
    """
    solid = (_BUTTON, *range(_FIRST_CUP, _FIRST_CUP + NUM_CUPS))
    return "".join(
        f"""
    <body name="scenery_{i}" mocap="true" pos="0 0 -9">
      <geom name="scenery_{i}" type="cylinder" pos="0 0 {height / 2}" size="{radius} {height / 2}"
        contype="0" conaffinity="{int(i in solid)}"/>
    </body>"""  # the hand's contype is 1, that of blocks 2
        for i, (radius, height) in enumerate(sizes.tolist())
    )
