"""Table of acting states on the device, one row per session, and the programs that step its rows.

The programs are compiled for a few batch sizes and run once before the server accepts requests.
Sessions that step together are gathered from the table, stepped as a batch and scattered back; the
table is donated, so that it exists once.
"""

import bisect
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.acting import whole_chunks
from vla_jax.acting.agent import AgentConfig, AgentState, make_agent, read_instruction
from vla_jax.acting.rows import gather_rows, scatter_rows
from vla_jax.data.normalize import NormStats
from vla_jax.types import Array, Observation, Params, make_observation

Frame = Mapping[str, np.ndarray]  # part of the observation -> one step, from `observations.read`
_SIZES = (1, 4, 16, 64)  # compiled batch sizes


class Stepped(NamedTuple):
    """Result of one tick."""

    state: AgentState  # [S, ...], the table
    actions: np.ndarray  # [R, K, A] float32, the first row for now; K = 1 unless chunks are sent
    is_finite: np.ndarray  # [R] bool; the rows of the others have not changed


class SessionTable(NamedTuple):
    """Compiled programs over a table of S sessions; the table itself is a value."""

    num_rows: int  # S
    max_batch: int  # greatest number of rows of one tick
    init: Callable[[], AgentState]  # table [S, ...] of unused rows
    # (table, slots [R], frames, words [R, S], reset [R]) -> Stepped; the table is consumed
    step: Callable[..., Stepped]
    read: Callable[[AgentState, int], AgentState]  # (table, slot) -> row [1, ...]
    # (table, slot, row [1, ...]) -> table; the table is consumed
    write: Callable[[AgentState, int, AgentState], AgentState]


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Returns the batch sizes to compile, the last one being `max_batch`.

    >>> batch_sizes(8)
    (1, 4, 8)
    """
    return (*(size for size in _SIZES if size < max_batch), max_batch)


def make_table(
    config: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    params: Params,
    blank: Frame,
    *,
    num_rows: int,
    max_batch: int,
    window_size: int | None = None,
    chunks: bool = False,
) -> SessionTable:
    """Returns the programs of a table, compiled for all batch sizes.

    Args:
      config: of the agent.
      norm_stats: of the training data.
      params: of the policy.
      blank: an observation of zeros, from `observations.blank`.
      num_rows: S, the greatest number of sessions.
      max_batch: greatest number of sessions that step together.
      window_size: W in environment steps; None = as in training.
      chunks: gives all actions of the predicted chunks, not the first alone.

    Raises:
      ValueError: the policy's chunks cannot be sent as they are predicted.
    """
    agent = make_agent(config, norm_stats, window_size=window_size)
    if chunks:
        whole_chunks.check(config)
    params = jax.device_put(params)
    sizes = batch_sizes(min(max_batch, num_rows))
    prepared = {size: agent.prepare(params, size) for size in sizes}

    @functools.partial(jax.jit, donate_argnums=1)
    def advance(
        params: Params, table: AgentState, index: Array, observation: Observation, reset: Array
    ) -> tuple[AgentState, Array, Array]:
        rows = gather_rows(table, index)
        if chunks:
            rows, actions = whole_chunks.step(config, norm_stats, params, rows, observation, reset)
        else:
            rows, action = agent.step(params, rows, observation, reset)
            actions = action[:, None]
        is_finite = jnp.isfinite(actions).all(axis=(1, 2))
        kept = jnp.where(is_finite, index, num_rows)  # the row of a refused request is not written
        return scatter_rows(table, kept, rows), actions, is_finite

    def step(
        table: AgentState,
        slots: Sequence[int],
        frames: Sequence[Frame],
        words: Sequence[np.ndarray],
        reset: Sequence[bool],
    ) -> Stepped:
        size = sizes[bisect.bisect_left(sizes, len(slots))]
        missing = size - len(slots)
        index = np.array([*slots, *[num_rows] * missing], np.int32)
        observation = _stack(blank, [*frames, *[blank] * missing], words)
        starts = np.array([*reset, *[True] * missing])
        table, actions, is_finite = advance(prepared[size], table, index, observation, starts)
        count = len(slots)
        return Stepped(
            table, np.asarray(actions, np.float32)[:count], np.asarray(is_finite)[:count]
        )

    read = jax.jit(lambda table, slot: gather_rows(table, slot[None]))
    write = jax.jit(lambda table, slot, row: scatter_rows(table, slot[None], row), donate_argnums=0)

    def init() -> AgentState:
        # Arrays of their own, without weak types: every later table has the same signature.
        return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype), agent.init(params, num_rows))

    table = SessionTable(
        num_rows,
        sizes[-1],
        init,
        step,
        lambda table, slot: read(table, np.int32(slot)),
        lambda table, slot, row: write(table, np.int32(slot), row),
    )
    _run_once(table, sizes, blank, read_instruction(config, ""))
    return table


def _stack(blank: Frame, frames: Sequence[Frame], words: Sequence[np.ndarray]) -> Observation:
    """Returns the frames as one observation `[R, ...]`; missing words are those of the first."""
    parts = {name: np.stack([frame[name] for frame in frames]) for name in blank}
    padded = [*words, *[words[0]] * (len(frames) - len(words))]
    return make_observation(parts, instruction=np.stack(padded))


def _run_once(table: SessionTable, sizes: Sequence[int], blank: Frame, words: np.ndarray) -> None:
    """Compiles all programs by running each of them."""
    state = table.init()
    for size in sizes:
        rows = list(range(size))
        state = table.step(state, rows, [blank] * size, [words] * size, [True] * size).state
    state = table.write(state, 0, table.read(state, 0))
    state = table.write(state, 0, jax.device_get(table.read(state, 0)))  # as a session from a file
    jax.block_until_ready(state)
