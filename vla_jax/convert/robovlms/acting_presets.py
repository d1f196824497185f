"""Agent settings with which a head of RoboVLMs sends the same commands as in RoboVLMs' wrappers.

    stats = {"action": acting_presets.calvin_stats()}
    agent = make_agent(acting_presets.calvin(policy_config), stats)

The wrappers feed the instruction at every step, keep the last W frames (`history_type` "post",
W = the decoder's `window_size`) and send the first action of every chunk. They clear the window at
the start of an episode and when the instruction changes: pass the agent a `reset` there. Train
with the same statistics and the same `normalize` and `tool_frame`.

Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), its wrappers for CALVIN and SIMPLER.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.acting.agent import AgentConfig
from vla_jax.actions import rotations
from vla_jax.actions.execution import ExecutionConfig, GripperRule
from vla_jax.actions.reference_frames import ToolFrame
from vla_jax.config import did_you_mean
from vla_jax.data.normalize import NormalizeConfig, NormStats, fixed_bounds, from_json
from vla_jax.data.windows import ALWAYS
from vla_jax.policies.policy import PolicyConfig
from vla_jax.types import Array

Robot = Literal["google_robot", "widowx"]
LIMIT = 0.65  # norm_max = -norm_min in all RoboVLMs configs
CALVIN_FRAME = ToolFrame(delta="euler_difference", radians=1 / 20)  # robot_obs, rel_actions


class _GripperCommand(NamedTuple):
    """Gripper commands of one of SIMPLER's robots."""

    rule: GripperRule
    scale: float  # its command / our command (+1 open, -1 closed)


_GRIPPERS: dict[Robot, _GripperCommand] = {
    "google_robot": _GripperCommand("repeat_change", -2.0),
    "widowx": _GripperCommand("open_late", 1.0),
}


def calvin(policy: PolicyConfig, *, tool_frame: bool = False, mu: float = 0.0) -> AgentConfig:
    """Returns the agent config for CALVIN, whose actions in [-1, 1] are dx·50 and droll·20.

    Args:
      policy: config of the policy.
      tool_frame: True if the policy was trained on actions in the tool's frame. Proprio is then
        CALVIN's `robot_obs`, and a head of RoboVLMs needs `calvin_tool_stats`. RoboVLMs' `tcp_rel`
        has another scale and the inverse rotation, and no released checkpoint uses it.
      mu: μ of the μ-law, RoboVLMs' `mu_val` where `use_mu_law` is set; 0 = none.
    """
    return AgentConfig(
        policy=policy,
        normalize=NormalizeConfig(action="bounds", action_mu=mu),
        instruction_steps=ALWAYS,
        mode="refresh",
        tool_frame=CALVIN_FRAME if tool_frame else None,
    )


def calvin_stats(limit: float = LIMIT, *, action_dim: int = 7) -> NormStats:
    """Returns the statistics of CALVIN's actions, clipped to ±`limit`."""
    return fixed_bounds(-limit, limit, action_dim)


def calvin_tool_stats(limit: float = LIMIT) -> NormStats:
    """Returns the statistics of CALVIN's actions in the tool's frame.

    Use them with `calvin(policy, tool_frame=True)`. RoboVLMs' wrapper takes such actions to be
    metres and radians within ±`limit` and multiplies them by 50 and 20 (its branch
    `raw_calvin=False`): ±50 · `limit` and ±20 · `limit` in CALVIN's units.

    Args:
      limit: clipping limit of the actions in training, m and rad.
    """
    high = np.array([50 * limit] * 3 + [20 * limit] * 3 + [1.0])
    return fixed_bounds(-high, high, 7)


def simpler(policy: PolicyConfig, robot: Robot, *, gripper_steps: int = 2) -> AgentConfig:
    """Returns the agent config for SIMPLER; `simpler_command` converts actions to its commands.

    Args:
      policy: config of the policy.
      robot: "google_robot" or "widowx".
      gripper_steps: environment steps for which a change of the Google robot's gripper is
        repeated, or for which the WidowX's must be predicted open before it opens; SIMPLER's
        Octo policy has 15 and 1.

    Raises:
      ValueError: an unknown robot.
    """
    _check_robot(robot)
    return AgentConfig(
        policy=policy,
        normalize=NormalizeConfig(action="quantiles"),
        execution=ExecutionConfig(gripper_rule=_GRIPPERS[robot].rule, gripper_steps=gripper_steps),
        instruction_steps=ALWAYS,
        mode="refresh",
    )


def oxe_stats(data: Mapping[str, Any]) -> NormStats:
    """Returns action statistics from a statistics file of RoboVLMs or OpenVLA for one data set.

    Args:
      data: its JSON, with lists of `mean`, `std`, `min`, `max`, `q01`, `q99` under `action`, and
        `mask` in OpenVLA's files (RoboVLMs' have none: every arm dimension is normalised).

    Raises:
      ValueError: a statistic is missing, or one that no column can have; `mask` excludes an arm
        dimension from normalisation.
    """
    action = data.get("action", {})
    names = [name for name in NormStats._fields if name != "count"]
    missing = [name for name in names if name not in action]
    if missing:
        raise ValueError(
            f"action must have the statistics {names}, {missing} missing; give the data set's "
            "entry of the file."
        )
    fields = {name: action[name] for name in names} | {"count": data.get("num_transitions", 0)}
    stats = from_json({"action": fields}, "oxe_stats")["action"]
    size = len(stats.mean)
    mask = action.get("mask", [True] * size)
    is_list = isinstance(mask, list) and len(mask) == size
    if not is_list or any(entry is not True for entry in mask[:-1]):
        raise ValueError(
            f"mask must be true for every arm dimension of {size} with the gripper, got "
            f"{mask!s:.200}; set q01 = -1 and q99 = 1 for those that are not normalised."
        )
    return stats


def released_oxe_stats(stats: NormStats, limit: float = LIMIT) -> NormStats:
    """Returns statistics for released checkpoints trained on actions that were normalised twice.

    RoboVLMs' Open X-Embodiment actions were scaled from [q01, q99] to [-1, 1], then clipped at
    ±0.65 and scaled again, which loses large motions. The outputs of such heads span the middle
    65 % of [q01, q99] and need these statistics; do not train new heads with them.

    Args:
      stats: from `oxe_stats`.
      limit: clipping limit of the normalised actions.
    """
    middle, half = (stats.q01 + stats.q99) / 2, (stats.q99 - stats.q01) / 2
    low, high = middle - limit * half, middle + limit * half
    return stats._replace(min=low, max=high, q01=low, q99=high)


def simpler_command(action: Array, robot: Robot) -> jax.Array:
    """Converts actions to commands of SIMPLER's environments.

    Args:
      action: `[..., 7]`, of an agent with the config of `simpler`.
      robot: "google_robot" or "widowx".

    Returns:
      `[..., 7]`: dx dy dz, m; rotation vector (axis · angle), rad; gripper: Google robot -2 opens,
      +2 closes, 0 no change; WidowX +1 open, -1 closed.

    Raises:
      ValueError: an unknown robot.
    """
    _check_robot(robot)
    action = jnp.asarray(action)
    rotation = rotations.euler_to_rotation_vector(action[..., 3:6])
    gripper = action[..., 6:] * _GRIPPERS[robot].scale
    return jnp.concatenate([action[..., :3], rotation, gripper], axis=-1)


def _check_robot(robot: str) -> None:
    if robot not in get_args(Robot):
        raise ValueError(f"unknown robot '{robot}'; {did_you_mean(robot, get_args(Robot))}")
