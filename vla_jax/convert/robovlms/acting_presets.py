"""Acting like RoboVLMs: settings under which a head of theirs sends what their wrapper sends.

    stats = {"action": robovlms.calvin_stats()}
    agent = make_agent(robovlms.calvin(policy_config), stats)

Their wrapper shows the text at every step, remembers the last W frames (`history_type` "post",
W the decoder's `window_size`) and sends the first action of every chunk. It forgets at the start
of an episode and whenever the instruction changes: give the agent a `reset` there. Training
wants the same statistics and the config's `normalize` and `tool_frame`.

Source: Liu et al. 2024, RoboVLMs (arXiv:2412.14058), its wrappers for CALVIN and SIMPLER.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.acting.agent import AgentConfig
from vla_jax.actions import reference_frames
from vla_jax.actions.execution import ExecutionConfig, GripperRule
from vla_jax.actions.reference_frames import ToolFrame
from vla_jax.config import did_you_mean
from vla_jax.data.normalize import NormalizeConfig, NormStats, fixed_bounds
from vla_jax.data.windows import ALWAYS
from vla_jax.policies.policy import PolicyConfig
from vla_jax.types import Array

Robot = Literal["google_robot", "widowx"]
LIMIT = 0.65  # norm_max = -norm_min of all their configs
CALVIN_FRAME = ToolFrame(delta="euler_difference", radians=1 / 20)  # robot_obs, rel_actions
_RULES: dict[Robot, GripperRule] = {"google_robot": "repeat_change", "widowx": "open_late"}


def calvin(policy: PolicyConfig, *, tool_frame: bool = False, mu: float = 0.0) -> AgentConfig:
    """How they act on CALVIN; its actions are the commands, [-1, 1] with dx·50 and droll·20.

    Args:
      policy: what acts.
      tool_frame: the policy was trained on actions in the tool's frame; proprio is then CALVIN's
        `robot_obs`, and `calvin_tool_stats` the statistics of a head of theirs. Their `tcp_rel`
        has another scale and the inverse rotation, and no released checkpoint uses it.
      mu: μ of the μ-law, their `mu_val` where `use_mu_law` is set; 0 = none.
    """
    return AgentConfig(
        policy=policy,
        normalize=NormalizeConfig(action="bounds", action_mu=mu),
        instruction_steps=ALWAYS,
        mode="refresh",
        tool_frame=CALVIN_FRAME if tool_frame else None,
    )


def calvin_stats(limit: float = LIMIT, *, action_dim: int = 7) -> NormStats:
    """Statistics of CALVIN's actions, clipped to ±`limit`."""
    return fixed_bounds(-limit, limit, action_dim)


def calvin_tool_stats(limit: float = LIMIT) -> NormStats:
    """Statistics of CALVIN's actions in the tool's frame, for `calvin(policy, tool_frame=True)`.

    Their wrapper takes such actions to be metres and radians within ±`limit` and multiplies them
    by 50 and 20 (its branch `raw_calvin=False`); in CALVIN's units that is ±50 · `limit` of the
    position, ±20 · `limit` of the angles.

    Args:
      limit: at which their actions were clipped, metres and radians.
    """
    high = np.array([50 * limit] * 3 + [20 * limit] * 3 + [1.0])
    return fixed_bounds(-high, high, 7)


def simpler(policy: PolicyConfig, robot: Robot, *, gripper_steps: int = 2) -> AgentConfig:
    """How they act on SIMPLER; `simpler_command` turns the actions into its commands.

    Args:
      policy: what acts.
      robot: "google_robot" or "widowx".
      gripper_steps: for which a change of the Google robot's gripper is sent, or of which the
        WidowX's waits for the last before it opens; SIMPLER's Octo has 15 and 1.

    Raises:
      ValueError: an unknown robot.
    """
    _check_robot(robot)
    return AgentConfig(
        policy=policy,
        normalize=NormalizeConfig(action="quantiles"),
        execution=ExecutionConfig(gripper_rule=_RULES[robot], gripper_steps=gripper_steps),
        instruction_steps=ALWAYS,
        mode="refresh",
    )


def oxe_stats(data: Mapping[str, Any]) -> NormStats:
    """Statistics of the actions, from a file of theirs or of OpenVLA about one data set.

    Args:
      data: its JSON, with lists of `mean`, `std`, `min`, `max`, `q01`, `q99` under `action`.

    Raises:
      ValueError: a statistic is missing, or a number of the arm is not to be normalised.
    """
    action = data.get("action", {})
    names = [name for name in NormStats._fields if name != "count"]
    missing = [name for name in names if name not in action]
    if missing:
        raise ValueError(
            f"action must have the statistics {names}, {missing} missing; give the data set's "
            "own entry of the file."
        )
    if not all(action.get("mask", [])[:-1]):
        raise ValueError(
            f"mask must be true for every number of the arm, got {action['mask']}; give those "
            "numbers q01 = -1 and q99 = 1 instead."
        )
    arrays = {name: np.asarray(action[name], np.float32) for name in names}
    return NormStats(**arrays, count=int(data.get("num_transitions", 0)))


def released_oxe_stats(stats: NormStats, limit: float = LIMIT) -> NormStats:
    """Statistics for the checkpoints that were trained on twice normalised actions.

    Their Open X-Embodiment data come as [q01, q99] → [-1, 1] and were then cut at ±0.65 and
    stretched again, which loses the larger motions. Heads trained so speak of the middle 65 % of
    [q01, q99], and need these statistics to be understood; do not train new ones with them.

    Args:
      stats: from `oxe_stats`.
      limit: at which the normalised actions were cut.
    """
    middle, half = (stats.q01 + stats.q99) / 2, (stats.q99 - stats.q01) / 2
    low, high = middle - limit * half, middle + limit * half
    return stats._replace(min=low, max=high, q01=low, q99=high)


def simpler_command(action: Array, robot: Robot) -> jax.Array:
    """What SIMPLER's environments take: the turn as axis times angle, their own gripper.

    Args:
      action: `[..., 7]`, of an agent with the config of `simpler`.
      robot: "google_robot" or "widowx".

    Returns:
      `[..., 7]`: dx dy dz in metres; axis times angle, radians; gripper: of the Google robot -2
      opens, +2 closes, 0 leaves it, of the WidowX +1 is open, -1 closed.

    Raises:
      ValueError: an unknown robot.
    """
    _check_robot(robot)
    action = jnp.asarray(action)
    turn = reference_frames.euler_to_rotation_vector(action[..., 3:6])
    gripper = action[..., 6:] * (-2.0 if robot == "google_robot" else 1.0)
    return jnp.concatenate([action[..., :3], turn, gripper], axis=-1)


def _check_robot(robot: str) -> None:
    if robot not in get_args(Robot):
        raise ValueError(f"unknown robot '{robot}'; {did_you_mean(robot, get_args(Robot))}")
