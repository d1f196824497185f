"""Encoder-decoder: a source is read whole, then a target is written step by step.

    memory = encode(source)          hₜ = cell(hₜ₋₁, [previous outputₜ₋₁; contextₜ₋₁])
    contextₜ = attention(hₜ, memory)          outputₜ = U tanh(W [hₜ; contextₜ])

The encoder's last carry is the decoder's first. Without attention it is all that the decoder
knows of the source (the bottleneck), and outputₜ = U hₜ. With `feed_context` a step also eats the
context of the step before, as Bahdanau's decoder does; without it, as in Luong's, the carries do
not wait for the contexts, so that in training the recurrence runs once over the whole target and
the attention once over all of its steps.

Source and target are each "tokens" (ids) or "vectors" (as a window of features, or a chunk of
actions). Before the first step stands a learned vector, `start`, which no output can be mistaken
for; the id 0 of a target is its end, and 0 behind the end is padding.

Source: Sutskever et al. 2014 (arXiv:1409.3215); Bahdanau et al. 2015 (arXiv:1409.0473); Luong et
al. 2015 (arXiv:1508.04025).
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from vla_jax.config import did_you_mean
from vla_jax.nn import attention, layers, recurrence
from vla_jax.nn.attention import AttentionConfig, Source
from vla_jax.nn.cells import CellName
from vla_jax.nn.layers import dense, dropout
from vla_jax.nn.recurrence import Carry, RecurrenceConfig
from vla_jax.types import Array, Key, Params

Kind = Literal["tokens", "vectors"]
AnyScore = Literal["additive", "dot", "general", "scaled_dot", "none"]
END = 0  # id of a target's end, and of the padding behind it


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig:
    """An encoder-decoder."""

    source: Kind = "tokens"  # what is read: ids, or vectors
    source_size: int = 32  # V ids, the padding's 0 among them; or D features
    target: Kind = "tokens"  # what is written
    target_size: int = 32  # V ids, the end's 0 among them; or A features
    embed_size: int = 128  # E, features of a source position and of a target step that come in
    cell: CellName = "lstm"  # key of `cells.CELLS`, of both
    num_layers: int = 1  # L, of both
    hidden_size: int = 128  # H, units of each layer and direction
    bidirectional: bool = True  # whether the encoder also reads from the end to the start
    score: AnyScore = "additive"  # how a step looks at the source; "none" = no attention
    score_size: int = 128  # features in which "additive" and "scaled_dot" compare
    feed_context: bool = False  # whether a step eats the context of the step before
    dropout: float = 0.0  # probability, of what comes in, between layers, and before the output
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the factors of matrix products

    def __post_init__(self):
        for name in ("source", "target"):
            if getattr(self, name) not in get_args(Kind):
                kind = getattr(self, name)
                raise ValueError(f"unknown {name} '{kind}'; {did_you_mean(kind, get_args(Kind))}")
        if self.score not in get_args(AnyScore):
            raise ValueError(
                f"unknown score '{self.score}'; {did_you_mean(self.score, get_args(AnyScore))}"
            )
        for name in ("source_size", "target_size", "embed_size", "score_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.feed_context and self.score == "none":
            raise ValueError(
                "feed_context must be False with score 'none', got True; choose a score."
            )
        if self.bidirectional and self.score == "dot":
            raise ValueError(
                "bidirectional must be False with score 'dot', got True; choose 'general'."
            )
        encoder_config(self)  # checks the rest


class Memory(NamedTuple):
    """What is left of a source once it is read."""

    carry: Carry  # the decoder's, before its first step: leaves [B, H]
    source: Source | None  # [B, S, ...], what attention looks at; None for the bottleneck


class DecoderState(NamedTuple):
    """What the decoder remembers between two steps."""

    carry: Carry  # leaves [B, H]
    context: Array | None  # [B, D], of the step before; None unless it is eaten


class Decoded(NamedTuple):
    """What the decoder gives at a step `[B, ...]`, or at all steps `[B, T, ...]`."""

    outputs: Array  # [..., V] logits, or [..., A]; float32
    weights: Array | None  # [..., S] of the attention; None without


def encoder_config(config: Seq2SeqConfig) -> RecurrenceConfig:
    """Returns the config of the encoder's recurrence."""
    return RecurrenceConfig(
        cell=config.cell,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        dropout=config.dropout,
        bidirectional=config.bidirectional,
        dtype=config.dtype,
    )


def decoder_config(config: Seq2SeqConfig) -> RecurrenceConfig:
    """Returns the config of the decoder's recurrence: the same in one direction."""
    return dataclasses.replace(encoder_config(config), bidirectional=False)


def attention_config(config: Seq2SeqConfig) -> AttentionConfig:
    """Returns the config of the attention, where there is any."""
    score: Any = config.score
    return AttentionConfig(score=score, size=config.score_size, dtype=config.dtype)


def init(key: Key, config: Seq2SeqConfig) -> Params:
    """Returns `{"source", "encoder", "target", "start", "decoder", "output"}`, and more.

    `bridge` is there where the encoder has two directions, `combine` and `attention` where there
    is attention. Affine maps are drawn as in `layers.init_mlp`, embeddings from N(0, 1).

    Args:
      key: consumed.
      config: sizes of all parts.
    """
    keys = jax.random.split(key, 9)
    E, H, D = config.embed_size, config.hidden_size, recurrence.output_size(encoder_config(config))
    step_size = E + D if config.feed_context else E
    params = {
        "source": _init_embedding(keys[0], config.source, config.source_size, E),
        "encoder": recurrence.init(keys[1], encoder_config(config), E),
        "target": _init_embedding(keys[2], config.target, config.target_size, E),
        "start": jax.random.normal(keys[3], (E,)),
        "decoder": recurrence.init(keys[4], decoder_config(config), step_size),
        "output": _init_affine(keys[5], H, config.target_size),
    }
    if config.bidirectional:
        params["bridge"] = _init_bridge(keys[6], config)
    if config.score != "none":
        params["attention"] = attention.init(keys[7], attention_config(config), H, D)
        params["combine"] = _init_affine(keys[8], H + D, H)
    return params


def encode(
    params: Params,
    config: Seq2SeqConfig,
    source: Array,
    *,
    mask: Array | None = None,
    key: Key | None = None,
) -> Memory:
    """Returns what is left of a source once it is read.

    The decoder's first carry is the encoder's last; of two directions, layer by layer and part by
    part (hidden, cell), tanh(W [forward; backward] + b).

    Args:
      params: from `init`.
      config: the one that `init` was given.
      source: ids `[B, S]`, or vectors `[B, S, D]`.
      mask: `[B, S]`, True where the position is real; None means everywhere.
      key: consumed, for dropout; None means no dropout.
    """
    keys = _split(key, 2)
    inputs = _embed(params["source"], source, config.source_size, config.dtype)
    carry, states = recurrence.apply(
        params["encoder"],
        encoder_config(config),
        dropout(keys[0], inputs, config.dropout),
        mask=mask,
        key=keys[1],
    )
    if config.bidirectional:
        carry = _bridge(params["bridge"], carry, config.dtype)
    if config.score == "none":
        return Memory(carry, None)
    looked_at = attention.prepare(params["attention"], attention_config(config), states, mask=mask)
    return Memory(carry, looked_at)


def start(params: Params, config: Seq2SeqConfig, memory: Memory) -> tuple[DecoderState, jax.Array]:
    """Returns the state before the first step, and what the first step eats, `[B, E]`.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      memory: from `encode`.
    """
    batch_size, context = jax.tree.leaves(memory.carry)[0].shape[0], None
    if config.feed_context:
        context = jnp.zeros_like(_looked_at(memory).values[:, 0])
    first = jnp.broadcast_to(params["start"], (batch_size, config.embed_size))
    return DecoderState(memory.carry, context), first


def embed(params: Params, config: Seq2SeqConfig, outputs: Array) -> jax.Array:
    """Returns what the next step eats, once it is known what came out of this one.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      outputs: ids `[...]`, or vectors `[..., A]`.

    Returns:
      `[..., E]`.
    """
    return _embed(params["target"], outputs, config.target_size, config.dtype)


def step(
    params: Params,
    config: Seq2SeqConfig,
    memory: Memory,
    state: DecoderState,
    inputs: Array,
    *,
    key: Key | None = None,
) -> tuple[DecoderState, Decoded]:
    """Returns the next state, and what the decoder gives at one step.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      memory: from `encode`.
      state: from `start`, or the step before.
      inputs: `[B, E]` from `start`, or from `embed` of what came out of the step before.
      key: consumed, for dropout of what comes in and before the output, not between layers; None
        means no dropout.
    """
    keys = _split(key, 2)
    inputs = dropout(keys[0], jnp.asarray(inputs), config.dropout)
    if state.context is not None:
        inputs = jnp.concatenate([inputs, state.context], axis=-1)
    carry, hidden = recurrence.step(params["decoder"], decoder_config(config), state.carry, inputs)
    decoded, context = _look(params, config, memory, hidden, keys[1])
    return DecoderState(carry, context if config.feed_context else None), decoded


def teacher_forcing(
    params: Params,
    config: Seq2SeqConfig,
    memory: Memory,
    targets: Array,
    *,
    key: Key | None = None,
) -> Decoded:
    """Returns what the decoder gives at every step, having been told the target up to there.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      memory: from `encode`.
      targets: ids `[B, T]`, or vectors `[B, T, A]`; the last one is told to nobody.
      key: consumed, for dropout; None means no dropout.

    Returns:
      Outputs `[B, T, V]` or `[B, T, A]`, and weights `[B, T, S]`. What follows a target's end
      means nothing: mask it in the loss.
    """
    state, first = start(params, config, memory)
    told = embed(params, config, targets[:, :-1])
    inputs = jnp.concatenate([first[:, None], told], axis=1)
    if config.feed_context:
        return _one_by_one(params, config, memory, state, inputs, key)
    keys = _split(key, 3)
    _, hidden = recurrence.apply(
        params["decoder"],
        decoder_config(config),
        dropout(keys[0], inputs, config.dropout),
        carry=state.carry,
        key=keys[1],
    )
    return _look(params, config, memory, hidden, keys[2])[0]


def target_mask(targets: Array) -> jax.Array:
    """Returns which steps of a target count, `[B, T]`: all up to its end, the end among them.

    Args:
      targets: ids `[B, T]`.
    """
    is_id = jnp.asarray(targets) != END
    return jnp.concatenate([jnp.ones_like(is_id[:, :1]), is_id[:, :-1]], axis=1)


def _one_by_one(
    params: Params, config: Seq2SeqConfig, memory: Memory, state: DecoderState, inputs, key
) -> Decoded:
    def body(state: DecoderState, given: Any) -> tuple[DecoderState, Decoded]:
        inputs, key = given
        return step(params, config, memory, state, inputs, key=key)

    keys = None if key is None else jax.random.split(key, inputs.shape[1])
    _, decoded = jax.lax.scan(body, state, (jnp.swapaxes(inputs, 0, 1), keys))
    return jax.tree.map(lambda steps: jnp.swapaxes(steps, 0, 1), decoded)


def _look(
    params: Params, config: Seq2SeqConfig, memory: Memory, hidden: jax.Array, key: Key | None
) -> tuple[Decoded, jax.Array | None]:
    """Returns what is given at `hidden [B, H]` or `[B, T, H]`, and the context."""
    context = weights = None
    if config.score != "none":
        looked_at = _looked_at(memory)
        context, weights = attention.apply(
            params["attention"], attention_config(config), hidden, looked_at
        )
        both = jnp.concatenate([hidden, context], axis=-1)
        hidden = jnp.tanh(dense(both, **params["combine"], dtype=config.dtype))
    hidden = dropout(key, hidden, config.dropout)
    outputs = dense(hidden, **params["output"], dtype=config.dtype)
    return Decoded(outputs, weights), context


def _looked_at(memory: Memory) -> Source:
    if memory.source is None:
        raise ValueError(
            "memory.source must be there with attention, got None; encode with the same config."
        )
    return memory.source


def _embed(params: Params, given: Array, size: int, dtype: str) -> jax.Array:
    if "embedding" in params:
        chex.assert_type(given, int)
        return jnp.asarray(params["embedding"])[given]
    chex.assert_axis_dimension(given, -1, size)
    return dense(given, **params, dtype=dtype)


def _bridge(params: Params, carry: Carry, dtype: str) -> Carry:
    def join(layer: str) -> Any:
        one, other = carry[layer]["forward"], carry[layer]["backward"]
        both = {
            name: jnp.concatenate([getattr(one, name), getattr(other, name)], axis=-1)
            for name in one._fields
        }
        return type(one)(
            **{
                name: jnp.tanh(dense(part, **params[layer][name], dtype=dtype))
                for name, part in both.items()
            }
        )

    return {layer: {"forward": join(layer)} for layer in carry}


def _init_bridge(key: Key, config: Seq2SeqConfig) -> Params:
    H, like = config.hidden_size, recurrence.zero_carry(decoder_config(config), jnp.zeros((1, 1)))
    parts = [(layer, name) for layer in like for name in like[layer]["forward"]._fields]
    params: Params = {layer: {} for layer in like}
    for (layer, name), part_key in zip(parts, jax.random.split(key, len(parts)), strict=True):
        params[layer][name] = _init_affine(part_key, 2 * H, H)
    return params


def _init_embedding(key: Key, kind: str, size: int, embed_size: int) -> Params:
    if kind == "tokens":
        return {"embedding": jax.random.normal(key, (size, embed_size))}
    return _init_affine(key, size, embed_size)


def _init_affine(key: Key, input_size: int, output_size: int) -> Params:
    return layers.init_dense(key, input_size, output_size)


def _split(key: Key | None, num: int) -> Any:
    return (None,) * num if key is None else jax.random.split(key, num)
