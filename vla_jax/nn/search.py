"""Greedy decoding and beam search for `seq2seq`.

Both stop when every row of the batch has ended. Both can be jitted: the number of steps depends on
the data, the shapes of the results do not.
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
    """Decoded targets; a beam search adds an axis `num_beams` after `B`, best first."""

    ids: Array  # [B, T] int32, END after the last id
    score: Array  # [B] float32, log probability; divided by the length penalty in a beam search
    weights: Array | None  # [B, T, S] attention weights, 0 after the end; None without attention


class _Rows(NamedTuple):
    """Search state; R = B, or B · num_beams."""

    state: DecoderState
    inputs: jax.Array  # [R, embed_size], of the next step
    ids: jax.Array  # [R, T]
    weights: Any  # [R, T, S], or None
    log_prob: jax.Array  # [R]
    length: jax.Array  # [R] int32, ids so far, including the end
    ended: jax.Array  # [R] bool


def greedy(
    params: Params, config: Seq2SeqConfig, memory: Memory, *, max_steps: int
) -> SearchResult:
    """Returns the targets of greedy decoding: each id is the most probable one.

    Args:
      params: from `seq2seq.init`.
      config: the config given to `init`, with target "tokens".
      memory: from `seq2seq.encode`.
      max_steps: T, maximum length; longer targets are truncated.

    Raises:
      ValueError: the target is not "tokens", or T is not positive.
    """
    _check(config, max_steps)

    def decode_one(loop: tuple[jax.Array, _Rows]) -> tuple[jax.Array, _Rows]:
        t, row = loop
        state, decoded = seq2seq.step(params, config, memory, row.state, row.inputs)
        ids = jnp.where(row.ended, END, argmax(decoded.outputs))
        log_probs = jnp.where(row.ended[:, None], 0.0, jax.nn.log_softmax(decoded.outputs))
        log_prob = row.log_prob + jnp.take_along_axis(log_probs, ids[:, None], axis=-1)[:, 0]
        row = row._replace(state=state, log_prob=log_prob)
        return t + 1, _append(params, config, row, t, ids, decoded.weights)

    _, row = jax.lax.while_loop(_continues, decode_one, _begin(params, config, memory, max_steps))
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
    """Returns the best targets found by a beam search.

        score = log P(ids) / ((5 + length) / 6)^α        length includes the end

    Log probabilities decrease with every id, so α = 0 prefers short targets; α ≈ 0.6 … 1
    compensates for this. A beam that has ended stays and competes with its score. With one beam the
    ids are those of `greedy`.

    Args:
      params: from `seq2seq.init`.
      config: the config given to `init`, with target "tokens".
      memory: from `seq2seq.encode`.
      beam_size: number of beams; if fewer targets exist, the last have a score of −∞.
      max_steps: T, maximum length; longer targets are truncated.
      length_penalty: α, 0 for none.

    Returns:
      Ids `[B, num_beams, T]`, scores `[B, num_beams]`, weights `[B, num_beams, T, S]`.

    Raises:
      ValueError: the target is not "tokens", or `beam_size` or T is not positive.

    Source: Wu et al. 2016, GNMT (arXiv:1609.08144), equation 14, without coverage penalty.
    """
    _check(config, max_steps, beam_size)
    repeated = jax.tree.map(lambda part: jnp.repeat(part, beam_size, axis=0), memory)
    t, row = _begin(params, config, repeated, max_steps)
    # All beams start equal: only the first may be extended.
    first = jnp.arange(len(row.ended)) % beam_size == 0
    row = row._replace(log_prob=jnp.where(first, 0.0, -jnp.inf))

    def decode_one(loop: tuple[jax.Array, _Rows]) -> tuple[jax.Array, _Rows]:
        t, row = loop
        state, decoded = seq2seq.step(params, config, repeated, row.state, row.inputs)
        row = row._replace(state=state, length=row.length + ~row.ended)
        log_prob = _extend(row, jax.nn.log_softmax(decoded.outputs))
        score = log_prob / _penalty(row.length, length_penalty)[:, None]
        beams, ids = _best(score, beam_size)
        row, weights = trees.gather((row, decoded.weights), beams)
        row = row._replace(log_prob=log_prob[beams, ids])
        return t + 1, _append(params, config, row, t, ids, weights)

    _, row = jax.lax.while_loop(_continues, decode_one, (t, row))
    score = row.log_prob / _penalty(row.length, length_penalty)
    return jax.tree.map(
        lambda part: part.reshape(-1, beam_size, *part.shape[1:]),
        SearchResult(row.ids, score, row.weights),
    )


def _begin(
    params: Params, config: Seq2SeqConfig, memory: Memory, max_steps: int
) -> tuple[jax.Array, _Rows]:
    state, inputs = seq2seq.start(params, config, memory)
    num_rows, weights = len(inputs), None
    if memory.source is not None:
        weights = jnp.zeros((num_rows, max_steps, memory.source.keys.shape[1]))
    row = _Rows(
        state=state,
        inputs=inputs,
        ids=jnp.full((num_rows, max_steps), END, jnp.int32),
        weights=weights,
        log_prob=jnp.zeros(num_rows),
        length=jnp.zeros(num_rows, jnp.int32),
        ended=jnp.zeros(num_rows, bool),
    )
    return jnp.int32(0), row


def _continues(loop: tuple[jax.Array, _Rows]) -> jax.Array:
    t, row = loop
    return (t < row.ids.shape[1]) & ~jnp.all(row.ended)


def _append(
    params: Params, config: Seq2SeqConfig, row: _Rows, t: jax.Array, ids: jax.Array, weights: Any
) -> _Rows:
    """Appends one id to each row; ended rows get END."""
    if weights is not None:
        weights = row.weights.at[:, t].set(jnp.where(row.ended[:, None], 0.0, weights))
    return row._replace(
        inputs=seq2seq.embed(params, config, ids),
        ids=row.ids.at[:, t].set(ids),
        weights=weights,
        ended=row.ended | (ids == END),
    )


def _extend(row: _Rows, log_probs: jax.Array) -> jax.Array:
    """Returns the log probabilities `[R, V]` of all extensions; ended rows allow END only."""
    only_end = jnp.where(jnp.arange(log_probs.shape[-1]) == END, 0.0, -jnp.inf)
    only_end = jnp.broadcast_to(only_end, log_probs.shape)
    return row.log_prob[:, None] + jnp.where(row.ended[:, None], only_end, log_probs)


def _best(score: jax.Array, beam_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the rows `[R]` and ids `[R]` of the best extensions of each group of beams."""
    vocab_size = score.shape[-1]
    _, indices = jax.lax.top_k(score.reshape(-1, beam_size * vocab_size), beam_size)
    group = jnp.arange(len(indices))[:, None] * beam_size
    rows = jnp.broadcast_to(group, indices.shape) + indices // vocab_size
    return rows.reshape(-1), (indices % vocab_size).astype(jnp.int32).reshape(-1)


def _penalty(length: jax.Array, alpha: float) -> jax.Array:
    return ((5.0 + length) / 6.0) ** alpha


def _check(config: Seq2SeqConfig, max_steps: int, beam_size: int = 1) -> None:
    if config.target != "tokens":
        raise ValueError(
            f"target must be 'tokens' for a search, got '{config.target}'; for vectors use "
            "`scheduled_sampling.free_running`."
        )
    for name, size in (("max_steps", max_steps), ("beam_size", beam_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
