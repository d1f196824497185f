"""Scheduled sampling: mixing ground-truth and model outputs as decoder inputs during training.

In teacher forcing the inputs of a step are the true outputs of the previous step; at inference they
are the model's own outputs. Here each step of each row takes the true outputs with probability
`rate`, which the schedules decrease during training.

Source: Bengio et al. 2015, "Scheduled Sampling for Sequence Prediction with Recurrent Neural
Networks" (arXiv:1506.03099).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vla_jax.config import checked, did_you_mean, renamed
from vla_jax.nn import seq2seq
from vla_jax.nn.seq2seq import Decoded, Memory, Seq2SeqConfig
from vla_jax.nn.sharded_params import gathered
from vla_jax.types import Array, Key, Params

# (outputs [B, V or A], key) -> values to feed back
Choose = Callable[[Array, Key | None], jax.Array]
Schedule = Literal["always", "linear", "exponential", "inverse_sigmoid"]


@dataclasses.dataclass(frozen=True)
@checked()
class SamplingConfig:
    """Schedule of the probability of feeding back the true outputs (teacher forcing)."""

    schedule: Schedule = "always"  # how the probability of teacher forcing decreases; "always" = 1
    slope: float = 1e-3  # of "linear": decrease of the probability per update
    min_rate: float = 0.0  # of "linear": lower bound of the probability
    base: float = 0.999  # of "exponential": factor of the probability per update
    k: float = 100.0  # of "inverse_sigmoid", in updates: the probability is 0.5 after k ln k

    upgrade = renamed({"least": "min_rate"})

    def __post_init__(self):
        if self.schedule not in _SCHEDULES:
            raise ValueError(
                f"unknown schedule '{self.schedule}'; {did_you_mean(self.schedule, _SCHEDULES)}"
            )
        for name in ("slope", "min_rate", "base"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}.")


def rate(config: SamplingConfig, num_updates: Array | int) -> jax.Array | None:
    """Returns the probability of teacher forcing `[]`; None for schedule "always".

    Args:
      config: the schedule.
      num_updates: `[]`, number of updates so far.
    """
    return _SCHEDULES[config.schedule](config, num_updates)


def linear(num_updates: Array | int, *, slope: float, min_rate: float = 0.0) -> jax.Array:
    """Returns a probability of teacher forcing that decreases linearly.

        rate = max(min_rate, 1 − slope · i)

    Args:
      num_updates: i `[]`, number of updates so far.
      slope: decrease per update.
      min_rate: lower bound.
    """
    return jnp.maximum(min_rate, 1.0 - slope * jnp.asarray(num_updates, jnp.float32))


def exponential(num_updates: Array | int, *, base: float) -> jax.Array:
    """Returns a probability of teacher forcing that decreases by a constant factor per update.

        rate = baseⁱ

    Args:
      num_updates: i `[]`, number of updates so far.
      base: below 1.
    """
    return jnp.power(base, jnp.asarray(num_updates, jnp.float32))


def inverse_sigmoid(num_updates: Array | int, *, k: float) -> jax.Array:
    """Returns a probability of teacher forcing that stays high at first, then decreases.

        rate = k / (k + exp(i / k))

    It starts at k / (k + 1) and is 0.5 at i = k ln k.

    Args:
      num_updates: i `[]`, number of updates so far.
      k: at least 1, in updates.
    """
    return jax.nn.sigmoid(jnp.log(k) - jnp.asarray(num_updates, jnp.float32) / k)


_SCHEDULES: dict[str, Callable[[SamplingConfig, Array | int], jax.Array | None]] = {
    "always": lambda config, i: None,
    "linear": lambda config, i: linear(i, slope=config.slope, min_rate=config.min_rate),
    "exponential": lambda config, i: exponential(i, base=config.base),
    "inverse_sigmoid": lambda config, i: inverse_sigmoid(i, k=config.k),
}


def argmax(outputs: Array, key: Key | None = None) -> jax.Array:
    """Returns the ids `[B]` of the highest logits `[B, V]`."""
    del key
    return jnp.argmax(outputs, axis=-1).astype(jnp.int32)


def sample(outputs: Array, key: Key | None) -> jax.Array:
    """Returns ids `[B]` sampled from the softmax of the logits `[B, V]`; consumes the key."""
    if key is None:
        raise ValueError("key must be given to sample outputs, got None.")
    return jax.random.categorical(key, outputs).astype(jnp.int32)


def identity(outputs: Array, key: Key | None = None) -> jax.Array:
    """Returns the vectors `[B, A]` unchanged; gradients pass through them."""
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
    """Returns the outputs of all steps, each step being fed the model's own previous output.

    Does not stop at the end of a sequence; `search.greedy` does.

    Args:
      params: from `seq2seq.init`.
      config: the config given to `init`.
      memory: from `seq2seq.encode`.
      num_steps: T.
      choose: maps outputs to the values that are fed back; None means `argmax` for tokens and
        `identity` for vectors.
      key: consumed, by `choose` and for dropout; None means no dropout.

    Returns:
      The outputs `[B, T, ...]`, and the values fed back: ids `[B, T]`, or vectors `[B, T, A]`.
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
    """Returns the outputs of all steps, each step being fed the true or the model's own output.

    Rate 1 is `seq2seq.teacher_forcing`, rate 0 is `free_running`.

    Args:
      params: from `seq2seq.init`.
      config: the config given to `init`.
      memory: from `seq2seq.encode`.
      targets: ids `[B, T]`, or vectors `[B, T, A]`.
      rate: `[]` or `[B]`, probability that a step is fed the true output of the previous step.
      key: consumed.
      choose: as for `free_running`.
    """
    choice_key, key = jax.random.split(key)
    embedded = jnp.swapaxes(seq2seq.embed(params, config, targets[:, :-1]), 0, 1)
    embedded = jnp.pad(embedded, [(1, 0), (0, 0), (0, 0)])  # the first step has no previous target
    rates = jnp.broadcast_to(rate, embedded.shape[:2])
    is_forced = jax.random.bernoulli(choice_key, rates).at[0].set(False)
    keys = jax.random.split(key, len(embedded))
    return _run(params, config, memory, choose, (embedded, is_forced, keys), len(embedded))[0]


def _run(
    params: Params,
    config: Seq2SeqConfig,
    memory: Memory,
    choose: Choose | None,
    steps: Any,
    num_steps: int,
) -> tuple[Decoded, jax.Array]:
    """Runs the decoder, each step on a target or on its own previous output.

    Args:
      params: from `seq2seq.init`.
      config: the config given to `init`.
      memory: from `seq2seq.encode`.
      choose: as for `free_running`.
      steps: embedded targets `[T, B, embed_size]`, flags `[T, B]` True where they are the inputs,
        and keys `[T]`; each may be None.
      num_steps: T.
    """
    if choose is None:
        choose = argmax if config.target == "tokens" else identity
    params = gathered(params)

    def body(carry: Any, step: Any) -> tuple[Any, Any]:
        state, inputs = carry
        target, is_forced, key = step
        if target is not None:
            inputs = jnp.where(is_forced[:, None], target, inputs)
        drop_key, choose_key = (None, None) if key is None else jax.random.split(key)
        state, decoded = seq2seq.step(params, config, memory, state, inputs, key=drop_key)
        chosen = choose(decoded.outputs, choose_key)
        return (state, seq2seq.embed(params, config, chosen)), (decoded, chosen)

    _, results = jax.lax.scan(body, seq2seq.start(params, config, memory), steps, length=num_steps)
    return jax.tree.map(lambda part: jnp.swapaxes(part, 0, 1), results)
