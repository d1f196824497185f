"""From being told to telling oneself: what a decoder of `seq2seq` eats while it learns.

In teacher forcing each step eats the true output of the step before, in acting its own. Between
the two a coin is thrown for each step and row: with probability `rate` it is told the truth. The
schedules let the rate fall during a training.

Source: Bengio et al. 2015, "Scheduled Sampling for Sequence Prediction with Recurrent Neural
Networks" (arXiv:1506.03099).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from vla_jax.config import did_you_mean
from vla_jax.nn import seq2seq
from vla_jax.nn.seq2seq import Decoded, Memory, Seq2SeqConfig
from vla_jax.types import Array, Key, Params

Choose = Callable[[Array, Key | None], jax.Array]  # (outputs [B, V or A], key) -> what is said


Schedule = Literal["always", "linear", "exponential", "inverse_sigmoid"]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How often a decoder is told the truth, as its training goes on."""

    schedule: Schedule = "always"  # how the probability falls; "always" is teacher forcing
    slope: float = 1e-3  # of "linear": fall per update
    least: float = 0.0  # of "linear": probability that stays
    base: float = 0.999  # of "exponential": share of the probability that an update leaves
    k: float = 100.0  # of "inverse_sigmoid", in updates; half of it is gone after k ln k

    def __post_init__(self):
        known = get_args(Schedule)
        if self.schedule not in known:
            raise ValueError(
                f"unknown schedule '{self.schedule}'; {did_you_mean(self.schedule, known)}"
            )
        for name in ("slope", "least", "base"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}.")


def rate(config: SamplingConfig, num_updates: Array | int) -> jax.Array | None:
    """Returns the probability of being told the truth, None for always.

    Args:
      config: the schedule and its numbers.
      num_updates: `[]`, updates done.
    """
    if config.schedule == "linear":
        return linear(num_updates, slope=config.slope, least=config.least)
    if config.schedule == "exponential":
        return exponential(num_updates, base=config.base)
    if config.schedule == "inverse_sigmoid":
        return inverse_sigmoid(num_updates, k=config.k)
    return None


def linear(num_updates: Array | int, *, slope: float, least: float = 0.0) -> jax.Array:
    """Returns the probability of being told the truth, falling along a line.

        rate = max(least, 1 − slope · i)

    Args:
      num_updates: i `[]`, updates done.
      slope: fall per update.
      least: rate that stays.
    """
    return jnp.maximum(least, 1.0 - slope * jnp.asarray(num_updates, jnp.float32))


def exponential(num_updates: Array | int, *, base: float) -> jax.Array:
    """Returns the probability of being told the truth, a constant share of it lost per update.

        rate = baseⁱ

    Args:
      num_updates: i `[]`, updates done.
      base: below 1.
    """
    return jnp.power(base, jnp.asarray(num_updates, jnp.float32))


def inverse_sigmoid(num_updates: Array | int, *, k: float) -> jax.Array:
    """Returns the probability of being told the truth, high for long and then falling.

        rate = k / (k + exp(i / k))

    It starts at k / (k + 1), and is a half at i = k ln k.

    Args:
      num_updates: i `[]`, updates done.
      k: at least 1, in updates.
    """
    return jax.nn.sigmoid(jnp.log(k) - jnp.asarray(num_updates, jnp.float32) / k)


def argmax(outputs: Array, key: Key | None = None) -> jax.Array:
    """Returns the ids `[B]` of the highest logits `[B, V]`."""
    del key
    return jnp.argmax(outputs, axis=-1).astype(jnp.int32)


def sample(outputs: Array, key: Key | None) -> jax.Array:
    """Returns ids `[B]` drawn from softmax of the logits `[B, V]`; the key is consumed."""
    if key is None:
        raise ValueError("key must be given where outputs are drawn, got None.")
    return jax.random.categorical(key, outputs).astype(jnp.int32)


def identity(outputs: Array, key: Key | None = None) -> jax.Array:
    """Returns the vectors `[B, A]` themselves; a gradient goes through them."""
    del key
    return jnp.asarray(outputs)


def free_running(
    params: Params,
    config: Seq2SeqConfig,
    memory: Memory,
    num_steps: int,
    *,
    choose: Choose | None = None,
    key: Key | None = None,
) -> tuple[Decoded, jax.Array]:
    """Returns what the decoder gives at every step when each eats its own output.

    It does not stop at the end of a row; `search.greedy` does.

    Args:
      params: from `seq2seq.init`.
      config: the one that `init` was given.
      memory: from `seq2seq.encode`.
      num_steps: T.
      choose: from outputs to what is said and eaten; None means `argmax` of tokens, and
        vectors as they are.
      key: consumed, by `choose` and for dropout; None means no dropout.

    Returns:
      What is decoded `[B, T, ...]`, and what was said: ids `[B, T]`, or vectors `[B, T, A]`.
    """
    keys = None if key is None else jax.random.split(key, num_steps)
    return _run(params, config, memory, choose, (None, None, keys), num_steps)


def scheduled_sampling(
    params: Params,
    config: Seq2SeqConfig,
    memory: Memory,
    targets: Array,
    rate: Array | float,
    key: Key,
    *,
    choose: Choose | None = None,
) -> Decoded:
    """Returns what the decoder gives at every step, told the truth now and then.

    Rate 1 is `seq2seq.teacher_forcing` (with dropout only of what comes in and goes out), rate 0
    `free_running`.

    Args:
      params: from `seq2seq.init`.
      config: the one that `init` was given.
      memory: from `seq2seq.encode`.
      targets: ids `[B, T]`, or vectors `[B, T, A]`.
      rate: `[]`, probability that a step is told the true output of the step before.
      key: consumed.
      choose: as for `free_running`.
    """
    coin_key, key = jax.random.split(key)
    told = jnp.swapaxes(seq2seq.embed(params, config, targets[:, :-1]), 0, 1)
    told = jnp.pad(told, [(1, 0), (0, 0), (0, 0)])  # the first step is told nothing
    coins = jax.random.bernoulli(coin_key, rate, told.shape[:2]).at[0].set(False)
    keys = jax.random.split(key, len(told))
    return _run(params, config, memory, choose, (told, coins, keys), len(told))[0]


def _run(
    params: Params, config: Seq2SeqConfig, memory: Memory, choose: Choose | None, steps, num_steps
) -> tuple[Decoded, jax.Array]:
    """Runs over `steps`: what is told `[T, B, E]`, the coins `[T, B]`, keys `[T]`, or None each."""
    if choose is None:
        choose = argmax if config.target == "tokens" else identity

    def body(before: Any, given: Any) -> tuple[Any, Any]:
        state, inputs = before
        told, coins, key = given
        if told is not None:
            inputs = jnp.where(coins[:, None], told, inputs)
        drop_key, choose_key = (None, None) if key is None else jax.random.split(key)
        state, decoded = seq2seq.step(params, config, memory, state, inputs, key=drop_key)
        said = choose(decoded.outputs, choose_key)
        return (state, seq2seq.embed(params, config, said)), (decoded, said)

    _, run = jax.lax.scan(body, seq2seq.start(params, config, memory), steps, length=num_steps)
    return jax.tree.map(lambda part: jnp.swapaxes(part, 0, 1), run)
