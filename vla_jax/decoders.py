"""Tokens to action chunks over a window: pooled, run through a recurrence, given to the heads.

    tokens [B, W, N, D] → pool → [B, W, D'] → recurrence → [B, W, H] → heads → ActionChunk

`kind="fc"` puts an MLP in the recurrence's place and remembers nothing: the baseline. Actions
come out at every position of the window; `streaming` gives the same ones step by step.
"""

import dataclasses
import math
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from vla_jax import heads, recurrence
from vla_jax.config import did_you_mean
from vla_jax.recurrence import Carry, RecurrenceConfig
from vla_jax.types import ActionChunk, Array, Key, Params

Kind = Literal["rnn", "lstm", "gru", "fc"]
Pooling = Literal["max", "mean", "attention", "none"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder; the defaults are RoboVLMs' but for the sizes of its inputs and outputs."""

    kind: Kind = "lstm"  # cell of the recurrence, or "fc" for no memory
    token_dim: int = 256  # D, features of a token; the backbone's
    num_tokens: int = 1  # N, tokens per step; the backbone's
    window_size: int = 16  # W, steps it is trained on, and remembers in streaming mode "refresh"
    action_horizon: int = 10  # K, actions of a chunk
    action_dim: int = 7  # A, the last of which is the gripper
    hidden_size: int = 1024  # H, units of a recurrent layer, features that the heads get
    num_layers: int = 4  # L, recurrent layers
    pooling: Pooling = "max"  # how N tokens become `num_latents`; "none" keeps and joins them all
    num_latents: int = 1  # vectors that are left of a step's tokens, joined to one
    head_sizes: tuple[int, ...] = (1024, 512, 256)  # hidden layers of the arm's and gripper's MLP
    dropout: float = 0.0  # probability of dropping an output between two recurrent layers
    remat_chunk: int = 0  # steps whose gates are computed again for the gradient; 0 = keep all
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the factors of matrix products

    def __post_init__(self):
        for name, known in (("kind", get_args(Kind)), ("pooling", get_args(Pooling))):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"unknown {name} '{value}'; {did_you_mean(value, known)}")
        sizes = ("token_dim", "num_tokens", "window_size", "action_horizon", "num_latents")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.action_dim < 2:
            raise ValueError(
                f"action_dim must be at least 2 (arm, gripper), got {self.action_dim}."
            )
        if self.pooling in ("max", "mean") and self.num_latents > self.num_tokens:
            raise ValueError(
                f"num_latents must be at most num_tokens = {self.num_tokens} with "
                f"pooling='{self.pooling}', got {self.num_latents}; choose pooling='attention'."
            )
        recurrence_config(self)  # has checks of its own


def recurrence_config(config: DecoderConfig) -> RecurrenceConfig:
    """Returns the config of the recurrence inside (of `kind="fc"`: of an LSTM in its place)."""
    return RecurrenceConfig(
        cell="lstm" if config.kind == "fc" else config.kind,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        dropout=config.dropout,
        remat_chunk=config.remat_chunk,
        dtype=config.dtype,
    )


def pooled_size(config: DecoderConfig) -> int:
    """Returns D', the features that `pool` leaves of a step."""
    num_vectors = config.num_tokens if config.pooling == "none" else config.num_latents
    return num_vectors * config.token_dim


def init(key: Key, config: DecoderConfig) -> Params:
    """Returns `{"recurrence" (or "mlp"), "heads", "pooling" (where it has params)}`.

    Args:
      key: consumed.
      config: sizes and kind.
    """
    pooling_key, memory_key, heads_key = jax.random.split(key, 3)
    size, hidden = pooled_size(config), config.hidden_size
    params: Params = {
        "heads": heads.init(
            heads_key, hidden, config.action_horizon, config.action_dim, config.head_sizes
        )
    }
    if config.kind == "fc":
        params["mlp"] = heads.init_mlp(memory_key, (size, max(size // 2, 1), hidden))
    else:
        params["recurrence"] = recurrence.init(memory_key, recurrence_config(config), size)
    if config.pooling == "attention":
        shape = (config.num_latents, config.token_dim)
        params["pooling"] = {"queries": jax.random.normal(pooling_key, shape)}
    return params


def apply(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    *,
    timestep_mask: Array | None = None,
    token_mask: Array | None = None,
    reset: Array | None = None,
    carry: Carry | None = None,
    key: Key | None = None,
) -> ActionChunk:
    """Returns the action chunk that is predicted at every position.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      tokens: `[B, W, N, D]`; W may be any number of steps here.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      token_mask: `[B, W, N]`, True where the token is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.
      carry: of the recurrence before the first step; None means zeros.
      key: consumed, for dropout; None means no dropout.

    Returns:
      Arm `[B, W, K, A-1]` in (-1, 1), gripper logit `[B, W, K]`, float32. At masked steps they
      are those of zero features.

    Raises:
      ValueError: `tokens` are not `[B, W, N, D]` with the config's N and D.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), `LSTMDecoder` and `FCDecoder`.
    """
    _, hidden = features(
        params,
        config,
        tokens,
        timestep_mask=timestep_mask,
        token_mask=token_mask,
        reset=reset,
        carry=carry,
        key=key,
    )
    return predict(params, config, hidden)


def predict(params: Params, config: DecoderConfig, features: Array) -> ActionChunk:
    """Returns what the heads make of `features [..., H]`, as `apply` does at every position."""
    return heads.apply(params["heads"], features, config.action_horizon, dtype=config.dtype)


def features(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    *,
    timestep_mask: Array | None = None,
    token_mask: Array | None = None,
    reset: Array | None = None,
    carry: Carry | None = None,
    key: Key | None = None,
) -> tuple[Carry, jax.Array]:
    """Returns what the heads get, and the carry after the last step, to go on from.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      tokens: `[B, W, N, D]`; W may be any number of steps here.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      token_mask: `[B, W, N]`, True where the token is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.
      carry: of the recurrence before the first step; None means zeros.
      key: consumed, for dropout; None means no dropout.

    Returns:
      The carry (of `kind="fc"`: an empty dict), and features `[B, W, H]`, float32, zeros at
      masked steps.

    Raises:
      ValueError: `tokens` are not `[B, W, N, D]` with the config's N and D.
    """
    check_tokens(config, tokens, "[B, W, N, D]")
    if timestep_mask is not None:
        chex.assert_shape(timestep_mask, tokens.shape[:2])
    pooled = pool(params, config, tokens, token_mask=token_mask)
    if config.kind == "fc":
        return {}, _keep(heads.apply_mlp(params["mlp"], pooled, dtype=config.dtype), timestep_mask)
    return recurrence.apply(
        params["recurrence"],
        recurrence_config(config),
        pooled,
        mask=timestep_mask,
        reset=reset,
        carry=carry,
        key=key,
    )


def pool(
    params: Params, config: DecoderConfig, tokens: Array, *, token_mask: Array | None = None
) -> jax.Array:
    """Returns one vector per step.

    "max" and "mean" share N tokens out to `num_latents` bins, ⌊iN/n⌋ … ⌈(i+1)N/n⌉, as PyTorch's
    adaptive pooling does; "attention" takes `num_latents` learned queries, softmax(q·k/√D);
    "none" joins all tokens. What has no real token gives zeros.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      tokens: `[..., N, D]`.
      token_mask: `[..., N]`, True where the token is real; None means everywhere.

    Returns:
      `[..., D']` float32, D' from `pooled_size`.
    """
    mask = jnp.ones(tokens.shape[:-1], bool) if token_mask is None else jnp.asarray(token_mask)
    chex.assert_shape(mask, tokens.shape[:-1])
    tokens = _keep(jnp.asarray(tokens, jnp.float32), mask)
    if config.pooling == "none":
        latents = tokens
    elif config.pooling == "attention":
        latents = _attend(params["pooling"]["queries"], tokens, mask)
    else:
        reduce = _max if config.pooling == "max" else _mean
        bins = _bins(config.num_tokens, config.num_latents)
        latents = jnp.stack([reduce(tokens[..., b, :], mask[..., b]) for b in bins], axis=-2)
    return latents.reshape(*latents.shape[:-2], -1)


def check_tokens(config: DecoderConfig, tokens: Array, axes: str) -> None:
    """Raises a ValueError unless `tokens` have these axes, the last two as in the config.

    Args:
      config: of the decoder.
      tokens: what a user gave.
      axes: their axes in words, such as "[B, W, N, D]".
    """
    expected = (config.num_tokens, config.token_dim)
    if tokens.ndim != axes.count(",") + 1 or tokens.shape[-2:] != expected:
        raise ValueError(
            f"tokens must be {axes} with N = {expected[0]} and D = {expected[1]}, got "
            f"{tokens.shape}; check num_tokens and token_dim of the decoder config."
        )


def _bins(num_tokens: int, num_latents: int) -> list[slice]:
    edges = [(i * num_tokens, (i + 1) * num_tokens) for i in range(num_latents)]
    return [slice(start // num_latents, -(-stop // num_latents)) for start, stop in edges]


def _max(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    highest = jnp.max(jnp.where(mask[..., None], tokens, -jnp.inf), axis=-2)
    return _keep(highest, jnp.any(mask, axis=-1))


def _mean(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    count = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    return jnp.sum(tokens, axis=-2) / count[..., None]


def _attend(queries: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    scores = jnp.einsum("...nd,qd->...qn", tokens, queries) / math.sqrt(tokens.shape[-1])
    kept = mask[..., None, :]
    # The lowest number, not −∞: a softmax over −∞ alone would be NaN.
    weights = jax.nn.softmax(jnp.where(kept, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.einsum("...qn,...nd->...qd", jnp.where(kept, weights, 0.0), tokens)


def _keep(values: jax.Array, mask: Array | None) -> jax.Array:
    return values if mask is None else jnp.where(mask[..., None], values, 0.0)
