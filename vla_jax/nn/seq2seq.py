"""Recurrent encoder-decoder: a source sequence is encoded, a target is decoded step by step.

    memory = encode(source)          hₜ = cell(hₜ₋₁, [previous outputₜ₋₁; contextₜ₋₁])
    contextₜ = attention(hₜ, memory)          outputₜ = U tanh(W [hₜ; contextₜ])

The encoder's last carry initialises the decoder. Without attention it is the only information about
the source (the bottleneck), and outputₜ = U hₜ. With `feed_context` the context of the previous
step is part of the inputs, as in Bahdanau's decoder. Without it, as in Luong's, the carries do not
depend on the contexts: in training the recurrence runs once over the whole target, and the
attention once over all of its steps.

Source and target are each "tokens" (ids) or "vectors" (such as a window of features, or a chunk of
actions). The first input of the decoder is a learned vector, `start`. In a target of tokens, id 0
is the end of the sequence, and 0 after the end is padding.

Source: Sutskever et al. 2014 (arXiv:1409.3215); Bahdanau et al. 2015 (arXiv:1409.0473); Luong et
al. 2015 (arXiv:1508.04025).
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vla_jax.config import checked, did_you_mean
from vla_jax.nn import attention, bptt, layers, recurrence
from vla_jax.nn.attention import AttentionConfig, Source
from vla_jax.nn.cells import CELLS, CellName
from vla_jax.nn.layers import dense, dropout, embedding
from vla_jax.nn.recurrence import Carry, RecurrenceConfig
from vla_jax.nn.recurrence_config import Implementation
from vla_jax.nn.sharded_params import gathered
from vla_jax.trees import under
from vla_jax.types import Array, Key, Params, ShardingRules

Kind = Literal["tokens", "vectors"]
AnyScore = Literal["additive", "dot", "general", "scaled_dot", "none"]
END = 0  # id of the end of a target, and of the padding after it
SHARDING: ShardingRules = (
    *under("encoder", recurrence.SHARDING),
    *under("decoder", recurrence.SHARDING),
    ("*/embedding", PartitionSpec(None, "fsdp")),
    ("attention/*_kernel", PartitionSpec("fsdp")),
    ("*/kernel", PartitionSpec("fsdp")),
)


@dataclasses.dataclass(frozen=True)
@checked()
class Seq2SeqConfig:
    """A recurrent encoder-decoder with optional attention."""

    source: Kind = "tokens"  # type of the source: ids or vectors
    source_size: int = 32  # number of ids, including 0 for padding; or features of a vector
    target: Kind = "tokens"  # type of the target: ids or vectors
    target_size: int = 32  # number of ids, including 0 for the end; or features of a vector
    embed_size: int = 128  # features of an embedded source position or target step
    cell: CellName = "lstm"  # cell of encoder and decoder, such as rnn, lstm or gru
    num_layers: int = 1  # L, layers of the encoder and of the decoder
    hidden_size: int = 128  # H, units of each layer and direction
    bidirectional: bool = True  # encode in both directions
    score: AnyScore = "additive"  # score function of the attention; "none" = no attention
    score_size: int = 128  # features of projected queries and keys, additive and scaled_dot only
    feed_context: bool = False  # append the context of a step to the inputs of the next step
    dropout: float = 0.0  # dropout probability at inputs, between layers and before the output
    implementation: Implementation = "auto"  # time loop of the recurrences; auto = recommended
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the factors of matrix products

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
                "bidirectional must be False with score 'dot', got True; choose score 'general'."
            )
        encoder_config(self)  # checks the other fields
        if self.bidirectional and not CELLS[self.cell].has_vector_carry:
            raise ValueError(
                f"bidirectional must be False with cell '{self.cell}', whose carries of the two "
                "directions cannot be joined, got True; choose False, or another cell."
            )


class Memory(NamedTuple):
    """An encoded source."""

    carry: Carry  # of the decoder before its first step: leaves [B, H]
    source: Source | None  # [B, S, ...], for attention; None without attention


class DecoderState(NamedTuple):
    """State of the decoder between two steps."""

    carry: Carry  # leaves [B, H]
    context: Array | None  # [B, D], of the previous step; None without `feed_context`


class Decoded(NamedTuple):
    """Outputs of the decoder at one step `[B, ...]`, or at all steps `[B, T, ...]`."""

    outputs: Array  # [..., V] logits, or [..., A]; float32
    weights: Array | None  # [..., S] attention weights; None without attention


def encoder_config(config: Seq2SeqConfig) -> RecurrenceConfig:
    """Returns the config of the encoder's recurrence."""
    return RecurrenceConfig(
        cell=config.cell,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        dropout=config.dropout,
        bidirectional=config.bidirectional,
        implementation=config.implementation,
        dtype=config.dtype,
    )


def decoder_config(config: Seq2SeqConfig) -> RecurrenceConfig:
    """Returns the config of the decoder's recurrence: that of the encoder in one direction."""
    return dataclasses.replace(encoder_config(config), bidirectional=False)


def attention_config(config: Seq2SeqConfig) -> AttentionConfig:
    """Returns the config of the attention; `config.score` is not "none"."""
    score: Any = config.score
    return AttentionConfig(score=score, size=config.score_size, dtype=config.dtype)


def init(key: Key, config: Seq2SeqConfig) -> Params:
    """Returns params `{"source", "encoder", "target", "start", "decoder", "output", …}`.

    Also `bridge` if the encoder has two directions, and `combine` and `attention` with attention.
    Dense layers are initialised as in `layers.init_dense`, embeddings from N(0, 1).

    Args:
      key: consumed.
      config: sizes of all parts.
    """
    keys = jax.random.split(key, 9)
    embed_size, H = config.embed_size, config.hidden_size
    D = recurrence.output_size(encoder_config(config))
    step_size = embed_size + D if config.feed_context else embed_size
    params = {
        "source": _init_embedding(keys[0], config.source, config.source_size, embed_size),
        "encoder": recurrence.init(keys[1], encoder_config(config), embed_size),
        "target": _init_embedding(keys[2], config.target, config.target_size, embed_size),
        "start": jax.random.normal(keys[3], (embed_size,)),
        "decoder": recurrence.init(keys[4], decoder_config(config), step_size),
        "output": layers.init_dense(keys[5], H, config.target_size),
    }
    if config.bidirectional:
        params["bridge"] = _init_bridge(keys[6], config)
    if config.score != "none":
        params["attention"] = attention.init(keys[7], attention_config(config), H, D)
        params["combine"] = layers.init_dense(keys[8], H + D, H)
    return params


def encode(
    params: Params,
    config: Seq2SeqConfig,
    source: Array,
    *,
    mask: Array | None = None,
    key: Key | None = None,
) -> Memory:
    """Encodes a source; an id outside the table has an embedding of NaN.

    The decoder's first carry is the encoder's last. With two directions it is
    tanh(W [forward; backward] + b), for each layer and each field of the carry (hidden, cell).

    Args:
      params: from `init`.
      config: the config given to `init`.
      source: ids `[B, S]`, or vectors `[B, S, D]`; masked positions are arbitrary, NaN too.
      mask: `[B, S]`, True where the position is real; None means everywhere.
      key: consumed, for dropout; None means no dropout.
    """
    keys = _split(key, 2)
    source = bptt.keep_real(source, mask)
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
    prepared = attention.prepare(params["attention"], attention_config(config), states, mask=mask)
    return Memory(carry, prepared)


def start(params: Params, config: Seq2SeqConfig, memory: Memory) -> tuple[DecoderState, jax.Array]:
    """Returns the state before the first step, and the inputs `[B, embed_size]` of the first step.

    Args:
      params: from `init`.
      config: the config given to `init`.
      memory: from `encode`.
    """
    batch_size, context = jax.tree.leaves(memory.carry)[0].shape[0], None
    if config.feed_context:
        context = jnp.zeros_like(_source(memory).values[:, 0])
    first = jnp.broadcast_to(params["start"], (batch_size, config.embed_size))
    return DecoderState(memory.carry, context), first


def embed(params: Params, config: Seq2SeqConfig, outputs: Array) -> jax.Array:
    """Returns the inputs of the next step, given the (chosen or true) outputs of this one.

    An id outside the table has an embedding of NaN.

    Args:
      params: from `init`.
      config: the config given to `init`.
      outputs: ids `[...]`, or vectors `[..., A]`.

    Returns:
      `[..., embed_size]`.
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
    """Returns the next state and the outputs of one step.

    Args:
      params: from `init`.
      config: the config given to `init`.
      memory: from `encode`.
      state: from `start` or the previous step.
      inputs: `[B, embed_size]`, from `start`, or from `embed` of the previous outputs.
      key: consumed, for dropout; None means no dropout.
    """
    keys = _split(key, 3)
    inputs = dropout(keys[0], jnp.asarray(inputs), config.dropout)
    if state.context is not None:
        inputs = jnp.concatenate([inputs, state.context], axis=-1)
    carry, hidden = recurrence.step(
        params["decoder"], decoder_config(config), state.carry, inputs, key=keys[1]
    )
    decoded, context = _read_out(params, config, memory, hidden, keys[2])
    return DecoderState(carry, context if config.feed_context else None), decoded


def teacher_forcing(
    params: Params,
    config: Seq2SeqConfig,
    memory: Memory,
    targets: Array,
    *,
    key: Key | None = None,
) -> Decoded:
    """Returns the outputs of all steps, with the true targets as inputs of the next steps.

    Args:
      params: from `init`.
      config: the config given to `init`.
      memory: from `encode`.
      targets: ids `[B, T]`, or vectors `[B, T, A]`; the last target is never fed back.
      key: consumed, for dropout; None means no dropout.

    Returns:
      Outputs `[B, T, V]` or `[B, T, A]`, and weights `[B, T, S]`. Steps after the end of a
      target are meaningless: mask them in the loss.
    """
    state, first = start(params, config, memory)
    fed_back = embed(params, config, targets[:, :-1])
    inputs = jnp.concatenate([first[:, None], fed_back], axis=1)
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
    return _read_out(params, config, memory, hidden, keys[2])[0]


def target_mask(targets: Array) -> jax.Array:
    """Returns a mask `[B, T]`, True at the steps of a target up to and including its end.

    Args:
      targets: ids `[B, T]`.
    """
    is_id = jnp.asarray(targets) != END
    return jnp.concatenate([jnp.ones_like(is_id[:, :1]), is_id[:, :-1]], axis=1)


def _one_by_one(
    params: Params, config: Seq2SeqConfig, memory: Memory, state: DecoderState, inputs, key
) -> Decoded:
    def body(state: DecoderState, step_inputs: Any) -> tuple[DecoderState, Decoded]:
        inputs, key = step_inputs
        return step(params, config, memory, state, inputs, key=key)

    params = gathered(params)
    keys = None if key is None else jax.random.split(key, inputs.shape[1])
    _, decoded = jax.lax.scan(body, state, (jnp.swapaxes(inputs, 0, 1), keys))
    return jax.tree.map(lambda steps: jnp.swapaxes(steps, 0, 1), decoded)


def _read_out(
    params: Params, config: Seq2SeqConfig, memory: Memory, hidden: jax.Array, key: Key | None
) -> tuple[Decoded, jax.Array | None]:
    """Returns the outputs at `hidden [B, H]` or `[B, T, H]`, and the context."""
    context = weights = None
    if config.score != "none":
        context, weights = attention.apply(
            params["attention"], attention_config(config), hidden, _source(memory)
        )
        joined = jnp.concatenate([hidden, context], axis=-1)
        hidden = jnp.tanh(dense(joined, **params["combine"], dtype=config.dtype))
    hidden = dropout(key, hidden, config.dropout)
    outputs = dense(hidden, **params["output"], dtype=config.dtype)
    return Decoded(outputs, weights), context


def _source(memory: Memory) -> Source:
    if memory.source is None:
        raise ValueError(
            "memory.source must not be None with attention; encode with the same config."
        )
    return memory.source


def _embed(params: Params, values: Array, size: int, dtype: str) -> jax.Array:
    if "embedding" in params:
        chex.assert_type(values, int)
        return embedding(params["embedding"], values)
    chex.assert_axis_dimension(values, -1, size)
    return dense(values, **params, dtype=dtype)


def _bridge(params: Params, carry: Carry, dtype: str) -> Carry:
    def join(name: str) -> Any:
        forward, backward = carry[name]["forward"], carry[name]["backward"]
        joined = jax.tree.map(
            lambda *parts: jnp.concatenate(parts, axis=-1), forward, backward
        )._asdict()
        fields = {
            field: jnp.tanh(dense(part, **params[name][field], dtype=dtype))
            for field, part in joined.items()
        }
        return type(forward)(**fields)

    return {name: {"forward": join(name)} for name in carry}


def _init_bridge(key: Key, config: Seq2SeqConfig) -> Params:
    H, like = config.hidden_size, recurrence.zero_carry(decoder_config(config), jnp.zeros((1, 1)))
    paths = [(name, field) for name in like for field in like[name]["forward"]._fields]
    params: Params = {name: {} for name in like}
    for (name, field), part_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        params[name][field] = layers.init_dense(part_key, 2 * H, H)
    return params


def _init_embedding(key: Key, kind: str, size: int, embed_size: int) -> Params:
    if kind == "tokens":
        return {"embedding": jax.random.normal(key, (size, embed_size))}
    return layers.init_dense(key, size, embed_size)


def _split(key: Key | None, num: int) -> Any:
    return (None,) * num if key is None else jax.random.split(key, num)
