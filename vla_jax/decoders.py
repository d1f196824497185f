"""Tokens to action chunks over a window: pooled, run through a trunk, given to the heads.

    tokens [B, W, N, D] → pool → [B, W, D'] → trunk → [B, W, H] → heads → Prediction

The trunk is a recurrence ("rnn", "lstm", "gru"), a transformer that looks back over the window
("gpt"), or an MLP that remembers nothing, the baseline ("fc"). Actions come out at every position
of the window; `streaming` gives the same ones step by step.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, cast, get_args

import chex
import jax
import jax.numpy as jnp

from vla_jax import action_tokens, heads, pooling, recurrence, transformer
from vla_jax.cells import CELLS, affine
from vla_jax.config import did_you_mean
from vla_jax.pooling import Pooling
from vla_jax.recurrence import Carry, Implementation, RecurrenceConfig
from vla_jax.transformer import TransformerConfig
from vla_jax.types import Array, Key, Params, Prediction

Kind = Literal["rnn", "lstm", "gru", "fc", "gpt"]
Head = Literal["continuous", "discrete"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder; the defaults are RoboVLMs' but for the sizes of its inputs and outputs."""

    kind: Kind = "lstm"  # cell of the recurrence, "gpt" for a transformer, "fc" for no memory
    token_dim: int = 256  # D, features of a token; the backbone's
    num_tokens: int = 1  # N, tokens per step; the backbone's; 0 = any number, where it is pooled
    window_size: int = 16  # W, steps it is trained on, and remembers in streaming mode "refresh"
    action_horizon: int = 10  # K, actions of a chunk
    action_dim: int = 7  # A, the last of which is the gripper
    hidden_size: int = 1024  # H, units of a layer, features that the heads get
    num_layers: int = 4  # L, of the recurrence or the transformer (RoboVLMs' has 8); not of "fc"
    num_heads: int = 8  # M, attention heads of kind "gpt"
    pooling: Pooling = "max"  # how N tokens become `num_latents`; "none" keeps and joins them all
    num_latents: int = 1  # vectors that are left of a step's tokens, joined to one
    head: Head = "continuous"  # numbers (arm, gripper logit), or "discrete": bins of each number
    num_bins: int = 256  # V, bins of a number from -1 to 1; of head "discrete"
    head_sizes: tuple[int, ...] = (1024, 512, 256)  # hidden layers of each MLP of the heads
    dropout: float = 0.0  # probability: between two recurrent layers, or in GPT-2's three places
    remat_chunk: int = 0  # recurrent steps computed again for the gradient; 0 = keep all
    implementation: Implementation = "auto"  # of the recurrence, see there
    dtype: Dtype = "float32"  # of the factors of matrix products

    def __post_init__(self):
        literals = {"kind": Kind, "pooling": Pooling, "head": Head, "dtype": Dtype}
        for name, choices in literals.items():
            value, known = getattr(self, name), get_args(choices)
            if value not in known:
                raise ValueError(f"unknown {name} '{value}'; {did_you_mean(value, known)}")
        least_tokens = 1 if self.pooling == "none" else 0
        sizes = ("token_dim", "window_size", "action_horizon", "num_latents")
        sizes += ("hidden_size", "num_layers")
        for name, least in (("num_tokens", least_tokens), *((name, 1) for name in sizes)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.action_dim < 2:
            raise ValueError(
                f"action_dim must be at least 2 (arm, gripper), got {self.action_dim}."
            )
        if 0 < self.num_tokens < _least_tokens(self):
            raise ValueError(
                f"num_latents must be at most num_tokens = {self.num_tokens} with "
                f"pooling='{self.pooling}', got {self.num_latents}; choose pooling='attention'."
            )
        action_tokens.check_num_bins(self.num_bins)
        TRUNKS[self.kind].check(self)


class Trunk(NamedTuple):
    """A family member: what stands between pooling and heads."""

    name: str  # of its params
    check: Callable[[DecoderConfig], object]  # raises a ValueError unless it can be made so
    init: Callable[[Key, DecoderConfig], Params]
    apply: Callable[..., tuple[Carry, jax.Array]]  # see `features`, with pooled for tokens


def recurrence_config(config: DecoderConfig) -> RecurrenceConfig:
    """Returns the config of the recurrence inside, for kinds "rnn", "lstm", "gru"."""
    return RecurrenceConfig(
        cell=cast(Literal["rnn", "lstm", "gru"], config.kind),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        dropout=config.dropout,
        remat_chunk=config.remat_chunk,
        implementation=config.implementation,
        dtype=config.dtype,
    )


def transformer_config(config: DecoderConfig) -> TransformerConfig:
    """Returns the config of the transformer inside, which has a position for each step."""
    return TransformerConfig(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        hidden_size=config.hidden_size,
        num_positions=config.window_size,
        dropout=config.dropout,
        dtype=config.dtype,
    )


def pooled_size(config: DecoderConfig) -> int:
    """Returns D', the features that `pool` leaves of a step."""
    num_vectors = config.num_tokens if config.pooling == "none" else config.num_latents
    return num_vectors * config.token_dim


def init(key: Key, config: DecoderConfig) -> Params:
    """Returns `{"recurrence" (or what the kind has), "heads", "pooling" (where it has params)}`.

    Kind "fc" has "mlp" in place of "recurrence"; "gpt" has "transformer", and "projection" where
    a pooled step has not H features already.

    Args:
      key: consumed.
      config: sizes and kind.
    """
    pooling_key, trunk_key, heads_key = jax.random.split(key, 3)
    params: Params = {
        **TRUNKS[config.kind].init(trunk_key, config),
        "heads": heads.init(
            heads_key,
            config.hidden_size,
            config.action_horizon,
            config.action_dim,
            config.head_sizes,
            num_bins=_num_bins(config),
        ),
    }
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
) -> Prediction:
    """Returns what is predicted at every position: action chunks, or bins of them.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      tokens: `[B, W, N, D]`; W may be any number of steps here, of "gpt" at most the config's.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      token_mask: `[B, W, N]`, True where the token is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.
      carry: of the recurrence before the first step; None means zeros. Of "gpt" always None.
      key: consumed, for dropout; None means no dropout.

    Returns:
      Arm `[B, W, K, A-1]` in (-1, 1), gripper logit `[B, W, K]`; of head "discrete" logits
      `[B, W, K, A, V]`; float32. At masked steps they are those of zero features.

    Raises:
      ValueError: `tokens` are not `[B, W, N, D]` with the config's N and D, or for "gpt" there is
        a carry or a longer window.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), `LSTMDecoder`, `GPTDecoder`, `FCDecoder`.
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


def predict(params: Params, config: DecoderConfig, features: Array) -> Prediction:
    """Returns what the heads make of `features [..., H]`, as `apply` does at every position."""
    return heads.apply(
        params["heads"],
        features,
        config.action_horizon,
        num_bins=_num_bins(config),
        dtype=config.dtype,
    )


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
      tokens: `[B, W, N, D]`; W may be any number of steps here, of "gpt" at most the config's.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      token_mask: `[B, W, N]`, True where the token is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.
      carry: of the recurrence before the first step; None means zeros. Of "gpt" always None.
      key: consumed, for dropout; None means no dropout.

    Returns:
      The carry (of kinds "fc" and "gpt": an empty dict), and features `[B, W, H]`, float32, zeros
      at masked steps.

    Raises:
      ValueError: `tokens` are not `[B, W, N, D]` with the config's N and D, or for "gpt" there is
        a carry or a longer window.
    """
    check_tokens(config, tokens, "[B, W, N, D]")
    if timestep_mask is not None:
        chex.assert_shape(timestep_mask, tokens.shape[:2])
    pooled = pool(params, config, tokens, token_mask=token_mask)
    return TRUNKS[config.kind].apply(
        params, config, pooled, mask=timestep_mask, reset=reset, carry=carry, key=key
    )


def pool(
    params: Params, config: DecoderConfig, tokens: Array, *, token_mask: Array | None = None
) -> jax.Array:
    """Returns one vector `[..., D']` per step, of `tokens [..., N, D]`; see `pooling.pool`."""
    queries = params["pooling"]["queries"] if config.pooling == "attention" else None
    return pooling.pool(
        tokens, config.pooling, config.num_latents, mask=token_mask, queries=queries
    )


def project(params: Params, config: DecoderConfig, pooled: Array) -> jax.Array:
    """Returns what the transformer of kind "gpt" gets of `pooled [..., D']`: `[..., H]` float32."""
    if "projection" not in params:
        return jnp.asarray(pooled)
    projection = params["projection"]
    return affine(pooled, projection["kernel"], projection["bias"], dtype=config.dtype)


def check_tokens(config: DecoderConfig, tokens: Array, axes: str) -> None:
    """Raises a ValueError unless `tokens` have these axes, the last two as in the config.

    Args:
      config: of the decoder.
      tokens: what a user gave.
      axes: their axes in words, such as "[B, W, N, D]".
    """
    least = config.num_tokens or _least_tokens(config)
    most = config.num_tokens or math.inf
    fits = tokens.ndim == axes.count(",") + 1 and tokens.shape[-1] == config.token_dim
    if not fits or not least <= tokens.shape[-2] <= most:
        expected = f"= {least}" if config.num_tokens else f"≥ {least}"
        raise ValueError(
            f"tokens must be {axes} with N {expected} and D = {config.token_dim}, got "
            f"{tokens.shape}; check num_tokens and token_dim of the decoder config."
        )


def _least_tokens(config: DecoderConfig) -> int:
    """The fewest tokens that can be shared out to `num_latents` bins."""
    return config.num_latents if config.pooling in ("max", "mean") else 1


def _num_bins(config: DecoderConfig) -> int | None:
    return config.num_bins if config.head == "discrete" else None


def _keep(values: jax.Array, mask: Array | None) -> jax.Array:
    return values if mask is None else jnp.where(mask[..., None], values, 0.0)


def _init_recurrence(key: Key, config: DecoderConfig) -> Params:
    return {"recurrence": recurrence.init(key, recurrence_config(config), pooled_size(config))}


def _apply_recurrence(
    params: Params, config: DecoderConfig, pooled: jax.Array, *, mask, reset, carry, key
) -> tuple[Carry, jax.Array]:
    return recurrence.apply(
        params["recurrence"],
        recurrence_config(config),
        pooled,
        mask=mask,
        reset=reset,
        carry=carry,
        key=key,
    )


def _check_mlp(config: DecoderConfig) -> None:
    if config.dropout != 0.0:
        raise ValueError(
            f"dropout must be 0 for a decoder of kind 'fc', which drops nothing, got "
            f"{config.dropout}."
        )


def _init_mlp(key: Key, config: DecoderConfig) -> Params:
    size = pooled_size(config)
    return {"mlp": heads.init_mlp(key, (size, max(size // 2, 1), config.hidden_size))}


def _apply_mlp(
    params: Params, config: DecoderConfig, pooled: jax.Array, *, mask, reset, carry, key
) -> tuple[Carry, jax.Array]:
    del reset, carry, key  # nothing is remembered, nothing dropped
    return {}, _keep(heads.apply_mlp(params["mlp"], pooled, dtype=config.dtype), mask)


def _init_transformer(key: Key, config: DecoderConfig) -> Params:
    projection_key, transformer_key = jax.random.split(key)
    params = {"transformer": transformer.init(transformer_key, transformer_config(config))}
    sizes = (pooled_size(config), config.hidden_size)
    if sizes[0] != sizes[1]:
        params["projection"] = heads.init_mlp(projection_key, sizes)["layers_0"]
    return params


def _apply_transformer(
    params: Params, config: DecoderConfig, pooled: jax.Array, *, mask, reset, carry, key
) -> tuple[Carry, jax.Array]:
    if carry is not None:
        raise ValueError(
            "carry must be None for a decoder of kind 'gpt', which looks at its window and carries "
            f"nothing, got {type(carry).__name__}; give the whole window, or use streaming."
        )
    inputs = project(params, config, pooled)
    _, features = transformer.apply(
        params["transformer"], transformer_config(config), inputs, mask=mask, reset=reset, key=key
    )
    return {}, features


_RECURRENCE = Trunk("recurrence", recurrence_config, _init_recurrence, _apply_recurrence)
TRUNKS = {
    **dict.fromkeys(CELLS, _RECURRENCE),
    "fc": Trunk("mlp", _check_mlp, _init_mlp, _apply_mlp),
    "gpt": Trunk("transformer", transformer_config, _init_transformer, _apply_transformer),
}
