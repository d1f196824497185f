"""Selection of the action to send from the predicted chunks, and gripper rules.

The policy predicts a chunk at every environment step, so that its memory gets every frame. `kind`
determines which action is sent:

- `first`: the first action of the newest chunk (RoboVLMs, for any chunk length).
- `receding_horizon`: `exec_horizon` actions of a chunk, then those of the newest chunk.
- `temporal_ensemble`: the weighted mean of all chunks that predict this step (ACT).

The target of the gripper is +1 (open) if its logit is above `gripper_threshold +
gripper_hysteresis`, -1 (closed) if at or below `gripper_threshold - gripper_hysteresis`, and the
previous target in between. `gripper_rule` determines the command that is sent:

- `target`: the target.
- `repeat_change`: changes of the target only, +1 open, -1 close, 0 no change; a change is sent for
  `gripper_steps` steps, during which further changes are ignored (SIMPLER's Google robot).
- `open_late`: +1 once the target has been open for `gripper_steps` consecutive steps, else -1
  (SIMPLER's WidowX); every episode starts closed.

If a number of the newest chunk is not finite, the action is NaN, which an agent refuses to send,
even if an older chunk or a rule of the gripper determines another one: clips and comparisons with
a threshold would make it valid, and the carry that predicted the chunk is no longer
finite either.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from vla_jax import trees
from vla_jax.config import checked, did_you_mean
from vla_jax.types import ActionChunk, Array

Kind = Literal["first", "receding_horizon", "temporal_ensemble"]
GripperRule = Literal["target", "repeat_change", "open_late"]


@dataclasses.dataclass(frozen=True)
@checked()
class ExecutionConfig:
    """Rules that turn predicted chunks into single actions."""

    kind: Kind = "first"  # which action is sent: first, receding_horizon or temporal_ensemble
    exec_horizon: int = 1  # environment steps for which "receding_horizon" executes one chunk
    # m of the weights exp(-m·i) of "temporal_ensemble", i = 0 the oldest chunk; negative favours
    # new chunks
    ensemble_decay: float = 0.01
    gripper_threshold: float = 0.0  # logit above which the gripper opens; 0 = probability 0.5
    gripper_hysteresis: float = 0.0  # no change within this distance of the threshold, logits
    # gripper command: "target" = the target, "repeat_change" = changes only, "open_late" = opens
    # after `gripper_steps` open predictions
    gripper_rule: GripperRule = "target"
    # environment steps for which "repeat_change" sends a change, or "open_late" waits
    gripper_steps: int = 1

    @staticmethod
    def upgrade(data: Any) -> Any:
        """Renames a gripper rule of configs saved by version 0.1.0."""
        is_old = isinstance(data, Mapping) and data.get("gripper_rule") == "as_wanted"
        return {**data, "gripper_rule": "target"} if is_old else data

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            known = get_args(Kind)
            raise ValueError(
                f"unknown execution kind '{self.kind}'; {did_you_mean(self.kind, known)}"
            )
        if self.exec_horizon < 1:
            raise ValueError(f"exec_horizon must be at least 1, got {self.exec_horizon}.")
        if self.exec_horizon > 1 and not CHUNK_RULES[self.kind].holds_chunks:
            raise ValueError(
                f"exec_horizon must be 1 with kind='{self.kind}', got {self.exec_horizon}; "
                "choose kind='receding_horizon'."
            )
        if self.gripper_hysteresis < 0.0:
            raise ValueError(
                f"gripper_hysteresis must be 0 or more logits, got {self.gripper_hysteresis}."
            )
        self._check_gripper_rule()

    def _check_gripper_rule(self):
        rule, known = self.gripper_rule, get_args(GripperRule)
        if rule not in known:
            raise ValueError(f"unknown gripper_rule '{rule}'; {did_you_mean(rule, known)}")
        if self.gripper_steps < 1:
            raise ValueError(f"gripper_steps must be at least 1, got {self.gripper_steps}.")
        if self.gripper_steps > 1 and rule == "target":
            raise ValueError(
                f"gripper_steps must be 1 with gripper_rule='target', got "
                f"{self.gripper_steps}; choose gripper_rule='repeat_change' or 'open_late'."
            )


class RecedingPlan(NamedTuple):
    """The chunk that is being executed."""

    chunk: ActionChunk  # [B, K, A-1], [B, K]
    age: jax.Array  # [B] int32, number of its actions sent so far; 0 = take a new chunk


class EnsemblePlan(NamedTuple):
    """Weighted sums of all chunks so far over the next K steps."""

    total: ActionChunk  # [B, K, A-1], [B, K], weighted sums
    weight: jax.Array  # [B, K], sums of the weights
    count: jax.Array  # [B, K], number of chunks that predict that step


class GripperState(NamedTuple):
    """State of the gripper rule."""

    target: jax.Array  # [B] target at the last step, +1 open / -1 closed, 0 before the first action
    change: jax.Array  # [B] last change sent by "repeat_change", +1 open, -1 close, 0 none
    steps: jax.Array  # [B] int32, steps left to send it; "open_late": steps the target is open


class ChunkRule(NamedTuple):
    """Member of `CHUNK_RULES`: selects one action from the chunks so far."""

    holds_chunks: bool  # True if a chunk can be executed for several steps
    init: Callable[[ActionChunk], Any]  # chunk of zeros -> plan before the first action
    # (config, plan, chunk) -> (plan, action: arm [B, A-1], gripper logit [B])
    select: Callable[[ExecutionConfig, Any, ActionChunk], tuple[Any, ActionChunk]]


class ExecutionState(NamedTuple):
    """State between two actions; all zeros at the start of an episode."""

    plan: Any  # of the chunk rule: RecedingPlan, EnsemblePlan, or None with kind "first"
    gripper: GripperState


def init(
    config: ExecutionConfig, batch_size: int, action_horizon: int, action_dim: int
) -> ExecutionState:
    """Returns the state before the first action.

    Args:
      config: execution config.
      batch_size: B, robots that act together.
      action_horizon: K of the chunks.
      action_dim: A, the gripper included.

    Raises:
      ValueError: `exec_horizon` is larger than the chunk.
    """
    check(config, action_horizon)
    chunk = ActionChunk(
        jnp.zeros((batch_size, action_horizon, action_dim - 1)),
        jnp.zeros((batch_size, action_horizon)),
    )
    plan = CHUNK_RULES[config.kind].init(chunk)
    target, change = jnp.zeros((2, batch_size))
    return ExecutionState(plan, GripperState(target, change, jnp.zeros((batch_size,), jnp.int32)))


def check(config: ExecutionConfig, action_horizon: int) -> None:
    """Raises a ValueError if more actions of a chunk are to be executed than are predicted."""
    if config.exec_horizon > action_horizon:
        raise ValueError(
            f"exec_horizon must be at most action_horizon = {action_horizon}, got "
            f"{config.exec_horizon}; predict longer chunks or execute fewer actions."
        )


def step(
    config: ExecutionConfig,
    state: ExecutionState,
    chunk: ActionChunk,
    *,
    reset: Array | None = None,
) -> tuple[ExecutionState, jax.Array]:
    """Returns the state after this environment step, and the action to send.

    Args:
      config: the config given to `init`.
      state: from `init` or the step before.
      chunk: predicted at this step, arm `[B, K, A-1]`, gripper logit `[B, K]`.
      reset: `[B]`, True where an episode starts; None means nowhere.

    Returns:
      The state, and the action `[B, A]`: arm clipped to [-1, 1], gripper +1 open / -1 closed (with
      "repeat_change" 0 is no change); NaN where a number of the chunk is not finite.

    Source: Zhao et al. 2023, ACT (arXiv:2304.13705), section IV, for "temporal_ensemble".
    """
    state, planned = plan(config, state, chunk, reset=reset)
    return send(config, state, planned)


def plan(
    config: ExecutionConfig,
    state: ExecutionState,
    chunk: ActionChunk,
    *,
    reset: Array | None = None,
) -> tuple[ExecutionState, ActionChunk]:
    """Runs the first half of `step`: selects one action from all chunks so far.

    Args:
      config: as for `step`.
      state: from `init`, `send`, or the previous `plan` if nothing is sent.
      chunk: arm `[B, K, A-1]`, gripper logit `[B, K]`.
      reset: `[B]`.

    Returns:
      The state, and one action: arm `[B, A-1]`, gripper logit `[B]`; NaN where a number of the
      chunk is not finite.
    """
    chex.assert_shape(chunk.arm, (*chunk.gripper_logit.shape, None))
    chex.assert_shape(chunk.gripper_logit, (state.gripper.target.shape[0], None))
    if reset is not None:
        state = _restart(state, reset)
    planned, action = CHUNK_RULES[config.kind].select(config, state.plan, chunk)
    is_finite = jnp.all(jnp.isfinite(chunk.arm), axis=(1, 2)) & jnp.all(
        jnp.isfinite(chunk.gripper_logit), axis=1
    )
    not_a_number = jax.tree.map(lambda part: jnp.full_like(part, jnp.nan), action)
    return state._replace(plan=planned), trees.select(is_finite, action, not_a_number)


def send(
    config: ExecutionConfig, state: ExecutionState, planned: ActionChunk
) -> tuple[ExecutionState, jax.Array]:
    """Runs the second half of `step`: returns the action `[B, A]` to send.

    Args:
      config: as for `step`.
      state: from `plan`.
      planned: arm `[B, A-1]`, gripper logit `[B]`, from `plan`, possibly with exploration noise;
        the logit may be infinite.

    Returns:
      The state, and the action, NaN where a number of `planned` is NaN or the arm is infinite.
    """
    gripper, sent = _grip(config, state.gripper, planned.gripper_logit)
    action = jnp.concatenate([jnp.clip(planned.arm, -1.0, 1.0), sent[:, None]], axis=-1)
    is_valid = jnp.all(jnp.isfinite(planned.arm), axis=-1) & ~jnp.isnan(planned.gripper_logit)
    return state._replace(gripper=gripper), jnp.where(is_valid[:, None], action, jnp.nan)


def warn_if_frames_skipped(config: ExecutionConfig, *, has_memory: bool) -> None:
    """Warns if a decoder with memory executes more than one action of a chunk.

    Training windows contain consecutive frames, so `step` must be called at every environment
    step for any `exec_horizon`. Predicting only when a chunk is used up would skip frames.

    Args:
      config: execution config.
      has_memory: True if the decoder remembers earlier steps; False never warns.
    """
    if config.exec_horizon > 1 and has_memory:
        warnings.warn(
            f"exec_horizon is {config.exec_horizon}, but the decoder has memory and was trained "
            "on every frame; call `step` at every environment step, since skipping frames changes "
            "its input rate.",
            stacklevel=2,
        )


def _no_plan(chunk: ActionChunk) -> None:
    del chunk


def _take_first(
    config: ExecutionConfig, plan: None, chunk: ActionChunk
) -> tuple[None, ActionChunk]:
    del config
    return plan, jax.tree.map(lambda steps: steps[:, 0], chunk)


def _init_recede(chunk: ActionChunk) -> RecedingPlan:
    return RecedingPlan(chunk, jnp.zeros(chunk.gripper_logit.shape[:1], jnp.int32))


def _recede(
    config: ExecutionConfig, plan: RecedingPlan, chunk: ActionChunk
) -> tuple[RecedingPlan, ActionChunk]:
    held = trees.select(plan.age == 0, chunk, plan.chunk)
    action = jax.tree.map(lambda steps: jax.vmap(jnp.take, (0, 0, None))(steps, plan.age, 0), held)
    return RecedingPlan(held, (plan.age + 1) % config.exec_horizon), action


def _init_ensemble(chunk: ActionChunk) -> EnsemblePlan:
    weight, count = jnp.zeros((2, *chunk.gripper_logit.shape))
    return EnsemblePlan(chunk, weight, count)


def _ensemble(
    config: ExecutionConfig, plan: EnsemblePlan, chunk: ActionChunk
) -> tuple[EnsemblePlan, ActionChunk]:
    new = jnp.exp(-config.ensemble_decay * plan.count)
    total = ActionChunk(
        plan.total.arm + new[..., None] * chunk.arm,
        plan.total.gripper_logit + new * chunk.gripper_logit,
    )
    weight = plan.weight + new
    action = ActionChunk(total.arm[:, 0] / weight[:, :1], total.gripper_logit[:, 0] / weight[:, 0])
    return jax.tree.map(_shift, EnsemblePlan(total, weight, plan.count + 1.0)), action


def _grip(
    config: ExecutionConfig, state: GripperState, logit: Array
) -> tuple[GripperState, jax.Array]:
    """Returns the state after this step, and the gripper command `[B]`."""
    target = _switch(config, state.target, logit)
    return GRIPPER_RULES[config.gripper_rule](config, state, target)


def _send_target(
    config: ExecutionConfig, state: GripperState, target: jax.Array
) -> tuple[GripperState, jax.Array]:
    del config
    return state._replace(target=target), target


def _repeat_change(
    config: ExecutionConfig, state: GripperState, target: jax.Array
) -> tuple[GripperState, jax.Array]:
    new = jnp.where(state.target == 0.0, 0.0, (target - state.target) / 2)
    change = jnp.where(state.steps > 0, state.change, new)
    left = jnp.where(new != 0.0, config.gripper_steps - 1, 0)
    steps = jnp.where(state.steps > 0, state.steps - 1, left)
    return GripperState(target, change, steps), change


def _open_late(
    config: ExecutionConfig, state: GripperState, target: jax.Array
) -> tuple[GripperState, jax.Array]:
    steps = jnp.where(target > 0.0, state.steps + 1, 0)
    sent = jnp.where(steps >= config.gripper_steps, 1.0, -1.0)
    return GripperState(target, state.change, steps), sent


def _switch(config: ExecutionConfig, before: jax.Array, logit: Array) -> jax.Array:
    """Returns the target, +1 or -1; inside the hysteresis band the previous target."""
    band = jnp.where(before == 0.0, 0.0, config.gripper_hysteresis)
    opens, closes = (
        logit > config.gripper_threshold + band,
        logit <= config.gripper_threshold - band,
    )
    return jnp.where(opens, 1.0, jnp.where(closes, -1.0, before))


def _restart(state: ExecutionState, reset: Array) -> ExecutionState:
    return trees.select(reset, jax.tree.map(jnp.zeros_like, state), state)


def _shift(steps: jax.Array) -> jax.Array:
    """Returns `[B, K, ...]` shifted by one step, with zeros at the last."""
    return jnp.concatenate([steps[:, 1:], jnp.zeros_like(steps[:, :1])], axis=1)


CHUNK_RULES: dict[str, ChunkRule] = {
    "first": ChunkRule(False, _no_plan, _take_first),
    "receding_horizon": ChunkRule(True, _init_recede, _recede),
    "temporal_ensemble": ChunkRule(False, _init_ensemble, _ensemble),
}
# (config, state, target [B]) -> (state, sent [B])
GRIPPER_RULES: dict[str, Callable[..., tuple[GripperState, jax.Array]]] = {
    "target": _send_target,
    "repeat_change": _repeat_change,
    "open_late": _open_late,
}
