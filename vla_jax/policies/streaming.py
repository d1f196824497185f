"""The decoders one step at a time: the state goes in and comes out, nothing is kept elsewhere.

- `refresh`: every output is that of the last W frames from a zero carry, as in training and in
  RoboVLMs. It takes W carries, each started one frame later than the one before, advanced
  together as one batch: one sequential step, where running the window again would take W.
- `periodic`: the carry is zeroed every W frames: cheap, with memories of 1 … W frames.
- `persistent`: the carry is never zeroed but by `reset`: memory of the whole episode.

While an episode is not longer than W frames all three are the same. A decoder of kind "gpt" has
no carry but caches (see `streaming_gpt`), and no positions for "persistent"; one with head
"autoregressive" also keeps the features that it looks back at (see `streaming_seen`). The type of
the state is the mode; every array of it leads with the axis `B`, and every row has its own age, so
robots of one batch start their episodes when they like. A state may be donated to `step`.
"""

from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from vla_jax.config import did_you_mean
from vla_jax.nn import layers, recurrence
from vla_jax.nn.recurrence import Carry
from vla_jax.policies import feature_buffer, heads, streaming_gpt
from vla_jax.policies.decoders import (
    TRUNKS,
    DecoderConfig,
    check_tokens,
    pool,
    predict,
    recurrence_config,
)
from vla_jax.policies.feature_buffer import SeenState
from vla_jax.policies.streaming_gpt import GPTPeriodicState, GPTRefreshState
from vla_jax.types import ActionChunk, Array, Params

Mode = Literal["refresh", "periodic", "persistent"]


class RefreshState(NamedTuple):
    """W carries; that of slot s started at the last frame whose number is s modulo W."""

    carry: Carry  # leaves [B, W, H]
    age: jax.Array  # [B] int32, frames of this episode so far


class PeriodicState(NamedTuple):
    """A carry that is zeroed every `window_size` frames."""

    carry: Carry  # leaves [B, H]
    age: jax.Array  # [B] int32, frames of this episode so far
    window_size: jax.Array  # [B] int32, W


class PersistentState(NamedTuple):
    """A carry that runs on."""

    carry: Carry  # leaves [B, H]


class MemorylessState(NamedTuple):
    """Nothing: what a decoder without memory remembers, in every mode."""


State = (
    RefreshState
    | PeriodicState
    | PersistentState
    | MemorylessState
    | GPTRefreshState
    | GPTPeriodicState
    | SeenState
)


def init(
    params: Params,
    config: DecoderConfig,
    batch_size: int,
    *,
    mode: Mode = "refresh",
    window_size: int | None = None,
) -> State:
    """Returns the state before the first frame.

    Args:
      params: of the decoder, from `decoders.init`.
      config: of the decoder.
      batch_size: B, robots that act together.
      mode: what is forgotten, and when.
      window_size: W, in frames; None means that of the config, which is the largest for "gpt".

    Raises:
      ValueError: an unknown mode, a size below 1, params of another kind of decoder, or what
        takes more positions than a "gpt" has.
    """
    window_size = config.window_size if window_size is None else window_size
    _check_init(params, config, batch_size, mode, window_size)
    if config.kind == "fc":
        return MemorylessState()
    if config.kind == "gpt":
        begin = streaming_gpt.init_refresh if mode == "refresh" else streaming_gpt.init_periodic
        return begin(config, batch_size, window_size)
    memory = _init_memory(config, batch_size, mode, window_size)
    if config.head == "autoregressive":
        lasts = config.window_size if mode == "persistent" else window_size
        return feature_buffer.init(config, memory, lasts)
    return memory


def lay_out(params: Params, config: DecoderConfig, state: State) -> Params:
    """Returns params with which `step` gives the same faster, where it can: kernels turned over.

    They are for `step` on such states alone. Where a CPU is JAX's default, in mode "refresh" and
    with few rows B · W, large kernels of the recurrence are copied as `[G·H, D]` and read as they
    lie, once a step.

    Args:
      params: of the decoder, from `decoders.init`.
      config: of the decoder.
      state: from `init`.
    """
    if isinstance(state, SeenState):
        state = state.memory
    if not isinstance(state, RefreshState):
        return params
    batch_size, window_size, _ = jax.tree.leaves(state.carry)[0].shape
    prepared = recurrence.prepare_params(
        params["recurrence"], recurrence_config(config), num_rows=batch_size * window_size
    )
    return params if prepared is params["recurrence"] else {**params, "recurrence": prepared}


def step(
    params: Params,
    config: DecoderConfig,
    state: State,
    tokens: Array,
    *,
    token_mask: Array | None = None,
    reset: Array | None = None,
) -> tuple[State, ActionChunk]:
    """Returns the state after one frame, and the chunk that is predicted there.

    Args:
      params: of the decoder, from `decoders.init` or `lay_out`.
      config: of the decoder.
      state: from `init` or the step before.
      tokens: of one frame, `[B, N, D]`.
      token_mask: `[B, N]`, True where the token is real; None means everywhere.
      reset: `[B]`, True where this frame is the first of an episode; None means nowhere.

    Returns:
      The state, and arm `[B, K, A-1]`, gripper logit `[B, K]`.

    Raises:
      ValueError: `tokens` are not `[B, N, D]` with the config's N and D.

    Source: mode "refresh" has the behaviour of RoboVLMs' `LSTMDecoder` and `GPTDecoder` at
    inference.
    """
    check_tokens(config, tokens, "[B, N, D]")
    reset = jnp.zeros(tokens.shape[:1], bool) if reset is None else jnp.asarray(reset)
    chex.assert_shape(reset, tokens.shape[:1])
    chex.assert_tree_shape_prefix(state, tokens.shape[:1])
    pooled = pool(params, config, tokens, token_mask=token_mask)
    if isinstance(state, SeenState):
        return _look_back(params, config, state, pooled, reset)
    state, features = _STEPS[type(state)](params, config, state, pooled, reset)
    return state, heads.actions(predict(params, config, features))


def check_mode(config: DecoderConfig, mode: str) -> None:
    """Raises a ValueError unless there is such a mode, and the decoder can stream in it."""
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode '{mode}'; {did_you_mean(mode, get_args(Mode))}")
    if config.kind == "gpt" and mode == "persistent":
        raise ValueError(
            "mode must be 'refresh' or 'periodic' for a decoder of kind 'gpt', whose positions "
            f"end at window_size = {config.window_size}, got 'persistent'; choose one of them."
        )


def _check_init(
    params: Params, config: DecoderConfig, batch_size: int, mode: str, window_size: int
) -> None:
    trunk = TRUNKS[config.kind].name
    if trunk not in params:
        raise ValueError(
            f"params must have '{trunk}' for a decoder of kind '{config.kind}', got "
            f"{sorted(params)}; use the config they were trained with."
        )
    check_mode(config, mode)
    for name, size in (("batch_size", batch_size), ("window_size", window_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    if config.kind == "gpt" and window_size > config.window_size:
        raise ValueError(
            f"window_size must be at most {config.window_size} for a decoder of kind 'gpt', which "
            f"has learned no later position, got {window_size}; train with a larger window_size."
        )


def _init_memory(
    config: DecoderConfig, batch_size: int, mode: Mode, window_size: int
) -> RefreshState | PeriodicState | PersistentState:
    carry = recurrence.zero_carry(recurrence_config(config), jnp.zeros((batch_size, 1)))
    age = jnp.zeros((batch_size,), jnp.int32)
    if mode == "persistent":
        return PersistentState(carry)
    if mode == "periodic":
        return PeriodicState(carry, age, jnp.full((batch_size,), window_size, jnp.int32))
    return RefreshState(jax.tree.map(lambda h: jnp.repeat(h[:, None], window_size, 1), carry), age)


def _look_back(
    params: Params, config: DecoderConfig, state: SeenState, pooled: jax.Array, reset: Array
) -> tuple[SeenState, ActionChunk]:
    memory, _ = _STEPS[type(state.memory)](params, config, state.memory, pooled, reset)
    age = jnp.where(reset, 0, state.age)
    life, slot = age, None
    if isinstance(memory, PeriodicState):
        life = age % memory.window_size
    if isinstance(memory, RefreshState):
        slot = _oldest(age, jax.tree.leaves(memory.carry)[0].shape[1])
    state = state._replace(age=age + 1)
    return feature_buffer.step(params, config, state, memory, life=life, slot=slot)


def _oldest(age: jax.Array, window_size: int) -> jax.Array:
    """Returns which of the W carries has lived longest, of frame number `age` of the episode."""
    return jnp.where(age < window_size, 0, (age + 1) % window_size)


def _refresh(
    params: Params, config: DecoderConfig, state: RefreshState, pooled: jax.Array, reset: Array
) -> tuple[RefreshState, jax.Array]:
    window_size = jax.tree.leaves(state.carry)[0].shape[1]
    age = jnp.where(reset, 0, state.age)
    starts = (age % window_size)[:, None] == jnp.arange(window_size)[None]
    # The frame is [B, 1, D'] against carries [B, W, H]: its product with the input kernel of the
    # first layer is taken once and shared by all of them.
    carry, outputs = recurrence.step(
        params["recurrence"], recurrence_config(config), state.carry, pooled[:, None], reset=starts
    )
    oldest = _oldest(age, window_size)
    features = jnp.take_along_axis(outputs, oldest[:, None, None], axis=1)[:, 0]
    return RefreshState(carry, age + 1), features


def _periodic(
    params: Params, config: DecoderConfig, state: PeriodicState, pooled: jax.Array, reset: Array
) -> tuple[PeriodicState, jax.Array]:
    age = jnp.where(reset, 0, state.age)
    starts = age % state.window_size == 0
    carry, features = recurrence.step(
        params["recurrence"], recurrence_config(config), state.carry, pooled, reset=starts
    )
    return PeriodicState(carry, age + 1, state.window_size), features


def _persistent(
    params: Params, config: DecoderConfig, state: PersistentState, pooled: jax.Array, reset: Array
) -> tuple[PersistentState, jax.Array]:
    carry, features = recurrence.step(
        params["recurrence"], recurrence_config(config), state.carry, pooled, reset=reset
    )
    return PersistentState(carry), features


def _memoryless(
    params: Params, config: DecoderConfig, state: MemorylessState, pooled: jax.Array, reset: Array
) -> tuple[MemorylessState, jax.Array]:
    del reset
    return state, layers.apply_mlp(params["mlp"], pooled, dtype=config.dtype)


_STEPS = {
    RefreshState: _refresh,
    PeriodicState: _periodic,
    PersistentState: _persistent,
    MemorylessState: _memoryless,
    GPTRefreshState: streaming_gpt.refresh,
    GPTPeriodicState: streaming_gpt.periodic,
}
