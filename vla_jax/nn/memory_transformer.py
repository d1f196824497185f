"""Recurrent memory transformer: a rotary transformer whose segments pass memory tokens to the next.

An episode is cut into segments of S steps. The m memory tokens of a segment stand before its steps,
to be read, and again after them, to be written:

    [memory; x₁ … x_S; memory] → transformer → [·; y₁ … y_S; memory of the next segment]

Memory tokens that are read attend to each other, steps to them and to the steps of their segment so
far, memory tokens that are written to everything. The first segment of an episode reads a learned
memory. Gradients pass through all segments.

- `apply` runs a sequence as a scan over segments. A masked step counts for nothing and gives zeros;
  a step whose `reset` is True starts an episode, and a segment with it.
- `step` runs one step with a cache of the keys and values of its segment. At the start of a segment
  the memory of the last one is written, and read.

Source: Bulatov et al. 2022, "Recurrent Memory Transformer" (arXiv:2207.06881), decoder.
"""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from vla_jax.config import checked
from vla_jax.nn import rotary_transformer
from vla_jax.nn.attention import episode_positions
from vla_jax.nn.bptt import keep_real
from vla_jax.nn.rotary_transformer import RotaryTransformerConfig, angles_of, attention, rotated
from vla_jax.nn.transformer import Cache, KeysValues
from vla_jax.types import Array, Key, Params


@dataclasses.dataclass(frozen=True)
@checked(num_memory_tokens=(0, 2**16), segment_size=(0, 2**16))
class MemoryTransformerConfig:
    """A rotary transformer with memory tokens; the `span` of its layers is not used."""

    transformer: RotaryTransformerConfig = RotaryTransformerConfig()  # sizes of the layers
    num_memory_tokens: int = 8  # m, vectors that a segment passes to the next segment
    segment_size: int = 16  # S, steps of a segment
    remat: bool = False  # whether to recompute each segment in the backward pass

    def __post_init__(self):
        for name in ("num_memory_tokens", "segment_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


class SegmentState(NamedTuple):
    """Streaming state: the open segment."""

    memory: Array  # [B, m, H] float32, read by the segment
    cache: Cache  # leaves [B, m + S, M', E], rotated keys; of the memory, then of the steps


class _Segments(NamedTuple):
    """Steps of a sequence by segment; G is an upper bound of the number of segments."""

    index: jax.Array  # [G, B, S] int32, position of each step in the sequence
    real: jax.Array  # [G, B, S] bool, True where there is a step
    fresh: jax.Array  # [G, B] bool, True where a reset started the segment


def init(key: Key, config: MemoryTransformerConfig) -> Params:
    """Returns the params of the transformer, and `"memory" [m, H]`, drawn from N(0, 0.02²).

    Args:
      key: consumed.
      config: sizes.
    """
    memory_key, transformer_key = jax.random.split(key)
    shape = (config.num_memory_tokens, config.transformer.hidden_size)
    return {
        **rotary_transformer.init(transformer_key, config.transformer),
        "memory": 0.02 * jax.random.normal(memory_key, shape),
    }


def apply(
    params: Params,
    config: MemoryTransformerConfig,
    inputs: Array,
    *,
    mask: Array | None = None,
    reset: Array | None = None,
    carry: dict[str, Any] | None = None,
    key: Key | None = None,
) -> tuple[dict[str, Any], jax.Array]:
    """Returns the carry after the last step, and the outputs of all steps.

    Without `reset` there are ⌈T / S⌉ segments. With it there may be up to T, of which those that no
    row of the batch has are skipped, and segments are recomputed in the backward pass.

    Args:
      params: from `init`.
      config: the config given to `init`.
      inputs: `[B, T, H]`, T of any length; masked steps may be NaN.
      mask: `[B, T]`, True where the step is real; None means everywhere.
      reset: `[B, T]`, True where a new episode starts, on a masked step too; None means nowhere.
      carry: of the call for the steps before; None means the start of an episode.
      key: consumed, for dropout; None means no dropout.

    Returns:
      `{"memory" [B, m, H], "inputs" [B, S, H], "count" [B]}`: memory and steps of the open segment
      and their number; and outputs `[B, T, H]`, float32, zeros at masked steps.
    """
    real, starts = rotary_transformer.check_flags(config.transformer, inputs, mask, reset)
    steps, num_steps, size = keep_real(inputs, mask), inputs.shape[1], config.segment_size
    memory = _first_memory(params, inputs)
    if carry is not None:  # the steps of the open segment are run again
        memory, is_open = carry["memory"], jnp.arange(size)[None] < carry["count"][:, None]
        steps = jnp.concatenate([carry["inputs"], steps], axis=1)
        real = jnp.concatenate([is_open, real], axis=1)
        starts = jnp.concatenate([jnp.zeros_like(is_open), starts], axis=1)
    total = steps.shape[1]
    bound = -(-total // size) if reset is None else total
    segments, segment, slot = _segments(real, starts, size, bound)
    last, outputs = _scan(params, config, segments, steps, memory, key, skip=reset is not None)
    rows = jnp.arange(inputs.shape[0])[:, None]
    outputs = keep_real(outputs[segment, rows, slot], real)
    return _carry_after(params, real, starts, last), outputs[:, total - num_steps :]


def init_state(config: MemoryTransformerConfig, batch_size: int) -> SegmentState:
    """Returns the state before the first step; it is filled where `step` starts an episode.

    Args:
      config: sizes.
      batch_size: B.
    """
    num_tokens, size = config.num_memory_tokens, config.transformer.hidden_size
    return SegmentState(
        memory=jnp.zeros((batch_size, num_tokens, size)),
        cache=rotary_transformer.init_cache(
            config.transformer, batch_size, num_tokens + config.segment_size
        ),
    )


def step(
    params: Params,
    config: MemoryTransformerConfig,
    state: SegmentState,
    inputs: Array,
    position: Array,
) -> tuple[SegmentState, jax.Array]:
    """Returns the state after one more step, and the output of that step, without dropout.

    Where any row of the batch starts a segment, memory is written and read for the whole batch.

    Args:
      params: from `init`.
      config: the config given to `init`.
      state: of the steps before.
      inputs: `[B, H]`.
      position: `[B]` int32, steps of this episode before this one; 0 starts an episode.

    Returns:
      The state, and the output `[B, H]`, float32.
    """
    chex.assert_shape(inputs, (None, config.transformer.hidden_size))
    chex.assert_shape(position, inputs.shape[:1])
    chex.assert_tree_shape_prefix(state, inputs.shape[:1])
    position, rows = jnp.asarray(position), jnp.arange(inputs.shape[0])
    slot = position % config.segment_size
    state = jax.lax.cond(
        jnp.any(slot == 0),
        lambda: _begin_segment(params, config, state, slot == 0, position == 0),
        lambda: SegmentState(*state),
    )
    place, new_cache = config.num_memory_tokens + slot, {}
    angles = angles_of(config.transformer, place[:, None])
    visible = jnp.arange(config.num_memory_tokens + config.segment_size)[None] <= place[:, None]

    def attend(name: str, query: jax.Array, entry: KeysValues) -> jax.Array:
        new = KeysValues(rotated(entry.keys, angles), entry.values)
        keys, values = new_cache[name] = jax.tree.map(
            lambda old, part: jnp.asarray(old).at[rows, place].set(part[:, 0]),
            state.cache[name],
            new,
        )
        return attention(rotated(query, angles), keys, values, visible[:, None])

    steps = jnp.asarray(inputs)[:, None]
    outputs = rotary_transformer.run(params, config.transformer, steps, attend)
    return SegmentState(state.memory, new_cache), outputs[:, 0]


def _segments(
    real: jax.Array, starts: jax.Array, size: int, bound: int
) -> tuple[_Segments, jax.Array, jax.Array]:
    """Returns the segments, and the segment and the slot of every step `[B, T]`."""
    position = episode_positions(real, starts)
    slot = position % size
    begins = real & (slot == 0)
    segment = jnp.cumsum(begins, axis=1) - 1
    is_new = begins & (position == 0) & (jnp.cumsum(starts, axis=1) > 0)

    def of_row(
        real: jax.Array, begins: jax.Array, is_new: jax.Array, segment: jax.Array, slot: jax.Array
    ) -> _Segments:
        place = (jnp.where(real, segment, bound), slot)  # masked steps are dropped
        shape = (bound, size)
        return _Segments(
            jnp.zeros(shape, jnp.int32).at[place].set(jnp.arange(len(real)), mode="drop"),
            jnp.zeros(shape, bool).at[place].set(True, mode="drop"),
            jnp.zeros(bound, bool).at[jnp.where(begins, segment, bound)].set(is_new, mode="drop"),
        )

    segments = jax.vmap(of_row, out_axes=1)(real, begins, is_new, segment, slot)
    return segments, jnp.maximum(segment, 0), slot


def _scan(
    params: Params,
    config: MemoryTransformerConfig,
    segments: _Segments,
    steps: jax.Array,
    memory: jax.Array,
    key: Key | None,
    *,
    skip: bool,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Runs all segments; returns those of `_carry_after`, and outputs `[G, B, S, H]`."""
    first = _first_memory(params, steps)
    nothing = steps[:, :1] * jnp.zeros((1, config.segment_size, 1))

    def run(state: tuple[jax.Array, ...], part: tuple[_Segments, jax.Array]) -> Any:
        (index, real, fresh), number = part
        memory, *last = state
        inputs = keep_real(jnp.take_along_axis(steps, index[..., None], axis=1), real)
        read = jnp.where(fresh[:, None, None], first, memory)
        segment_key = None if key is None else jax.random.fold_in(key, number)
        outputs, written = _run_segment(params, config, read, inputs, real, segment_key)
        exists = jnp.any(real, axis=1)[:, None, None]
        now = (read, inputs, jnp.sum(real, axis=1))
        chosen = (
            jnp.where(exists.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
            for new, old in zip(now, last, strict=True)
        )
        return (jnp.where(exists, written, memory), *chosen), outputs

    def run_if_any(state: tuple[jax.Array, ...], part: tuple[_Segments, jax.Array]) -> Any:
        return jax.lax.cond(jnp.any(part[0].real), run, lambda *_: (state, nothing), state, part)

    body = run_if_any if skip else run
    if skip or config.remat:
        body = jax.checkpoint(body)
    count = jnp.zeros(steps.shape[0], jnp.int32)
    numbers = jnp.arange(len(segments.fresh))
    (_, *last), outputs = jax.lax.scan(body, (memory, memory, nothing, count), (segments, numbers))
    return tuple(last), outputs


def _carry_after(
    params: Params, real: jax.Array, starts: jax.Array, last: tuple[jax.Array, ...]
) -> dict[str, Any]:
    """Returns the carry from memory, inputs and number of steps of each row's last segment."""
    memory, inputs, count = last
    after = episode_positions(*(jnp.pad(flags, ((0, 0), (0, 1))) for flags in (real, starts)))
    # A reset on a masked step, without a step after it: the next one starts an episode.
    is_cleared = (after[:, -1] == 0) & jnp.any(starts, axis=1)
    first = _first_memory(params, inputs)
    return {
        "memory": jnp.where(is_cleared[:, None, None], first, memory),
        "inputs": inputs,
        "count": jnp.where(is_cleared, 0, count),
    }


def _run_segment(
    params: Params,
    config: MemoryTransformerConfig,
    memory: jax.Array,
    inputs: jax.Array,
    real: jax.Array,
    key: Key | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs `[B, S, H]` of a segment, and the memory that it writes."""
    num_tokens, size = config.num_memory_tokens, inputs.shape[1]
    total = size + 2 * num_tokens
    kind = jnp.repeat(
        jnp.arange(3), jnp.array([num_tokens, size, num_tokens]), total_repeat_length=total
    )  # 0 read, 1 step, 2 written
    order = jnp.where(kind == 1, jnp.arange(total), kind * total)  # memory tokens are simultaneous
    is_there = jnp.pad(real, ((0, 0), (num_tokens, num_tokens)), constant_values=True)
    visible = (order[None, :] <= order[:, None])[None] & is_there[:, None] & is_there[..., None]
    angles = angles_of(config.transformer, jnp.arange(total)[None])

    def attend(name: str, query: jax.Array, entry: KeysValues) -> jax.Array:
        del name
        return attention(rotated(query, angles), rotated(entry.keys, angles), entry.values, visible)

    tokens = jnp.concatenate([memory, inputs, memory], axis=1)
    outputs = rotary_transformer.run(params, config.transformer, tokens, attend, key=key)
    return outputs[:, num_tokens:-num_tokens], outputs[:, -num_tokens:]


def _begin_segment(
    params: Params,
    config: MemoryTransformerConfig,
    state: SegmentState,
    begins: jax.Array,
    is_first: jax.Array,
) -> SegmentState:
    """Returns the state before the first step of a segment in the rows where one begins."""
    num_tokens = config.num_memory_tokens
    written = _run_memory(params, config, state, config.segment_size + num_tokens)[1]
    first = _first_memory(params, written)
    memory = jnp.where(is_first[:, None, None], first, written)
    entries, _ = _run_memory(params, config, SegmentState(memory, {}), 0)
    cache = {
        name: jax.tree.map(
            lambda old, new: jnp.where(
                begins[:, None, None, None], jnp.asarray(old).at[:, :num_tokens].set(new), old
            ),
            state.cache[name],
            entry,
        )
        for name, entry in entries.items()
    }
    return SegmentState(jnp.where(begins[:, None, None], memory, state.memory), cache)


def _run_memory(
    params: Params, config: MemoryTransformerConfig, state: SegmentState, place: int
) -> tuple[Cache, jax.Array]:
    """Runs the memory tokens at `place`, after everything in the cache, which may be empty.

    Returns:
      Their keys, rotated, and values, and their outputs `[B, m, H]`.
    """
    angles = angles_of(config.transformer, place + jnp.arange(config.num_memory_tokens)[None])
    entries: Cache = {}

    def attend(name: str, query: jax.Array, entry: KeysValues) -> jax.Array:
        entries[name] = entry = KeysValues(rotated(entry.keys, angles), entry.values)
        if name in state.cache:
            entry = jax.tree.map(
                lambda old, new: jnp.concatenate([old, new], axis=1), state.cache[name], entry
            )
        visible = jnp.ones((1, 1, entry.keys.shape[1]), bool)
        return attention(rotated(query, angles), jnp.asarray(entry.keys), entry.values, visible)

    outputs = rotary_transformer.run(params, config.transformer, state.memory, attend)
    return entries, outputs


def _first_memory(params: Params, like: Array) -> jax.Array:
    """Returns the learned memory `[B, m, H]` for the rows of `like [B, ...]`."""
    memory = jnp.asarray(params["memory"])
    return jnp.broadcast_to(memory[None], (like.shape[0], *memory.shape))
