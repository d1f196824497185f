"""From what a robot sees to what it does: all that stands between a policy and a world.

An agent normalises the robot's state, hides the instruction after its first steps, streams the
policy, turns chunks into one action and that action back into the robot's units and frame.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vla_jax.actions import execution, reference_frames
from vla_jax.actions.execution import ExecutionConfig
from vla_jax.actions.reference_frames import ToolFrame
from vla_jax.backbones import registry
from vla_jax.data import normalize
from vla_jax.data.normalize import NormalizeConfig, NormStats
from vla_jax.data.windows import ALWAYS
from vla_jax.policies import policy
from vla_jax.policies.decoders import check_mode
from vla_jax.policies.policy import PolicyConfig
from vla_jax.policies.trunk import Mode
from vla_jax.types import ActionChunk, Array, Observation, Params


@dataclass(frozen=True)
class AgentConfig:
    """How a policy acts; with params and norm_stats it is complete."""

    policy: PolicyConfig = PolicyConfig()
    normalize: NormalizeConfig = NormalizeConfig()  # as in training
    execution: ExecutionConfig = ExecutionConfig()
    mode: Mode = "refresh"  # what the decoder remembers: last W steps, since W·n, everything
    instruction_steps: int = 1  # first steps that show the instruction; -1 = always
    tool_frame: ToolFrame | None = None  # the policy speaks in the tool's frame; None = the data's

    def __post_init__(self):
        check_mode(self.policy.decoder, self.mode)


class AgentState(NamedTuple):
    """What an agent remembers between two steps."""

    stream: Any  # the decoder's
    execution: Any  # the chunks that still speak of coming steps
    age: Array  # [B] int32, steps since the episode began


class Agent(NamedTuple):
    """Pure functions; `jit` the step."""

    init: Callable[[Params, int], AgentState]  # (params, batch_size) -> state
    # (params, batch_size) -> params stored for fast steps of that batch size on this device
    prepare: Callable[[Params, int], Params]
    step: Callable[..., tuple[AgentState, Array]]  # see `make_agent`


def make_agent(
    config: AgentConfig, norm_stats: Mapping[str, NormStats], *, window_size: int | None = None
) -> Agent:
    """The agent's two functions.

    `step(params, state, observation, reset) -> (state, action [B, A])` takes raw observations
    `[B, ...]` with word ids of the whole instruction at every step, `reset [B]` True where an
    episode starts, and gives actions in the robot's units, gripper +1 open / -1 closed. With a
    `tool_frame` the raw proprio holds the tool's orientation, whether the policy sees it or not.

    Args:
      config: how to act.
      norm_stats: those of the training data.
      window_size: stream with another window than the policy was trained with.

    Raises:
      ValueError: norm_stats of the action are missing.
    """
    if "action" not in norm_stats:
        raise ValueError(
            f"norm_stats must have 'action', got {sorted(norm_stats)}; use those of the run."
        )
    decoder = config.policy.decoder
    execution.check_stride(config.execution, decoder.kind)

    def init(params: Params, batch_size: int) -> AgentState:
        return AgentState(
            stream=policy.init_stream(
                params, config.policy, batch_size, mode=config.mode, window_size=window_size
            ),
            execution=execution.init(
                config.execution, batch_size, decoder.action_horizon, decoder.action_dim
            ),
            age=jnp.zeros(batch_size, jnp.int32),
        )

    def prepare(params: Params, batch_size: int) -> Params:
        return policy.prepare_params(
            params, config.policy, batch_size, mode=config.mode, window_size=window_size
        )

    def step(
        params: Params, state: AgentState, observation: Observation, reset: Array
    ) -> tuple[AgentState, Array]:
        state, _, now = plan(config, norm_stats, params, state, observation, reset)
        return send(config, norm_stats, state, observation, now)

    return Agent(init, prepare, step)


def plan(
    config: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    params: Params,
    state: AgentState,
    observation: Observation,
    reset: Array,
) -> tuple[AgentState, Observation, ActionChunk]:
    """The first half of an agent's step, up to what it wants done now.

    Args:
      config: as for `make_agent`.
      norm_stats: likewise.
      params: of the policy.
      state: from `Agent.init` or `send`.
      observation: `[B, ...]`, raw.
      reset: `[B]`, True where an episode starts.

    Returns:
      The state, what the policy was shown of the observation `[B, ...]`, and one action in the
      policy's own units: arm `[B, A-1]`, gripper logit `[B]`.
    """
    age = jnp.where(reset, 0, state.age)
    seen = _prepare(config, norm_stats, observation, age)
    stream, chunk = policy.step(params, config.policy, state.stream, seen, reset=reset)
    executed, now = execution.plan(config.execution, state.execution, chunk, reset=reset)
    return AgentState(stream, executed, age + 1), seen, now


def send(
    config: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    state: AgentState,
    observation: Observation,
    now: ActionChunk,
) -> tuple[AgentState, Array]:
    """The second half: the action `[B, A]` in the robot's units and frame.

    Args:
      config: as for `make_agent`.
      norm_stats: likewise.
      state: from `plan`.
      observation: `[B, ...]`, raw.
      now: from `plan`, or what is tried in its place.
    """
    executed, action = execution.send(config.execution, state.execution, now)
    action = normalize.denormalize_action(action, norm_stats["action"], config.normalize)
    if config.tool_frame is not None:
        orientation = reference_frames.read_orientation(observation.proprio, config.tool_frame)
        action = reference_frames.to_world_frame(
            action, jnp.asarray(orientation), config.tool_frame
        )
    return state._replace(execution=executed), action


def _prepare(
    config: AgentConfig, norm_stats: Mapping[str, NormStats], observation: Observation, age: Array
) -> Observation:
    """What the policy was trained to see; a column without norm_stats was not in its data."""
    columns = {}
    for name in ("proprio", "environment_state"):
        column, stats = getattr(observation, name), norm_stats.get(name)
        if column is not None and stats is not None:
            if column.shape[-1] != len(stats.mean):
                raise ValueError(
                    f"{name} must have {len(stats.mean)} numbers as in training, got "
                    f"{column.shape[-1]}; choose a world that the policy was trained for."
                )
            column = normalize.normalize(column, stats, getattr(config.normalize, name))
        columns[name] = column if stats is not None else None
    visible = (config.instruction_steps == ALWAYS) | (age < config.instruction_steps)
    instruction = jnp.where(visible[:, None], jnp.asarray(observation.instruction), 0)
    return observation._replace(**columns, instruction=instruction)


def read_instruction(config: AgentConfig, instruction: str) -> np.ndarray:
    """Returns the token ids `[S]` int32 of an instruction."""
    backbone = config.policy.backbone
    return registry.get(backbone).tokenize(backbone, instruction)
