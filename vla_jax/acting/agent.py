"""Acting with a policy: observation in, action in the robot's units out.

An agent normalises proprioception, masks the instruction after its first steps, runs one streaming
step of the policy, selects one action from the predicted chunks and converts it to the robot's
units and frame. Its state is a tree of arrays `[B, ...]`; `rows` reads and replaces its rows.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vla_jax.actions import execution, reference_frames
from vla_jax.actions.action_layout import ActionLayout, to_robot
from vla_jax.actions.execution import ExecutionConfig
from vla_jax.actions.reference_frames import ToolFrame
from vla_jax.backbones import registry
from vla_jax.config import checked
from vla_jax.data import clipping, normalize
from vla_jax.data.dataset import is_camera
from vla_jax.data.normalize import NormalizeConfig, NormStats
from vla_jax.data.windows import ALWAYS
from vla_jax.policies import heads, policy, trunks
from vla_jax.policies.decoders import check_mode
from vla_jax.policies.policy import PolicyConfig
from vla_jax.policies.trunk import Mode
from vla_jax.training.memory_estimate import available_bytes
from vla_jax.types import ActionChunk, Array, Observation, Params, replace_images

_COLUMNS = ("proprio", "environment_state")  # parts of an observation that are numbers


@dataclass(frozen=True)
@checked(instruction_steps=(-1, 2**31 - 1))
class AgentConfig:
    """Config of an agent, which also needs params and norm_stats."""

    policy: PolicyConfig = PolicyConfig()  # backbone and decoder of the policy
    normalize: NormalizeConfig = NormalizeConfig()  # normalisation, as in training
    execution: ExecutionConfig = ExecutionConfig()  # how predicted chunks become single actions
    # streaming memory: "refresh" = last W steps, "periodic" = cleared every W steps, "persistent" =
    # the whole episode
    mode: Mode = "refresh"
    instruction_steps: int = 1  # first steps at which the policy gets the instruction; -1 = all
    tool_frame: ToolFrame | None = None  # tool frame of the policy's actions; None = as in the data
    # order and range of the actions of the robot in the training data; None = this library's
    action_layout: ActionLayout | None = None
    # parts of the observation that the robot of a mixture lacks, such as image_wrist or proprio:
    # masked, as in training
    missing_parts: tuple[str, ...] = ()

    def __post_init__(self):
        check_mode(self.policy.decoder, self.mode)
        execution.check(self.execution, self.policy.decoder.action_horizon)
        for name in self.missing_parts:
            if name not in _COLUMNS and not is_camera(name):
                raise ValueError(
                    "missing_parts must be cameras, such as image_wrist, or "
                    f"{' and '.join(_COLUMNS)}, got '{name}'."
                )


class AgentState(NamedTuple):
    """State of an agent between two steps; every leaf is `[B, ...]`, one row per robot."""

    stream: Any  # streaming state of the policy
    execution: Any  # earlier chunks and the gripper
    age: Array  # [B] int32, steps since the episode or its present instruction began
    # [B] int32, numbers of proprio and environment state since the episode began that normalisation
    # clipped since they are far outside the training data
    num_clipped: Array
    instruction: Array  # [B, S] int32, ids of the instruction at the last step; -1 = none yet


class Agent(NamedTuple):
    """An agent as pure functions; `jit` the step."""

    init: Callable[[Params, int], AgentState]  # (params, batch_size) -> state
    # (params, batch_size) -> params stored for fast steps of that batch size on this device
    prepare: Callable[[Params, int], Params]
    step: Callable[..., tuple[AgentState, Array]]  # see `make_agent`


def make_agent(
    config: AgentConfig, norm_stats: Mapping[str, NormStats], *, window_size: int | None = None
) -> Agent:
    """Returns the functions of an agent.

    `step(params, state, observation, reset) -> (state, action [B, A])` takes raw observations
    `[B, ...]` with word ids of the whole instruction at every step, `reset [B]` True where an
    episode starts, and returns actions in the robot's units, gripper +1 open / -1 closed. With a
    `tool_frame`, the raw proprio must contain the orientation of the tool, even if the policy does
    not use it.

    Args:
      config: of the agent.
      norm_stats: of the training data.
      window_size: W in environment steps; None = as in training.

    Raises:
      ValueError: norm_stats of the action are missing; the states take more memory than the device
        has (when `init` is called).
    """
    if "action" not in norm_stats:
        raise ValueError(
            f"norm_stats must have 'action', got {sorted(norm_stats)}; use those of the training "
            "run."
        )
    decoder = config.policy.decoder
    try:
        check_representable(config)
    except ValueError as error:  # a run of an earlier version; a new training is refused
        warnings.warn(str(error), stacklevel=2)
    has_memory = trunks.get(decoder.kind).has_memory
    execution.warn_if_frames_skipped(config.execution, has_memory=has_memory)

    def make_state(params: Params, batch_size: int) -> AgentState:
        return AgentState(
            stream=policy.init_stream(
                params, config.policy, batch_size, mode=config.mode, window_size=window_size
            ),
            execution=execution.init(
                config.execution, batch_size, decoder.action_horizon, decoder.action_dim
            ),
            age=jnp.zeros(batch_size, jnp.int32),
            num_clipped=jnp.zeros(batch_size, jnp.int32),
            instruction=jnp.full((batch_size, len(read_instruction(config, ""))), -1, jnp.int32),
        )

    def init(params: Params, batch_size: int) -> AgentState:
        shapes = jax.eval_shape(lambda params: make_state(params, batch_size), params)
        _check_fits(shapes, batch_size, window_size or decoder.window_size)
        return make_state(params, batch_size)

    def prepare(params: Params, batch_size: int) -> Params:
        return policy.prepare_params(
            params, config.policy, batch_size, mode=config.mode, window_size=window_size
        )

    def step(
        params: Params, state: AgentState, observation: Observation, reset: Array
    ) -> tuple[AgentState, Array]:
        state, _, action = plan(config, norm_stats, params, state, observation, reset)
        return send(config, norm_stats, state, observation, action)

    return Agent(init, prepare, step)


def with_noise(
    config: AgentConfig, *, flow_steps: int | None, noise_seed: int | None
) -> AgentConfig:
    """Returns the config with other options of a head that acts from noise; None keeps one.

    Raises:
      ValueError: an option is out of range, or given for a head that draws no noise.
    """
    options = {"flow_steps": flow_steps, "noise_seed": noise_seed}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    decoder = config.policy.decoder
    if given and not heads.HEADS[decoder.head].draws_noise:
        raise ValueError(
            f"{' and '.join(given)} must be None for head '{decoder.head}', which draws no noise, "
            f"got {', '.join(map(str, given.values()))}; leave out the option."
        )
    parts = dataclasses.replace(config.policy, decoder=dataclasses.replace(decoder, **given))
    return dataclasses.replace(config, policy=parts)


def check_representable(config: AgentConfig) -> None:
    """Raises a ValueError if the policy cannot give the actions of any training data.

    A head whose outputs are in [-1, 1] cannot give an action that is more than one standard
    deviation from the mean: of Gaussian actions a third.
    """
    head = config.policy.decoder.head
    if config.normalize.action == "mean_std" and heads.HEADS[head].is_bounded:
        raise ValueError(
            f"action must be normalised to [-1, 1] for head '{head}', whose outputs are in [-1, 1],"
            " got 'mean_std', which leaves a third of Gaussian actions outside; use --action bounds"
            " or --action quantiles."
        )


def robot_action(config: AgentConfig, action: Array) -> Array:
    """Returns the action as the robot of the training data takes it.

    Args:
      config: of the agent.
      action: `[..., A]` from `Agent.step`, gripper last, +1 open / -1 closed.

    Returns:
      `[..., dim]` in the order and range of `config.action_layout`.

    Raises:
      ValueError: a number is not finite; inside `jit`, where it is not known, nothing is checked.
    """
    if not isinstance(action, Tracer):
        check_action(action)
    return action if config.action_layout is None else to_robot(action, config.action_layout)


def check_action(action: Array) -> None:
    """Raises a ValueError if a number of an action `[..., A]` is not finite.

    A robot must not get it: NaN passes most checks, as its comparison with a limit is False.
    """
    if not np.isfinite(action).all():
        raise ValueError(
            f"action must be finite numbers, got {np.asarray(action).tolist()}, which was not "
            "sent; check the observation, and use an earlier checkpoint if the params have NaN."
        )


def plan(
    config: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    params: Params,
    state: AgentState,
    observation: Observation,
    reset: Array,
) -> tuple[AgentState, Observation, ActionChunk]:
    """Runs the first half of an agent's step, up to the action in the policy's units.

    Args:
      config: as for `make_agent`.
      norm_stats: as for `make_agent`.
      params: of the policy.
      state: from `Agent.init` or `send`.
      observation: `[B, ...]`, raw.
      reset: `[B]`, True where an episode starts.

    Returns:
      The state, the normalised observation `[B, ...]`, and one action in the policy's units:
      arm `[B, A-1]`, gripper logit `[B]`.
    """
    state, normalized, chunk = predict(config, norm_stats, params, state, observation, reset)
    executed, action = execution.plan(config.execution, state.execution, chunk, reset=reset)
    return state._replace(execution=executed), normalized, action


def predict(
    config: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    params: Params,
    state: AgentState,
    observation: Observation,
    reset: Array,
) -> tuple[AgentState, Observation, ActionChunk]:
    """Runs the policy for one step; the arguments are those of `plan`.

    Returns:
      The state, whose part `execution` is unchanged, the normalised observation `[B, ...]`, and the
      predicted chunk in the policy's units: arm `[B, K, A-1]`, gripper logit `[B, K]`.
    """
    is_new, instruction = reset, state.instruction
    if observation.instruction is not None:
        instruction = jnp.asarray(observation.instruction, jnp.int32)
        is_new = reset | jnp.any(instruction != state.instruction, axis=-1)
    age = jnp.where(is_new, 0, state.age)
    normalized = _prepare(config, norm_stats, observation, age)
    stream, chunk = policy.step(params, config.policy, state.stream, normalized, reset=reset)
    clipped = jnp.where(reset, 0, state.num_clipped) + _count_clipped(
        config, norm_stats, observation
    )
    return AgentState(stream, state.execution, age + 1, clipped, instruction), normalized, chunk


def send(
    config: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    state: AgentState,
    observation: Observation,
    planned: ActionChunk,
) -> tuple[AgentState, Array]:
    """Runs the second half of a step: returns the action `[B, A]` in the robot's units and frame.

    Args:
      config: as for `make_agent`.
      norm_stats: as for `make_agent`.
      state: from `plan`.
      observation: `[B, ...]`, raw.
      planned: arm `[B, A-1]`, gripper logit `[B]`, from `plan`, possibly with exploration noise.
    """
    executed, action = execution.send(config.execution, state.execution, planned)
    size = len(norm_stats["action"].mean)
    if size < action.shape[-1]:  # trained on a mixture of robots, some of which have longer arms
        action = jnp.concatenate([action[:, : size - 1], action[:, -1:]], axis=-1)
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
    """Returns the normalised observation, without columns that lack norm_stats."""
    columns, masks = {}, {}
    for name in _COLUMNS:
        column, stats = getattr(observation, name), norm_stats.get(name)
        if column is not None and stats is not None:
            if column.shape[-1] != len(stats.mean):
                raise ValueError(
                    f"{name} must have {len(stats.mean)} numbers as in training, got "
                    f"{column.shape[-1]}; choose an environment that the policy was trained for."
                )
            column = jnp.where(jnp.isinf(column), jnp.nan, column)  # not clipped to a limit
            column = normalize.normalize(column, stats, getattr(config.normalize, name))
        column = column if stats is not None else None
        if column is not None or name in config.missing_parts:
            column, masks[name] = _widen(column, config, name, age.shape[0])
        columns[name] = column
    instruction = observation.instruction
    if instruction is not None:
        visible = (config.instruction_steps == ALWAYS) | (age < config.instruction_steps)
        instruction = jnp.where(visible[:, None], instruction, read_instruction(config, ""))
    masks = {name: mask for name, mask in masks.items() if mask is not None}
    observation = _mask_cameras(config, observation, age.shape[0])
    return observation._replace(**columns, instruction=instruction, column_mask=masks or None)


def _count_clipped(
    config: AgentConfig, norm_stats: Mapping[str, NormStats], observation: Observation
) -> Array:
    """Returns how many numbers `[B]` of an observation are far outside the training data."""
    count = jnp.zeros((), jnp.int32)
    for name in _COLUMNS:
        column, stats = getattr(observation, name), norm_stats.get(name)
        if column is not None and stats is not None:
            method = getattr(config.normalize, name)
            count = count + clipping.count_clipped(column, stats, method).astype(jnp.int32)
    return count


def _check_fits(state: AgentState, batch_size: int, window_size: int) -> None:
    """Raises a ValueError if the shapes of a state take more memory than the device has."""
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    available = available_bytes(jax.local_devices()[0])
    if available is not None and needed > available:
        raise ValueError(
            f"window_size must be smaller, got {window_size}: the acting states of {batch_size} "
            f"robots take {needed / 1e9:.2f} GB, but the device has {available / 1e9:.2f} GB; "
            "lower it, or the number of robots."
        )


def _mask_cameras(config: AgentConfig, observation: Observation, batch_size: int) -> Observation:
    """Returns the observation with black, masked images of the cameras that the robot lacks."""
    missing = [name for name in config.missing_parts if is_camera(name)]
    if not missing:
        return observation
    backbone = config.policy.backbone
    spec = registry.get(backbone).image_spec(backbone)
    assert spec is not None
    blank = jnp.zeros((batch_size, spec.height, spec.width, 3), jnp.uint8)
    absent = dict.fromkeys(missing, jnp.zeros(batch_size, bool))
    observation = replace_images(observation, dict.fromkeys(missing, blank))
    return observation._replace(image_mask={**(observation.image_mask or {}), **absent})


def _widen(
    column: Array | None, config: AgentConfig, name: str, batch_size: int
) -> tuple[Array | None, Array | None]:
    """Returns a column with the size of the policy's, and which of its numbers the robot has.

    A mixture of robots gives the policy more numbers than some robots have.

    Args:
      column: `[B, D]`, or None if the robot has none.
      config: of the agent.
      name: of the column.
      batch_size: B.

    Returns:
      Column `[B, P]`, and mask `[B, P]` bool; None if the robot has all numbers.
    """
    backbone = config.policy.backbone
    example = registry.get(backbone).example
    expected = None if example is None else getattr(example(backbone), name)
    size = 0 if column is None else column.shape[-1]
    if expected is None or size >= expected.shape[-1]:
        return column, None
    known = jnp.zeros((batch_size, 0)) if column is None else column
    padded = jnp.pad(known, ((0, 0), (0, expected.shape[-1] - size)))
    return padded, jnp.broadcast_to(jnp.arange(padded.shape[-1]) < size, padded.shape)


def read_instruction(config: AgentConfig, instruction: str) -> np.ndarray:
    """Returns the token ids `[S]` int32 of an instruction."""
    backbone = config.policy.backbone
    return registry.get(backbone).tokenize(backbone, instruction)
