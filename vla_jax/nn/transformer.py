"""A GPT-2 transformer over time.

`apply` runs a window, `step` one time step with a cache of keys and values. The inputs are vectors,
so there is no word embedding; the rest is GPT-2: learned positions, layer norms (ε = 10⁻⁵) before
attention and MLP and after the last layer, GELU with the tanh approximation. M attention heads have
E features each, H = M·E.

- A step whose `mask` is False is attended to by no other step and gives zeros. Positions count real
  steps only, so that a padded window gives the same results as the window without its padding.
- A step whose `reset` is True starts an episode: its position is 0, and it does not attend to
  earlier steps.

Norms, softmax and the sums of products are float32; `dtype` applies to the factors of products.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vla_jax.config import MAX_LENGTH, checked, did_you_mean
from vla_jax.nn.attention import episode_positions
from vla_jax.nn.layers import MLP_SHARDING, SPLIT_INPUTS, dense, dropout, layer_norm, masked_softmax
from vla_jax.nn.sharded_params import split_rows
from vla_jax.trees import under
from vla_jax.types import Array, Key, Params, ShardingRules

SHARDING: ShardingRules = (
    # three maps side by side: a part of their outputs is not a part of the heads
    ("*/qkv/kernel", PartitionSpec("fsdp")),
    ("*/output/kernel", SPLIT_INPUTS),
    *under("*/mlp", MLP_SHARDING),
)


class KeysValues(NamedTuple):
    """Keys and values of one layer."""

    keys: Array  # [B, T, M, E] in the config's dtype
    values: Array  # [B, T, M, E] in the config's dtype


Cache = dict[str, KeysValues]  # by layer, named as in the params


@dataclasses.dataclass(frozen=True)
@checked(num_positions=(0, MAX_LENGTH))
class TransformerConfig:
    """A GPT-2 transformer."""

    num_layers: int = 8  # L, stacked layers
    num_heads: int = 8  # M, attention heads
    hidden_size: int = 256  # H, features of a step; a multiple of num_heads
    num_positions: int = 16  # learned positions, the longest window in steps
    dropout: float = 0.0  # dropout probability at embedding, attention weights, residual branches
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the factors of matrix products

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "hidden_size", "num_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads = {self.num_heads}, got "
                f"{self.hidden_size}; choose another num_heads."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"unknown dtype '{self.dtype}'; {did_you_mean(self.dtype, ('float32', 'bfloat16'))}"
            )


def init(key: Key, config: TransformerConfig) -> Params:
    """Returns `{"position_embedding", "layers_0": {...}, ..., "output_norm"}`.

    Kernels and positions are drawn from N(0, 0.02²), kernels that add to the residual stream from
    N(0, 0.02² / 2L); biases are 0, scales 1. `qkv` has queries, keys, values on its last axis.

    Args:
      key: consumed.
      config: sizes of the stack.

    Source: Radford et al. 2019, GPT-2, section 2.3, as in `GPT2PreTrainedModel._init_weights`
    of Hugging Face's transformers.
    """
    position_key, *layer_keys = jax.random.split(key, config.num_layers + 1)
    shape = (config.num_positions, config.hidden_size)
    return {
        "position_embedding": 0.02 * jax.random.normal(position_key, shape),
        **{
            name: _init_layer(layer_key, config)
            for name, layer_key in zip(_layers(config), layer_keys, strict=True)
        },
        "output_norm": _init_norm(config.hidden_size),
    }


def init_cache(config: TransformerConfig, batch_size: int, num_steps: int) -> Cache:
    """Returns an empty cache.

    Args:
      config: sizes of the stack.
      batch_size: B.
      num_steps: T, capacity in steps, at most `num_positions`.
    """
    shape = (batch_size, num_steps, config.num_heads, config.hidden_size // config.num_heads)

    def empty() -> jax.Array:
        return jnp.zeros(shape, config.dtype)

    return {name: KeysValues(empty(), empty()) for name in _layers(config)}


def apply(
    params: Params,
    config: TransformerConfig,
    inputs: Array,
    *,
    mask: Array | None = None,
    reset: Array | None = None,
    key: Key | None = None,
) -> tuple[Cache, jax.Array]:
    """Returns the keys and values of all steps, and their outputs.

        h ← x + p;  h ← h + Attention(norm(h));  h ← h + MLP(norm(h));  output = norm(h)
        Attention = softmax(q·k / √E) v over the real steps of the episode so far

    Args:
      params: from `init`.
      config: the config given to `init`.
      inputs: x `[B, T, H]`.
      mask: `[B, T]`, True where the step is real; None means everywhere.
      reset: `[B, T]`, True where a new episode starts, on a masked step too; None means nowhere.
      key: consumed, for dropout; None means no dropout.

    Returns:
      The cache, and outputs `[B, T, H]`, float32. `step` can continue from the cache if each row
      is one episode with masked steps at its end only.

    Raises:
      ValueError: T is larger than the number of positions.

    Source: Radford et al. 2019, GPT-2, as in Hugging Face's `GPT2Model`.
    """
    _check(config, inputs, mask, reset)
    real = jnp.ones(inputs.shape[:2], bool) if mask is None else jnp.asarray(mask)
    starts = jnp.zeros(inputs.shape[:2], bool) if reset is None else jnp.asarray(reset)
    inputs = jnp.where(real[..., None], inputs, 0.0)  # 0 · NaN is NaN
    position, visible = episode_positions(real, starts), _visible(real, starts)
    cache, outputs = _run(params, config, inputs, position, visible, key=key)
    return cache, jnp.where(real[..., None], outputs, 0.0)


def step(
    params: Params, config: TransformerConfig, cache: Cache, inputs: Array, position: Array
) -> tuple[Cache, jax.Array]:
    """Returns the cache with one more step in it, and the output of that step, without dropout.

    Entries of the cache at `position` and later are overwritten: position 0 starts an episode.

    Args:
      params: from `init`.
      config: the config given to `init`.
      cache: leaves `[B, T, M, E]`, of the earlier steps.
      inputs: `[B, H]`.
      position: `[B]` int32, steps of this episode before this one, below T.

    Returns:
      The cache, and the output `[B, H]`, float32.
    """
    chex.assert_shape(inputs, (None, config.hidden_size))
    chex.assert_shape(position, inputs.shape[:1])
    chex.assert_tree_shape_prefix(cache, inputs.shape[:1])
    position = jnp.asarray(position)[:, None]
    num_steps = cache["layers_0"].keys.shape[1]
    visible = (jnp.arange(num_steps)[None] <= position)[:, None]
    inputs = jnp.asarray(inputs, jnp.float32)[:, None]
    cache, outputs = _run(params, config, inputs, position, visible, cache=cache)
    return cache, outputs[:, 0]


def _run(
    params: Params,
    config: TransformerConfig,
    inputs: jax.Array,
    position: jax.Array,
    visible: jax.Array,
    *,
    cache: Cache | None = None,
    key: Key | None = None,
) -> tuple[Cache, jax.Array]:
    """Runs `inputs [B, T, H]` at `position [B, T]`; `visible [B, T, T (key)]` is the mask."""
    embedded = inputs + jnp.take(params["position_embedding"], position, axis=0)
    hidden, new_cache = dropout(_fold(key, 0), embedded, config.dropout), {}
    for number, name in enumerate(_layers(config), start=1):
        layer, layer_key = params[name], _fold(key, number)
        hidden = split_rows(hidden)
        query, entry = _project(layer, config, hidden)
        new_cache[name] = entry if cache is None else _write(cache[name], entry, position)
        attended = _attend(query, new_cache[name], visible, config, _fold(layer_key, 0))
        attended = _dense(layer["attention"]["output"], attended, config)
        hidden = hidden + dropout(_fold(layer_key, 1), attended, config.dropout)
        hidden = hidden + dropout(_fold(layer_key, 2), _mlp(layer, config, hidden), config.dropout)
    return new_cache, _norm(params["output_norm"], hidden)


def _visible(real: jax.Array, starts: jax.Array) -> jax.Array:
    """Returns the causal attention mask `[B, T (query), T (key)]`."""
    episode = jnp.cumsum(starts, axis=1)
    is_same = episode[:, :, None] == episode[:, None, :]
    index = jnp.arange(real.shape[1])
    age = index[:, None] - index[None, :]
    # A step attends to itself (age 0) even if masked, so that no row is empty.
    return (is_same & (age > 0)[None] & real[:, None, :]) | (age == 0)[None]


def _project(
    params: Params, config: TransformerConfig, hidden: jax.Array
) -> tuple[jax.Array, KeysValues]:
    """Returns the queries `[B, T, M, E]`, and the keys and values."""
    qkv = _dense(params["attention"]["qkv"], _norm(params["attention_norm"], hidden), config)
    parts = qkv.astype(config.dtype).reshape(*qkv.shape[:2], 3, config.num_heads, -1)
    query, keys, values = (parts[:, :, part] for part in range(3))
    return query, KeysValues(keys, values)


def _write(cache: KeysValues, entry: KeysValues, position: jax.Array) -> KeysValues:
    """Returns the cache with the entry of one step at `position [B, 1]`, and zeros after it."""
    rows = jnp.arange(position.shape[0])[:, None]
    is_earlier = jnp.arange(cache.keys.shape[1])[None] < position

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        # A NaN left by an earlier episode must not be multiplied by a weight of 0.
        return jnp.where(is_earlier[..., None, None], old, 0).at[rows, position].set(new)

    return jax.tree.map(write, cache, entry)


def _attend(
    query: jax.Array,
    cache: KeysValues,
    visible: jax.Array,
    config: TransformerConfig,
    key: Key | None,
) -> jax.Array:
    """Returns the attention outputs `[B, T, H]`, the heads concatenated."""
    sum32 = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("btme,bsme->bmts", query, cache.keys, **sum32)
    scores = scores / math.sqrt(query.shape[-1])
    weights = masked_softmax(scores, visible[:, None])
    weights = dropout(key, weights, config.dropout).astype(config.dtype)
    attended = jnp.einsum("bmts,bsme->btme", weights, cache.values, **sum32)
    return attended.reshape(*attended.shape[:2], -1)


def _mlp(params: Params, config: TransformerConfig, hidden: jax.Array) -> jax.Array:
    expanded = _dense(params["mlp"]["layers_0"], _norm(params["mlp_norm"], hidden), config)
    return _dense(params["mlp"]["layers_1"], jax.nn.gelu(expanded, approximate=True), config)


def _norm(params: Params, hidden: jax.Array) -> jax.Array:
    return layer_norm(hidden, params["scale"], params["bias"])


def _dense(params: Params, inputs: jax.Array, config: TransformerConfig) -> jax.Array:
    return dense(inputs, params["kernel"], params["bias"], dtype=config.dtype)


def _init_layer(key: Key, config: TransformerConfig) -> Params:
    size, residual = config.hidden_size, 0.02 / math.sqrt(2 * config.num_layers)
    qkv_key, output_key, expand_key, reduce_key = jax.random.split(key, 4)
    return {
        "attention_norm": _init_norm(size),
        "attention": {
            "qkv": _init_dense(qkv_key, (size, 3 * size), 0.02),
            "output": _init_dense(output_key, (size, size), residual),
        },
        "mlp_norm": _init_norm(size),
        "mlp": {
            "layers_0": _init_dense(expand_key, (size, 4 * size), 0.02),
            "layers_1": _init_dense(reduce_key, (4 * size, size), residual),
        },
    }


def _init_dense(key: Key, shape: tuple[int, int], deviation: float) -> Params:
    return {"kernel": deviation * jax.random.normal(key, shape), "bias": jnp.zeros(shape[1:])}


def _init_norm(size: int) -> Params:
    return {"scale": jnp.ones(size), "bias": jnp.zeros(size)}


def _fold(key: Key | None, number: int) -> Key | None:
    return None if key is None else jax.random.fold_in(key, number)


def _layers(config: TransformerConfig) -> list[str]:
    return [f"layers_{layer}" for layer in range(config.num_layers)]


def _check(
    config: TransformerConfig, inputs: Array, mask: Array | None, reset: Array | None
) -> None:
    chex.assert_shape(inputs, (None, None, config.hidden_size))
    for flags in (mask, reset):
        if flags is not None:
            chex.assert_shape(flags, inputs.shape[:2])
            chex.assert_type(flags, bool)
    if inputs.shape[1] > config.num_positions:
        raise ValueError(
            f"inputs must have at most num_positions = {config.num_positions} steps, got "
            f"{inputs.shape[1]}; shorten the window, or train with a larger window_size."
        )
