"""A transformer over time with rotary positions and a bounded reach: Llama's layers.

    h ← h + Attention(norm(h));  h ← h + W_d (silu(W_g y) ⊙ W_u y), y = norm(h);  output = norm(h)
    Attention = softmax over the last `span` steps s of (R(age) qₜ)·kₛ / √E, times vₛ;  age = t − s

norm is RMSNorm, R(age) rotates pairs of features by age · θ^(−2i/E). M query heads share M' key and
value heads. The inputs are vectors, there are no biases, and positions are relative, so that a
sequence may be of any length.

- `apply` runs a sequence: every step attends to itself and at most `span` − 1 earlier real steps of
  its episode. A masked step is attended to by no other step and gives zeros.
- `step` runs one step with a ring buffer of keys and values. The keys are stored without rotation
  and rotated by their age, so that its results are exact however long the episode is.

Norms, softmax and the sums of products are float32; `dtype` applies to the factors of products.

Source: Touvron et al. 2023, Llama (arXiv:2302.13971); with a bounded reach Jiang et al. 2023,
Mistral (arXiv:2310.06825), as in Hugging Face's `MistralModel`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.config import MAX_LENGTH, checked, did_you_mean
from vla_jax.nn.attention import causal_mask, episode_positions
from vla_jax.nn.bptt import keep_real
from vla_jax.nn.layers import SPLIT_INPUTS, SPLIT_OUTPUTS, dropout, rms_norm
from vla_jax.nn.matmul import product
from vla_jax.nn.rotary import grouped_attention, outer, rotate
from vla_jax.nn.sharded_params import split_rows
from vla_jax.nn.transformer import Cache, KeysValues
from vla_jax.types import Array, Key, Params, ShardingRules

THETA = 10_000.0  # base of the wavelengths of the rotary positions
SHARDING: ShardingRules = (
    ("*/attention/output/kernel", SPLIT_INPUTS),
    ("*/attention/*/kernel", SPLIT_OUTPUTS),
    ("*/mlp/down/kernel", SPLIT_INPUTS),
    ("*/mlp/*/kernel", SPLIT_OUTPUTS),
)

# (layer, query [B, T, M, E], keys and values of the same steps [B, T, M', E]) -> [B, T, H]
Attend = Callable[[str, jax.Array, KeysValues], jax.Array]


@dataclasses.dataclass(frozen=True)
@checked(span=(0, MAX_LENGTH))
class RotaryTransformerConfig:
    """A transformer with rotary positions."""

    num_layers: int = 4  # L, stacked layers
    num_heads: int = 8  # M, query heads
    num_kv_heads: int = 8  # M', key and value heads; divides num_heads
    hidden_size: int = 256  # H, features of a step; a multiple of num_heads
    span: int = 16  # steps that a step attends to in each layer, itself included
    dropout: float = 0.0  # dropout probability of the inputs and of what a layer adds
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the factors of matrix products

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "num_kv_heads", "hidden_size", "span"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_heads or self.hidden_size < 2 * self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads = {self.num_heads}, with 2 features "
                f"per head or more, got {self.hidden_size}; choose another num_heads."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"unknown dtype '{self.dtype}'; {did_you_mean(self.dtype, ('float32', 'bfloat16'))}"
            )


def init(key: Key, config: RotaryTransformerConfig) -> Params:
    """Returns `{"layers_0": {...}, ..., "output_norm"}`.

    Kernels `[in, out]` are drawn from N(0, 1 / in), those that add to the residual stream from N(0,
    1 / (2L · in)); scales are 1. The constant 0.02² of GPT-2 is for H of about 1,000: with small H
    the values are so small that the memory tokens of `memory_transformer` learn too slowly.

    Args:
      key: consumed.
      config: sizes of the stack.
    """
    keys = jax.random.split(key, config.num_layers)
    return {
        **{
            name: _init_layer(layer_key, config)
            for name, layer_key in zip(layer_names(config), keys, strict=True)
        },
        "output_norm": _init_norm(config.hidden_size),
    }


def init_cache(config: RotaryTransformerConfig, batch_size: int, num_steps: int) -> Cache:
    """Returns an empty cache.

    Args:
      config: sizes of the stack.
      batch_size: B.
      num_steps: C, capacity in steps.
    """
    features = config.hidden_size // config.num_heads
    shape = (batch_size, num_steps, config.num_kv_heads, features)

    def empty() -> jax.Array:
        return jnp.zeros(shape, config.dtype)

    return {name: KeysValues(empty(), empty()) for name in layer_names(config)}


def apply(
    params: Params,
    config: RotaryTransformerConfig,
    inputs: Array,
    *,
    mask: Array | None = None,
    reset: Array | None = None,
    key: Key | None = None,
) -> jax.Array:
    """Returns the outputs of all steps.

    Args:
      params: from `init`.
      config: the config given to `init`.
      inputs: `[B, T, H]`, T of any length; masked steps may be NaN.
      mask: `[B, T]`, True where the step is real; None means everywhere.
      reset: `[B, T]`, True where a new episode starts, on a masked step too; None means nowhere.
      key: consumed, for dropout; None means no dropout.

    Returns:
      `[B, T, H]` float32, zeros at masked steps.
    """
    real, starts = check_flags(config, inputs, mask, reset)
    visible = causal_mask(real, starts, config.span)
    angles = angles_of(config, episode_positions(real, starts))

    def attend(name: str, query: jax.Array, entry: KeysValues) -> jax.Array:
        del name
        return attention(rotated(query, angles), rotated(entry.keys, angles), entry.values, visible)

    return keep_real(run(params, config, keep_real(inputs, mask), attend, key=key), mask)


def step(
    params: Params, config: RotaryTransformerConfig, cache: Cache, inputs: Array, position: Array
) -> tuple[Cache, jax.Array]:
    """Returns the cache with one more step in it, and the output of that step, without dropout.

    The step at position p is in slot p mod C. Entries of an earlier episode are not attended to:
    position 0 starts an episode.

    Args:
      params: from `init`.
      config: the config given to `init`.
      cache: leaves `[B, C, M', E]`; C = `span`, or at least as many steps as an episode has.
      inputs: `[B, H]`.
      position: `[B]` int32, steps of this episode before this one.

    Returns:
      The cache, and the output `[B, H]`, float32.
    """
    chex.assert_shape(inputs, (None, config.hidden_size))
    chex.assert_shape(position, inputs.shape[:1])
    chex.assert_tree_shape_prefix(cache, inputs.shape[:1])
    capacity = cache["layers_0"].keys.shape[1]
    position, rows = jnp.asarray(position), jnp.arange(inputs.shape[0])
    age = (position[:, None] - jnp.arange(capacity)[None]) % capacity
    visible = (age <= position[:, None]) & (age < config.span)
    angles, new_cache = angles_of(config, -age), {}

    def attend(name: str, query: jax.Array, entry: KeysValues) -> jax.Array:
        def write(old: Array, new: jax.Array) -> jax.Array:
            return jnp.asarray(old).at[rows, position % capacity].set(new[:, 0])

        new_cache[name] = jax.tree.map(write, cache[name], entry)
        keys, values = new_cache[name]
        return attention(query, rotated(keys, angles), values, visible[:, None])

    outputs = run(params, config, jnp.asarray(inputs)[:, None], attend)
    return new_cache, outputs[:, 0]


def run(
    params: Params,
    config: RotaryTransformerConfig,
    inputs: Array,
    attend: Attend,
    *,
    key: Key | None = None,
) -> jax.Array:
    """Returns the outputs `[B, T, H]` of all layers, float32.

    Args:
      params: from `init`.
      config: the config given to `init`.
      inputs: `[B, T, H]`, not NaN.
      attend: attention of one layer; its queries, keys and values are not rotated.
      key: consumed, for dropout; None means no dropout.
    """
    hidden = dropout(_fold(key, 0), jnp.asarray(inputs, jnp.float32), config.dropout)
    for number, name in enumerate(layer_names(config), start=1):
        layer, layer_key = params[name], _fold(key, number)
        hidden = split_rows(hidden)
        normalised = _norm(layer["attention_norm"], hidden)
        query, *entry = (
            _dense(layer["attention"][part], normalised, config).astype(config.dtype)
            for part in ("query", "key", "value")
        )
        split = (*hidden.shape[:2], -1, config.hidden_size // config.num_heads)
        attended = attend(
            name, query.reshape(split), KeysValues(*(each.reshape(split) for each in entry))
        )
        attended = _dense(layer["attention"]["output"], attended, config)
        hidden = hidden + dropout(_fold(layer_key, 0), attended, config.dropout)
        hidden = hidden + dropout(_fold(layer_key, 1), _mlp(layer, config, hidden), config.dropout)
    return _norm(params["output_norm"], hidden)


def attention(query: jax.Array, keys: jax.Array, values: Array, visible: Array) -> jax.Array:
    """Returns the attention outputs `[B, T, H]` of rotated queries and keys."""
    scale = 1 / math.sqrt(query.shape[-1])
    return grouped_attention(query, keys, jnp.asarray(values), visible, scale=scale)


def angles_of(config: RotaryTransformerConfig, positions: Array) -> jax.Array:
    """Returns the rotary angles `[..., E // 2]` rad of positions `[...]`."""
    num_pairs = config.hidden_size // config.num_heads // 2
    return outer(positions, THETA ** -(np.arange(num_pairs, dtype=np.float32) / num_pairs))


def rotated(heads: Array, angles: jax.Array) -> jax.Array:
    """Returns `heads [B, T, M, E]` rotated by `angles [B, T, E // 2]`; of odd E the last stays."""
    heads, paired = jnp.asarray(heads), 2 * angles.shape[-1]
    turned = rotate(heads[..., :paired], angles)
    return jnp.concatenate([turned, heads[..., paired:]], axis=-1)


def check_flags(
    config: RotaryTransformerConfig, inputs: Array, mask: Array | None, reset: Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the mask and the resets `[B, T]` of inputs `[B, T, H]`, after checking the shapes."""
    chex.assert_shape(inputs, (None, None, config.hidden_size))
    for flags in (mask, reset):
        if flags is not None:
            chex.assert_shape(flags, inputs.shape[:2])
            chex.assert_type(flags, bool)
    shape = inputs.shape[:2]
    real = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask)
    return real, jnp.zeros(shape, bool) if reset is None else jnp.asarray(reset)


def layer_names(config: RotaryTransformerConfig) -> list[str]:
    """Returns the names of the layers in params and caches."""
    return [f"layers_{layer}" for layer in range(config.num_layers)]


def mlp_size(config: RotaryTransformerConfig) -> int:
    """Returns 8H/3, rounded up to a multiple of 8: as many weights as an MLP of 4H units."""
    return 8 * math.ceil(config.hidden_size / 3)


def _mlp(params: Params, config: RotaryTransformerConfig, hidden: jax.Array) -> jax.Array:
    mlp, normalised = params["mlp"], _norm(params["mlp_norm"], hidden)
    gate = jax.nn.silu(_dense(mlp["gate"], normalised, config))
    return _dense(mlp["down"], gate * _dense(mlp["up"], normalised, config), config)


def _norm(params: Params, hidden: jax.Array) -> jax.Array:
    return rms_norm(hidden, params["scale"])


def _dense(params: Params, inputs: jax.Array, config: RotaryTransformerConfig) -> jax.Array:
    return product(inputs, params["kernel"], dtype=config.dtype)


def _init_layer(key: Key, config: RotaryTransformerConfig) -> Params:
    size, wide = config.hidden_size, mlp_size(config)
    key_size = size // config.num_heads * config.num_kv_heads
    keys, residual = iter(jax.random.split(key, 7)), 1 / math.sqrt(2 * config.num_layers)

    def dense(rows: int, columns: int, scale: float = 1.0) -> Params:
        draw = jax.random.normal(next(keys), (rows, columns))
        return {"kernel": scale / math.sqrt(rows) * draw}

    return {
        "attention_norm": _init_norm(size),
        "attention": {
            "query": dense(size, size),
            "key": dense(size, key_size),
            "value": dense(size, key_size),
            "output": dense(size, size, residual),
        },
        "mlp_norm": _init_norm(size),
        "mlp": {
            "gate": dense(size, wide),
            "up": dense(size, wide),
            "down": dense(wide, size, residual),
        },
    }


def _init_norm(size: int) -> Params:
    return {"scale": jnp.ones(size)}


def _fold(key: Key | None, number: int) -> Key | None:
    return None if key is None else jax.random.fold_in(key, number)
