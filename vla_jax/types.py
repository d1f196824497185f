"""The words of the library: axis letters, aliases, and the records that cross its rooms.

Axes (upper case in every docstring):
`B` batch · `T` time of any length · `W` steps of a window · `K` steps of an action chunk ·
`A` action dims (7 = 6 arm + 1 gripper) · `P` proprio dims · `N` tokens per step ·
`D` features of a token · `H` hidden units · `G` gates (4 LSTM, 3 GRU, 1 RNN) · `L` layers ·
`M` attention heads · `E` features of a head · `S` words of an instruction ·
`V` bins or vocabulary · `F` frames of a data set · `h w c` pixels, always last.

Records are `NamedTuple`s: they are pytrees, they stack, and `None` marks what is absent.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = dict[str, Any]  # nested dict of arrays, nothing else
Key = jax.Array  # typed JAX key; consumed by the function that takes it
Metrics = dict[str, jax.Array]  # scalars for the log
# (path glob, how the axes of the matching params are sharded); the first match counts
ShardingRules = tuple[tuple[str, jax.sharding.PartitionSpec], ...]


class Observation(NamedTuple):
    """Input of a policy; any leading axes (`[B, W]`, `[B]`, …). Absent parts are None."""

    image_primary: Array | None = None  # [..., h, w, 3] uint8, outside camera
    image_wrist: Array | None = None  # [..., h, w, 3] uint8, camera on the hand
    proprio: Array | None = None  # [..., P] float32, normalised by `norm_stats`
    environment_state: Array | None = None  # [..., E] float32, what only a simulator knows
    instruction: Array | None = None  # [..., S] int32 token ids, 0 = padding (or not visible)


class Tokens(NamedTuple):
    """Output of a backbone for each step; any leading axes (`[B, W]`, `[B]`, …)."""

    tokens: Array  # [..., N, D] float32
    mask: Array  # [..., N] bool, True where the token is real (False = padding)


class Batch(NamedTuple):
    """Input of one update: windows of `W` steps, chunks of `K` actions at every position."""

    observation: Observation  # [B, W, ...]; images are None where `tokens` are given
    tokens: Tokens | None  # [B, W, N, D] and [B, W, N], cached outputs of a frozen backbone
    timestep_mask: Array  # [B, W] bool, True where the step is real (False = left padding)
    action: Array  # [B, W, K, A] float32, arm in [-1, 1], gripper +1 open / -1 closed
    action_mask: Array  # [B, W, K] bool, True where the target action exists
    reset: Array | None = None  # [B, W] bool, True where an episode starts; None = nowhere


class ActionChunk(NamedTuple):
    """The next `K` actions, as heads give them."""

    arm: Array  # [..., K, A-1] in [-1, 1]: dx dy dz droll dpitch dyaw
    gripper_logit: Array  # [..., K], positive = open


class BinChunk(NamedTuple):
    """The next `K` actions as distributions over bins; `heads.actions` decodes them."""

    logits: Array  # [..., K, A, V], the last of A is the gripper


Prediction = ActionChunk | BinChunk  # what a decoder gives, and a loss takes


class Transition(NamedTuple):
    """Result of one environment step; leading axes where environments are vmapped."""

    observation: Any  # Observation of a JAX world
    reward: Array  # [] float32
    terminated: Array  # [] bool, the task ended (done, or spoilt)
    truncated: Array  # [] bool, time ran out
    success: Array  # [] bool, the task was done


class Env(NamedTuple):
    """A world of pure functions: `jit`, `vmap` and `lax.scan` it."""

    reset: Callable[[Key], tuple[Any, Observation]]  # key -> (env_state, first observation)
    step: Callable[[Any, Array], tuple[Any, Transition]]  # (env_state, action [A]) -> ...
    expert: Callable[[Any], Array]  # env_state -> the action [A] a demonstrator takes
    instructions: tuple[str, ...]  # every sentence this world may ask for
    tasks: tuple[str, ...]  # task name of each sentence, for results per task
    instruction_index: Callable[[Any], Array]  # env_state -> [] int32 into `instructions`
    max_steps: int  # environment steps until truncation


class DiscreteEnv(NamedTuple):
    """A world of pure functions to learn in from reward alone; what it shows is one array.

    Apart from `Env`, whose robots have words, cameras and a demonstrator, none of which is here,
    and whose actions are seven numbers, where here one of `num_actions` is chosen.
    """

    reset: Callable[[Key], tuple[Any, Array]]  # key -> (world_state, first observation)
    step: Callable[[Any, Array], tuple[Any, Transition]]  # (world_state, action [] int) -> ...
    draw: Callable[[Any], Array]  # world_state -> picture [h, w, 3] uint8 for people
    observation_shape: tuple[int, ...]  # [D] float32, or [h, w, c] uint8
    velocities: tuple[int, ...]  # which of the D numbers are speeds; empty for pictures
    num_actions: int
    max_steps: int  # environment steps until truncation
    instruction: tuple[int, ...] = ()  # which of the D numbers tell what is asked for
    object_size: int = 0  # of each thing, where the D numbers list things alike; 0 = they do not


class SimulatorStep(NamedTuple):
    """Result of one step of a Python simulator."""

    observation: Mapping[str, np.ndarray]  # field name of Observation -> array, not normalised
    reward: float
    terminated: bool  # the task ended (done, or spoilt)
    truncated: bool  # time ran out
    success: bool  # the task was done


class Simulator(Protocol):
    """A world that lives in Python, one instance per episode stream (the counterpart of Env)."""

    instruction: str  # instruction of this episode, set by `reset`
    task: str  # name of the task, for results per task, set by `reset`
    control_hz: float  # actions per second
    max_steps: int  # environment steps until truncation

    def reset(self, seed: int) -> Mapping[str, np.ndarray]:
        """Starts the episode that `seed` fixes; returns its first observation."""
        ...

    def step(self, action: np.ndarray) -> SimulatorStep:
        """Applies `action [A]`, arm in [-1, 1], gripper +1 open / -1 closed."""
        ...

    def draw(self, size: int = 256) -> np.ndarray:
        """A picture `[size, size, 3]` uint8 for people."""
        ...

    def close(self) -> None:
        """Frees what the simulator holds."""
        ...
