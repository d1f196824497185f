"""Shared vocabulary: axis letters, type aliases, and the records passed between modules.

Axes (upper case in every docstring):
`B` batch · `T` time of any length · `W` steps of a window · `K` steps of an action chunk ·
`A` action dims (7 = 6 arm + 1 gripper) · `P` proprio dims · `N` tokens per step ·
`D` features of a token · `H` hidden units · `G` gates (4 LSTM, 3 GRU, 1 RNN) · `L` layers ·
`M` attention heads · `E` features of a head · `S` words of an instruction ·
`V` bins or vocabulary · `F` frames of a data set · `h w c` pixels, always last.

Records are `NamedTuple`s: they are pytrees, they stack, and `None` marks what is absent.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = dict[str, Any]  # nested dict of arrays, nothing else
Key = jax.Array  # typed JAX key; consumed by the function that takes it
Resampling = Literal["area", "bilinear", "bicubic", "lanczos"]  # methods to resize images
Metrics = dict[str, jax.Array]  # scalars for the log
# (path glob, how the axes of the matching params are sharded); the first match counts
ShardingRules = tuple[tuple[str, jax.sharding.PartitionSpec], ...]


class Observation(NamedTuple):
    """Input of a policy; any leading axes (`[B, W]`, `[B]`, …). Absent parts are None."""

    image_primary: Array | None = None  # [..., h, w, 3] uint8, outside camera
    image_wrist: Array | None = None  # [..., h, w, 3] uint8, camera on the hand
    proprio: Array | None = None  # [..., P] float32, normalised by `norm_stats`
    environment_state: Array | None = None  # [..., E] float32, privileged simulator state
    instruction: Array | None = None  # [..., S] int32 token ids, of "" where hidden
    images: Mapping[str, Array] | None = None  # further cameras by name, image_top, ...
    # camera -> [...] bool, False where there is no image; None, or a camera left out = all real
    image_mask: Mapping[str, Array] | None = None
    # proprio, environment_state -> [..., P] bool, False for numbers that the robot lacks, whose
    # values are arbitrary; None, or a column left out = all real
    column_mask: Mapping[str, Array] | None = None


def make_observation(parts: Mapping[str, Any], *, instruction: Any = None) -> Observation:
    """Returns an observation from its parts by name.

    Args:
      parts: `image_primary`, `image_wrist`, `image_<name>` of further cameras, `proprio`,
        `environment_state`.
      instruction: token ids.
    """
    further = {name: part for name, part in parts.items() if name not in Observation._fields}
    fields = {name: part for name, part in parts.items() if name not in further}
    return Observation(**fields, instruction=instruction, images=further or None)


def get_part(observation: Observation, name: str) -> Any:
    """Returns a part of an observation by its name, such as `image_top`; None if it is absent."""
    if name in Observation._fields:
        return getattr(observation, name)
    return (observation.images or {}).get(name)


def get_images(observation: Observation) -> dict[str, Any]:
    """Returns camera -> images of all cameras that the observation has."""
    fixed = {name: getattr(observation, name) for name in ("image_primary", "image_wrist")}
    present = {name: images for name, images in fixed.items() if images is not None}
    return present | dict(observation.images or {})


def replace_images(observation: Observation, images: Mapping[str, Any]) -> Observation:
    """Returns the observation with other images of some of its cameras."""
    fixed = {name: image for name, image in images.items() if name in Observation._fields}
    further = {name: image for name, image in images.items() if name not in fixed}
    merged = {**(observation.images or {}), **further} or None
    return observation._replace(**fixed, images=merged)


class Tokens(NamedTuple):
    """Output of a backbone for each step; any leading axes (`[B, W]`, `[B]`, …)."""

    tokens: Array  # [..., N, D] float32; bfloat16 or float16 if cached so
    mask: Array  # [..., N] bool, True where the token is real (False = padding)


class Batch(NamedTuple):
    """Input of one update: windows of `W` steps, chunks of `K` actions at every position."""

    observation: Observation  # [B, W, ...]; images are None where `tokens` are given
    tokens: Tokens | None  # [B, W, N, D] and [B, W, N], cached outputs of a frozen backbone
    timestep_mask: Array  # [B, W] bool, True where the step is real (False = left padding)
    action: Array  # [B, W, K, A] float32, arm in [-1, 1], gripper +1 open / -1 closed
    action_mask: Array  # [B, W, K] bool, True where the target action exists
    reset: Array | None = None  # [B, W] bool, True where an episode starts; None = nowhere
    # [B, W, A] bool, True for the numbers of an action that the robot has; None = all of them
    action_dims: Array | None = None


class ActionChunk(NamedTuple):
    """The next `K` actions, as predicted by continuous heads."""

    arm: Array  # [..., K, A-1] in [-1, 1]: dx dy dz droll dpitch dyaw
    gripper_logit: Array  # [..., K], positive = open


class BinChunk(NamedTuple):
    """The next `K` actions as distributions over bins; `heads.actions` decodes them."""

    logits: Array  # [..., K, A, V], the last of A is the gripper


class FlowChunk(NamedTuple):
    """A velocity on the way from noise to the next `K` actions, for the loss of a flow."""

    velocity: Array  # [..., K, A], predicted, per unit of time
    noise: Array  # [..., K, A], where the way begins
    estimate: Array  # [..., K, A], the actions that this velocity leads to


Prediction = ActionChunk | BinChunk | FlowChunk  # output of a decoder, input of a loss


class Transition(NamedTuple):
    """Result of one environment step; leading axes where environments are vmapped."""

    observation: Any  # Observation (`Env`) or one array (`DiscreteEnv`)
    reward: Array  # [] float32
    terminated: Array  # [] bool, the task ended (success or failure)
    truncated: Array  # [] bool, the time limit was reached
    success: Array  # [] bool, the task is done at this step


# episodes that count as a success: "once" = the task succeeded at any step; "at_end" = it is still
# done at the last step
SuccessRule = Literal["once", "at_end"]


class Recall(NamedTuple):
    """Ground truth of what a robot must remember, for a loss that trains memory (`recalling`)."""

    numbers: Array  # [..., n] of size about 1
    choices: tuple[Array, ...] = ()  # each [..., m], one-hot: one of m cases; zeros = not asked


class Env(NamedTuple):
    """A JAX environment of pure functions, for `jit`, `vmap` and `lax.scan`."""

    reset: Callable[[Key], tuple[Any, Observation]]  # key -> (env_state, first observation)
    step: Callable[[Any, Array], tuple[Any, Transition]]  # (env_state, action [A]) -> ...
    instructions: tuple[str, ...]  # every instruction that an episode may have
    tasks: tuple[str, ...]  # task name of each instruction, for results per task
    instruction_index: Callable[[Any], Array]  # env_state -> [] int32 into `instructions`
    max_steps: int  # environment steps until truncation
    expert: Callable[[Any], Array] | None = None  # env_state -> action [A] of the scripted expert
    success_rule: SuccessRule = "once"  # which episodes count as a success
    # env_state -> [] bool, False while the robot only watches and its actions have no effect; None
    # = it always acts
    is_acting: Callable[[Any], Array] | None = None
    # env_state -> what the expert knows and no observation repeats; None = nothing
    recall: Callable[[Any], Recall] | None = None


class DiscreteEnv(NamedTuple):
    """A JAX environment with discrete actions, for reinforcement learning.

    Unlike `Env` it has one array as observation, `num_actions` discrete actions, and no
    instructions in words, cameras or expert.
    """

    reset: Callable[[Key], tuple[Any, Array]]  # key -> (env_state, first observation)
    step: Callable[[Any, Array], tuple[Any, Transition]]  # (env_state, action [] int) -> ...
    draw: Callable[[Any], Array]  # env_state -> image [h, w, 3] uint8, for viewing
    observation_shape: tuple[int, ...]  # [D] float32, or [h, w, c] uint8
    velocities: tuple[int, ...]  # indices of the D features that are velocities; () for images
    num_actions: int
    max_steps: int  # environment steps until truncation
    instruction: tuple[int, ...] = ()  # indices of the D features that encode the instruction
    # indices of the D features that are above 0 only while what must be remembered is shown
    cue: tuple[int, ...] = ()
    object_size: int = 0  # features per object, if the D features are a list of objects; else 0


class SimulatorStep(NamedTuple):
    """Result of one step of a Python simulator."""

    observation: Mapping[str, np.ndarray]  # field name of Observation -> array, not normalised
    reward: float
    terminated: bool  # the task ended (success or failure)
    truncated: bool  # the time limit was reached
    success: bool  # the task is done at this step; `success_rule` decides about the episode


class Simulator(Protocol):
    """A stateful Python environment, one instance per stream of episodes (see also `Env`).

    If the robot only watches at times, there is a further attribute `is_acting`: a bool, set by
    `reset` and `step`, False where the next action has no effect. Recordings mask such actions.
    """

    instruction: str  # instruction of this episode, set by `reset`
    task: str  # name of the task, for results per task, set by `reset`
    control_hz: float  # actions per second
    max_steps: int  # environment steps until truncation
    success_rule: SuccessRule  # which episodes count as a success

    def reset(self, seed: int) -> Mapping[str, np.ndarray]:
        """Starts the episode determined by `seed`; returns its first observation."""
        ...

    def step(self, action: np.ndarray) -> SimulatorStep:
        """Applies `action [A]`, arm in [-1, 1], gripper +1 open / -1 closed."""
        ...

    def draw(self, size: int = 256) -> np.ndarray:
        """Returns an image `[size, size, 3]` uint8, for viewing."""
        ...

    def close(self) -> None:
        """Frees the simulator's resources."""
        ...
