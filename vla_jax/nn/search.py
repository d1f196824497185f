"""What a decoder of `seq2seq` writes: the argmax id at each step, or the best of many beams.

Both end when every row of the batch has ended. They compile; the number of steps follows from the
data, the size of what is returned does not.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax import trees
from vla_jax.nn import seq2seq
from vla_jax.nn.scheduled_sampling import argmax
from vla_jax.nn.seq2seq import END, DecoderState, Memory, Seq2SeqConfig
from vla_jax.types import Array, Params


class SearchResult(NamedTuple):
    """Targets as they were written; of a beam search with an axis `M` behind `B`, best first."""

    ids: Array  # [B, T] int32, END behind the last one
    score: Array  # [B] float32, log probability; of a beam search, over the length penalty
    weights: Array | None  # [B, T, S] of the attention, 0 behind the end; None without


class _Row(NamedTuple):
    """A row of a batch (or a beam of it) while it is written."""

    state: DecoderState
    inputs: jax.Array  # [B, E], what the next step eats
    ids: jax.Array  # [B, T]
    weights: Any  # [B, T, S], or None
    log_prob: jax.Array  # [B]
    length: jax.Array  # [B] int32, ids so far, the end among them
    ended: jax.Array  # [B] bool


def greedy(
    params: Params, config: Seq2SeqConfig, memory: Memory, *, max_steps: int
) -> SearchResult:
    """Returns the target in which each id is the argmax after those before it.

    Args:
      params: from `seq2seq.init`.
      config: the one that `init` was given; its target is "tokens".
      memory: from `seq2seq.encode`.
      max_steps: T, where a row that has not ended is cut.

    Raises:
      ValueError: the target is not "tokens", or T is not positive.
    """
    _check(config, max_steps)

    def write_one(loop: tuple[jax.Array, _Row]) -> tuple[jax.Array, _Row]:
        t, row = loop
        state, decoded = seq2seq.step(params, config, memory, row.state, row.inputs)
        ids = jnp.where(row.ended, END, argmax(decoded.outputs))
        log_probs = jnp.where(row.ended[:, None], 0.0, jax.nn.log_softmax(decoded.outputs))
        log_prob = row.log_prob + jnp.take_along_axis(log_probs, ids[:, None], axis=-1)[:, 0]
        following = row._replace(state=state, log_prob=log_prob)
        return t + 1, _say(params, config, following, t, ids, decoded.weights)

    _, row = jax.lax.while_loop(_goes_on, write_one, _begin(params, config, memory, max_steps))
    return SearchResult(row.ids, row.log_prob, row.weights)


def beam(
    params: Params,
    config: Seq2SeqConfig,
    memory: Memory,
    *,
    beam_size: int,
    max_steps: int,
    length_penalty: float = 0.0,
) -> SearchResult:
    """Returns the M best targets that were found, of those that begin like one of the M best.

        score = log P(ids) / ((5 + length) / 6)^α        length counts the end

    Log probabilities fall with every id, so that α = 0 prefers what is short; α ≈ 0.6 … 1 makes
    up for it. A beam that has ended stays, and competes with its score. M = 1 is `greedy`.

    Args:
      params: from `seq2seq.init`.
      config: the one that `init` was given; its target is "tokens".
      memory: from `seq2seq.encode`.
      beam_size: M; where fewer targets exist, the last have a score of −∞.
      max_steps: T, where a beam that has not ended is cut.
      length_penalty: α, 0 for none.

    Returns:
      Ids `[B, M, T]`, scores `[B, M]`, weights `[B, M, T, S]`.

    Raises:
      ValueError: the target is not "tokens", or M or T is not positive.

    Source: Wu et al. 2016, GNMT (arXiv:1609.08144), equation 14, without its coverage.
    """
    _check(config, max_steps, beam_size)
    many = jax.tree.map(lambda part: jnp.repeat(part, beam_size, axis=0), memory)
    t, row = _begin(params, config, many, max_steps)
    # All beams begin alike: only the first may be continued.
    first = jnp.arange(len(row.ended)) % beam_size == 0
    row = row._replace(log_prob=jnp.where(first, 0.0, -jnp.inf))

    def write_one(loop: tuple[jax.Array, _Row]) -> tuple[jax.Array, _Row]:
        t, row = loop
        state, decoded = seq2seq.step(params, config, many, row.state, row.inputs)
        row = row._replace(state=state, length=row.length + ~row.ended)
        log_prob = _continued(row, jax.nn.log_softmax(decoded.outputs))
        score = log_prob / _penalty(row.length, length_penalty)[:, None]
        beams, ids = _best(score, beam_size)
        row, weights = trees.gather((row, decoded.weights), beams)
        row = row._replace(log_prob=log_prob[beams, ids])
        return t + 1, _say(params, config, row, t, ids, weights)

    _, row = jax.lax.while_loop(_goes_on, write_one, (t, row))
    score = row.log_prob / _penalty(row.length, length_penalty)
    return jax.tree.map(
        lambda part: part.reshape(-1, beam_size, *part.shape[1:]),
        SearchResult(row.ids, score, row.weights),
    )


def _begin(
    params: Params, config: Seq2SeqConfig, memory: Memory, max_steps: int
) -> tuple[jax.Array, _Row]:
    state, inputs = seq2seq.start(params, config, memory)
    num_rows, weights = len(inputs), None
    if memory.source is not None:
        weights = jnp.zeros((num_rows, max_steps, memory.source.keys.shape[1]))
    row = _Row(
        state=state,
        inputs=inputs,
        ids=jnp.full((num_rows, max_steps), END, jnp.int32),
        weights=weights,
        log_prob=jnp.zeros(num_rows),
        length=jnp.zeros(num_rows, jnp.int32),
        ended=jnp.zeros(num_rows, bool),
    )
    return jnp.int32(0), row


def _goes_on(loop: tuple[jax.Array, _Row]) -> jax.Array:
    t, row = loop
    return (t < row.ids.shape[1]) & ~jnp.all(row.ended)


def _say(
    params: Params, config: Seq2SeqConfig, row: _Row, t: jax.Array, ids: jax.Array, weights: Any
) -> _Row:
    """Returns the rows with one more id each; where they have ended, it is END."""
    if weights is not None:
        weights = row.weights.at[:, t].set(jnp.where(row.ended[:, None], 0.0, weights))
    return row._replace(
        inputs=seq2seq.embed(params, config, ids),
        ids=row.ids.at[:, t].set(ids),
        weights=weights,
        ended=row.ended | (ids == END),
    )


def _continued(row: _Row, log_probs: jax.Array) -> jax.Array:
    """Returns the log probability of each row with each id `[B·M, V]`; of an ended one, END."""
    only_end = jnp.where(jnp.arange(log_probs.shape[-1]) == END, 0.0, -jnp.inf)
    only_end = jnp.broadcast_to(only_end, log_probs.shape)
    return row.log_prob[:, None] + jnp.where(row.ended[:, None], only_end, log_probs)


def _best(score: jax.Array, beam_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the rows `[B·M]` and the ids `[B·M]` of the M best of each group of M rows."""
    vocab_size = score.shape[-1]
    _, places = jax.lax.top_k(score.reshape(-1, beam_size * vocab_size), beam_size)
    group = jnp.arange(len(places))[:, None] * beam_size
    rows = jnp.broadcast_to(group, places.shape) + places // vocab_size
    return rows.reshape(-1), (places % vocab_size).astype(jnp.int32).reshape(-1)


def _penalty(length: jax.Array, alpha: float) -> jax.Array:
    return ((5.0 + length) / 6.0) ** alpha


def _check(config: Seq2SeqConfig, max_steps: int, beam_size: int = 1) -> None:
    if config.target != "tokens":
        raise ValueError(
            f"target must be 'tokens' to be searched, got '{config.target}'; vectors come from "
            "`scheduled_sampling.free_running`."
        )
    for name, size in (("max_steps", max_steps), ("beam_size", beam_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
