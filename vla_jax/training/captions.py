"""Caption head: decodes the instruction from the trunk's features, for training only.

    features [..., H] → summary [..., E] → GRU → word, word, …, end

The instruction is visible at an episode's first steps only. The head trains the recurrent trunk
to remember it: the instruction must be decodable at every step.

Word ids are those of `backbones.word_hashing`; id 0 after the last word marks the end.
"""

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from vla_jax.nn import layers, recurrence
from vla_jax.nn.cells import GRUCarry
from vla_jax.nn.layers import dense, embedding
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.training.losses import token_loss
from vla_jax.trees import under
from vla_jax.types import Array, Batch, Key, Metrics, Params, ShardingRules

SHARDING: ShardingRules = (
    *under("recurrence", recurrence.SHARDING),
    ("embedding", PartitionSpec(None, "fsdp")),
    ("*/kernel", PartitionSpec("fsdp")),
)


def init(key: Key, feature_size: int, size: int, vocab_size: int) -> Params:
    """Returns `{"embedding" [V, E], "summary" [H, E], "recurrence" (a GRU), "output" [E, V]}`.

    Args:
      key: consumed.
      feature_size: H, the trunk's features per step.
      size: E, word embedding size and units of the GRU.
      vocab_size: V, word ids are in [0, V).
    """
    keys = jax.random.split(key, 4)
    return {
        "embedding": jax.random.normal(keys[0], (vocab_size, size)),
        "summary": layers.init_mlp(keys[1], (feature_size, size))["layers_0"],
        "recurrence": recurrence.init(keys[2], _gru(size), size),
        "output": layers.init_mlp(keys[3], (size, vocab_size))["layers_0"],
    }


def apply(params: Params, features: Array, words: Array) -> jax.Array:
    """Returns the logits of each word given the ground-truth words before it (teacher forcing).

        c₀ = tanh(features · W + b),    cₛ = GRU(cₛ₋₁, wordₛ₋₁ + c₀),    logitsₛ = cₛ · U + u

    with id 0 before the first word. The features are input at every word, since a GRU soon
    forgets its initial carry. The logits are B·W·S·V numbers, the largest array of a training if
    V is in the thousands.

    Args:
      params: from `init`.
      features: `[B, W, H]`, from `policy.outputs` or `decoders.run_trunk`.
      words: `[B, W, S]` ids from `visible_instruction`.

    Returns:
      `[B, W, S, V]` float32.

    Source: Cho et al. 2014 (arXiv:1406.1078), section 2.2, whose decoder also takes its summary at
    each word.
    """
    chex.assert_rank([features, words], 3)
    chex.assert_equal_shape_prefix([features, words], 2)
    summary = _summary(params, rearrange(features, "B W H -> (B W) H"))
    before = rearrange(_word_before(words), "B W S -> (B W) S")
    inputs = embedding(params["embedding"], before) + summary[:, None]
    gru, carry = _gru(summary.shape[-1]), _first_carry(summary)
    _, hidden = recurrence.apply(params["recurrence"], gru, inputs, carry=carry)
    return dense(hidden, **params["output"]).reshape(*words.shape, -1)


def decode(params: Params, features: Array, *, max_words: int) -> jax.Array:
    """Returns the instruction decoded greedily from the features.

    Args:
      params: from `init`.
      features: `[..., H]`.
      max_words: S, words to decode at most.

    Returns:
      Word ids `[..., S]` int32, 0 after the last word.
    """
    summary = _summary(params, features)
    gru = _gru(summary.shape[-1])
    # Restored params are NumPy arrays, which a tracer cannot index.
    table = jnp.asarray(params["embedding"])

    def decode_word(state, _):
        carry, word, ended = state
        inputs = table[word] + summary
        carry, hidden = recurrence.step(params["recurrence"], gru, carry, inputs)
        argmax = jnp.argmax(dense(hidden, **params["output"]), axis=-1).astype(jnp.int32)
        word = jnp.where(ended, 0, argmax)
        return (carry, word, word == 0), word

    start = jnp.zeros(features.shape[:-1], jnp.int32)
    state = (_first_carry(summary), start, jnp.zeros(start.shape, bool))
    _, words = jax.lax.scan(decode_word, state, length=max_words)
    return jnp.moveaxis(words, 0, -1)


def loss(logits: Array, words: Array, *, axis_name: str | None = None) -> tuple[jax.Array, Metrics]:
    """Returns the cross-entropy of the words and of the end marker after them.

    A sentence that fills all S positions has no end marker; steps without words do not count.

    Args:
      logits: `[B, W, S, V]` from `apply`.
      words: `[B, W, S]` ids from `visible_instruction`.
      axis_name: mapped axis to sum over; None outside `pmap` and `shard_map`.

    Returns:
      Loss `[]` float32, and `acc_caption` in [0, 1], the fraction of words that are the argmax.
    """
    counts = (words > 0) | (_word_before(words) > 0)
    loss, metrics = token_loss(logits, words, counts, axis_name=axis_name)
    return loss, {"acc_caption": metrics["acc_tokens"]}


def visible_instruction(batch: Batch) -> jax.Array:
    """Returns the latest instruction that was visible at a real step since the last reset.

    Args:
      batch: with `observation.instruction [B, W, S]`, all 0 where it is not visible.

    Returns:
      Word ids `[B, W, S]`, all 0 where none was visible yet and at masked steps.

    Raises:
      ValueError: the batch has no instruction.
    """
    if batch.observation.instruction is None:
        raise ValueError(
            "observation.instruction must be in the batch for the caption head, got None; add the "
            "words, or set auxiliary.caption to False."
        )
    instruction, real = map(jnp.asarray, (batch.observation.instruction, batch.timestep_mask))
    steps = jnp.arange(real.shape[1])[None]
    latest = jax.lax.cummax(jnp.where(real & jnp.any(instruction > 0, axis=-1), steps, -1), axis=1)
    start = jnp.zeros_like(latest)
    if batch.reset is not None:
        start = jax.lax.cummax(jnp.where(batch.reset, steps, 0), axis=1)
    words = jnp.take_along_axis(instruction, jnp.maximum(latest, 0)[..., None], axis=1)
    return jnp.where((real & (latest >= start))[..., None], words, 0)


def _gru(size: int) -> RecurrenceConfig:
    return RecurrenceConfig(cell="gru", hidden_size=size)


def _summary(params: Params, features: Array) -> jax.Array:
    return jnp.tanh(dense(features, **params["summary"]))


def _first_carry(summary: jax.Array) -> recurrence.Carry:
    return recurrence.from_layer(GRUCarry(summary))


def _word_before(words: Array) -> jax.Array:
    """Returns the ids shifted right by one position, with 0 first."""
    return jnp.concatenate([jnp.zeros_like(words[..., :1]), words[..., :-1]], axis=-1)
