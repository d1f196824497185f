"""A decoder-only language model with rotary positions and gated MLPs: Llama, Gemma, Gemma 2, Qwen.

The models differ in the fields of the config. Embeddings, positions and attention masks are
arguments, so that images, learned tokens and prefixes can be placed freely.

Source: Touvron et al. 2023, Llama (arXiv:2302.13971); Gemma Team 2024 (arXiv:2403.08295,
arXiv:2408.00118); Bai et al. 2025, Qwen2.5-VL (arXiv:2502.13923); as in Hugging Face's models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import model_json, tensor_names
from vla_jax.backbones.blocks import (
    ACTIVATIONS,
    Remat,
    check_activation,
    keep_seen,
    linear,
    rms_norm,
    run_layers,
    split_heads,
)
from vla_jax.backbones.tensor_names import SAME, Tensor
from vla_jax.config import LEAST_FLOAT, checked
from vla_jax.nn.rotary import grouped_attention, outer, rotate
from vla_jax.types import Array, Params


@dataclass(frozen=True)
@checked(
    epsilon=(0, 1),
    rope_theta=(LEAST_FLOAT, 1e12),
    norm_offset=(0, 1),
    query_scale=(0, 1e12),
    embedding_scale=(0, 1e12),
    score_cap=(LEAST_FLOAT, 1e12),
    logit_cap=(LEAST_FLOAT, 1e12),
)
class RotaryDecoderConfig:
    """Sizes and variants of a language model with rotary positions."""

    vocab_size: int = 49280  # V, token ids are in [0, vocab_size)
    hidden_size: int = 960  # D, features of a token
    intermediate_size: int = 2560  # hidden units of the MLPs
    num_layers: int = 32  # number of transformer layers
    num_heads: int = 15  # M, query heads
    num_key_value_heads: int = 5  # key and value heads; divides num_heads
    head_dim: int = 64  # E, features of a head
    activation: str = "silu"  # of the gate of the MLPs, by Hugging Face's name
    epsilon: float = 1e-5  # added to the mean square in the norms
    rope_theta: float = 100_000.0  # base of the wavelengths of the rotary positions
    qkv_bias: bool = False  # biases of the query, key and value projections (Qwen2.5)
    qk_norm: bool = False  # norms of the queries and keys of each head (Qwen3)
    norm_offset: float = 0.0  # added to the scales of the norms (Gemma: 1)
    embedding_scale: float = 1.0  # factor of the embeddings (Gemma: √hidden_size)
    query_scale: float = 0.0  # factor of the attention scores; 0 = head_dim^−0.5
    post_norms: bool = False  # norms after attention and MLP too (Gemma 2)
    score_cap: float | None = None  # bound of the attention scores (Gemma 2); None = no bound
    logit_cap: float | None = None  # bound of the logits (Gemma 2); None = no bound
    sliding_window: int | None = None  # causal reach of sliding layers, tokens; None = unlimited
    sliding_layers: tuple[bool, ...] = ()  # True for layers with a sliding window; () = none
    tied_head: bool = True  # the logits use the embedding instead of a kernel of their own

    def __post_init__(self):
        check_activation(self.activation)
        for name in ("vocab_size", "hidden_size", "num_heads", "num_key_value_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_key_value_heads {self.num_key_value_heads}, "
                f"got {self.num_heads}."
            )
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(
                f"sliding_layers must have one entry for each of the {self.num_layers} layers, got "
                f"{len(self.sliding_layers)}."
            )


def embed(params: Params, config: RotaryDecoderConfig, ids: Array) -> jax.Array:
    """Returns the scaled embeddings `[..., D]` of token ids `[...]`; ids are clipped to [0, V)."""
    table = jnp.asarray(params["embed"]["embedding"])
    rows = table[jnp.clip(ids, 0, config.vocab_size - 1)]
    return rows.astype(jnp.float32) * config.embedding_scale


def apply(
    params: Params,
    config: RotaryDecoderConfig,
    embeddings: Array,
    angles: Array,
    mask: Array,
    *,
    sliding_mask: Array | None = None,
    added: Array | None = None,
    dtype: str = "float32",
    remat: Remat = "none",
) -> jax.Array:
    """Returns the hidden states after the last norm.

    Args:
      params: of `shapes`.
      config: sizes and variants.
      embeddings: `[B, T, D]`, scaled.
      angles: rotary angles `[B or 1, T, E/2]` rad, from `rotary_angles`.
      mask: bool `[B or 1, T or 1, T]`, True where a query attends to a key.
      sliding_mask: the mask of sliding layers; None = `mask`.
      added: `[J, B, T, D]`, added to the hidden states after each of the first J layers (deepstack
        of Qwen3-VL); None adds nothing.
      dtype: of activations and matrix products.
      remat: see `blocks.run_layers`.

    Returns:
      `[B, T, D]` float32.
    """
    is_sliding = np.asarray(config.sliding_layers or (False,) * config.num_layers)

    def layer(x: jax.Array, arrays: tuple[Params, jax.Array, jax.Array]) -> jax.Array:
        params, sliding, number = arrays
        seen = mask if sliding_mask is None else jnp.where(sliding, sliding_mask, mask)
        x = x + _attention(params, config, x, angles, seen)
        x = x + _gated_mlp(params, config, x)
        return x if added is None else x + _added_after(number, added).astype(x.dtype)

    x = keep_seen(jnp.asarray(embeddings, dtype), mask)
    stacked = (params["layers"], is_sliding, np.arange(config.num_layers))
    x = run_layers(layer, x, stacked, remat=remat)
    return _norm(params["norm"], config, x).astype(jnp.float32)


def rotary_angles(config: RotaryDecoderConfig, positions: Array) -> jax.Array:
    """Returns the rotary angles `[..., E/2]` rad of positions `[...]`."""
    size = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (np.arange(0, size, 2, dtype=np.float32) / size)
    return outer(positions, frequencies)


def logits(params: Params, config: RotaryDecoderConfig, hidden: Array) -> jax.Array:
    """Returns the scores `[..., V]` float32 of the next token."""
    head = {"kernel": params["embed"]["embedding"].T} if config.tied_head else params["head"]
    scores = linear(head, jnp.asarray(hidden, jnp.float32))
    cap = config.logit_cap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def shapes(config: RotaryDecoderConfig) -> Params:
    """Returns the shapes of the params."""
    num_layers, size, wide = config.num_layers, config.hidden_size, config.intermediate_size
    query_size = config.num_heads * config.head_dim
    key_size = config.num_key_value_heads * config.head_dim
    bias = config.qkv_bias
    layers = {
        "norm_1": {"scale": (num_layers, size)},
        "query": _linear_shapes(num_layers, size, query_size, bias=bias),
        "key": _linear_shapes(num_layers, size, key_size, bias=bias),
        "value": _linear_shapes(num_layers, size, key_size, bias=bias),
        "out": _linear_shapes(num_layers, query_size, size),
        "norm_2": {"scale": (num_layers, size)},
        "gate": _linear_shapes(num_layers, size, wide),
        "up": _linear_shapes(num_layers, size, wide),
        "down": _linear_shapes(num_layers, wide, size),
    }
    if config.qk_norm:
        head = {"scale": (num_layers, config.head_dim)}
        layers |= {"query_norm": head, "key_norm": head}
    if config.post_norms:
        norm = {"scale": (num_layers, size)}
        layers |= {"post_norm_1": norm, "post_norm_2": norm}
    head = {} if config.tied_head else {"head": {"kernel": (size, config.vocab_size)}}
    return {
        "embed": {"embedding": (config.vocab_size, size)},
        "layers": layers,
        "norm": {"scale": (size,)},
        **head,
    }


def tensors(
    config: RotaryDecoderConfig, path: str, name: str, *, head_name: str
) -> tuple[Tensor, ...]:
    """Returns the tensors of the language model.

    Args:
      config: sizes and variants.
      path: of the model in the params.
      name: of the model in the file, such as `language_model.model`.
      head_name: of the kernel of the logits in the file; not used if the head is tied.
    """
    layer, layers = f"{name}.layers.{{}}", f"{path}/layers"
    second_norm = "pre_feedforward" if config.post_norms else "post_attention"
    norms = {"norm_1": "input_layernorm", "norm_2": f"{second_norm}_layernorm"}
    if config.post_norms:
        norms["post_norm_1"] = "post_attention_layernorm"
        norms["post_norm_2"] = "post_feedforward_layernorm"
    if config.qk_norm:
        norms |= {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
    maps = {
        **{
            ours: (f"self_attn.{file}_proj", config.qkv_bias)
            for ours, file in {"query": "q", "key": "k", "value": "v"}.items()
        },
        "out": ("self_attn.o_proj", False),
        **{ours: (f"mlp.{ours}_proj", False) for ours in ("gate", "up", "down")},
    }
    head = tensor_names.linear(f"{path}/head", head_name.removesuffix(".weight"), bias=False)
    return tensor_names.join(
        [Tensor(f"{path}/embed/embedding", f"{name}.embed_tokens.weight", SAME)],
        *(
            tensor_names.norm(f"{layers}/{ours}", f"{layer}.{file}", bias=False)
            for ours, file in norms.items()
        ),
        *(
            tensor_names.linear(f"{layers}/{ours}", f"{layer}.{file}", bias=bias)
            for ours, (file, bias) in maps.items()
        ),
        tensor_names.norm(f"{path}/norm", f"{name}.norm", bias=False),
        [] if config.tied_head else head,
    )


def _attention(
    params: Params, config: RotaryDecoderConfig, x: jax.Array, angles: Array, mask: Array
) -> jax.Array:
    h = _norm(params["norm_1"], config, x)
    query = split_heads(linear(params["query"], h), config.num_heads)
    key = split_heads(linear(params["key"], h), config.num_key_value_heads)
    value = split_heads(linear(params["value"], h), config.num_key_value_heads)
    if config.qk_norm:
        query = _norm(params["query_norm"], config, query)
        key = _norm(params["key_norm"], config, key)
    angles = jnp.asarray(angles)
    outputs = grouped_attention(
        rotate(query, angles),
        rotate(key, angles),
        value,
        mask,
        scale=config.query_scale or config.head_dim**-0.5,
        softcap=config.score_cap,
    )
    outputs = linear(params["out"], outputs)
    return _norm(params["post_norm_1"], config, outputs) if config.post_norms else outputs


def _gated_mlp(params: Params, config: RotaryDecoderConfig, x: jax.Array) -> jax.Array:
    h = _norm(params["norm_2"], config, x)
    gate = ACTIVATIONS[config.activation](linear(params["gate"], h))
    outputs = linear(params["down"], gate * linear(params["up"], h))
    return _norm(params["post_norm_2"], config, outputs) if config.post_norms else outputs


def _norm(params: Params, config: RotaryDecoderConfig, x: jax.Array) -> jax.Array:
    return rms_norm(params, x, config.epsilon, offset=config.norm_offset)


def _added_after(number: jax.Array, added: Array) -> jax.Array:
    """Returns `added[number]`, or zeros after the last entry."""
    last = len(added) - 1
    return jnp.where(number <= last, jnp.asarray(added)[jnp.minimum(number, last)], 0.0)


def _linear_shapes(
    num_layers: int, num_inputs: int, num_outputs: int, *, bias: bool = False
) -> Params:
    kernel = {"kernel": (num_layers, num_inputs, num_outputs)}
    return {**kernel, "bias": (num_layers, num_outputs)} if bias else kernel


_JSON_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "epsilon": "rms_norm_eps",
    "activation": "hidden_act",
}  # our field -> that of `text_config` in a config.json


def from_json(text: model_json.Json, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of the config from a `text_config`.

    Args:
      text: the dict of the `config.json`.
      defaults: of the original's class, by our names: the sizes, `activation`, `epsilon`,
        `rope_theta`. Absent `num_key_value_heads` are `num_heads`, an absent `head_dim` is
        `hidden_size / num_heads`.

    Raises:
      ValueError: a field has another type or a value that is not supported.
    """
    fields = {
        ours: model_json.number(text, name, defaults.get(ours, 0), least=1)
        for ours, name in _JSON_FIELDS.items()
    }
    model_json.check_num_layers(fields["num_layers"])
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or fields["num_heads"]
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // fields["num_heads"]
    return {**fields, "rope_theta": model_json.rope_theta(text, defaults["rope_theta"])}


def to_json(config: RotaryDecoderConfig) -> dict[str, Any]:
    """Returns the fields of a `text_config` that all models have."""
    return {**model_json.write(config, _JSON_FIELDS), "rope_theta": config.rope_theta}
