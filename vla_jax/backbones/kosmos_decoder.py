"""The language model of Kosmos-2: sinusoidal positions and sub-layer norms (Magneto).

Source: Wang et al. 2022 (arXiv:2210.06423), as in Hugging Face's `Kosmos2TextModel`.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import tensor_names
from vla_jax.backbones.blocks import (
    ACTIVATIONS,
    Remat,
    check_activation,
    keep_seen,
    layer_norm,
    linear,
    run_layers,
    split_heads,
)
from vla_jax.backbones.tensor_names import SAME, Tensor
from vla_jax.config import checked
from vla_jax.nn.rotary import grouped_attention, outer
from vla_jax.types import Array, Params

PROJECTIONS = ("query", "key", "value")
ATTENTION_NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
}  # our names of the maps of an attention layer -> those in a file
JSON_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "ffn_dim",
    "num_layers": "layers",
    "num_heads": "attention_heads",
    "activation": "activation_function",
    "epsilon": "layer_norm_eps",
    "scale_embedding": "scale_embedding",
    "padding_id": "pad_token_id",
}  # our field -> that of `text_config` in a config.json


@dataclass(frozen=True)
@checked(num_layers=(1, 10_000), epsilon=(0, 1))
class KosmosDecoderConfig:
    """Sizes of the language model of Kosmos-2."""

    vocab_size: int = 65037  # V, token ids are in [0, vocab_size)
    hidden_size: int = 2048  # D, features of a token
    intermediate_size: int = 8192  # hidden units of the MLPs
    num_layers: int = 24  # number of transformer layers
    num_heads: int = 32  # M, attention heads
    activation: str = "gelu"  # of the MLPs, by Hugging Face's name
    epsilon: float = 1e-5  # added to the variance in layer norms
    scale_embedding: bool = True  # multiply embeddings by √hidden_size
    padding_id: int = 1  # id of padding in the original's inputs; positions start after it

    def __post_init__(self):
        check_activation(self.activation)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise ValueError(
                f"hidden_size must be even and a multiple of num_heads {self.num_heads}, got "
                f"{self.hidden_size}."
            )


def apply(
    params: Params,
    config: KosmosDecoderConfig,
    embeddings: Array,
    positions: Array,
    mask: Array,
    *,
    dtype: str = "float32",
    remat: Remat = "none",
) -> jax.Array:
    """Returns the hidden states after the last norm.

    Args:
      params: of the language model.
      config: of the language model.
      embeddings: `[B, T, D]`, not scaled.
      positions: `[B, T]`, as in the original: the first real token has `padding_id` + 1.
      mask: bool `[B, T, T]`, True where a query attends to a key.
      dtype: of activations and matrix products.
      remat: see `blocks.run_layers`.

    Returns:
      `[B, T, D]` float32.
    """
    scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
    embeddings = keep_seen(jnp.asarray(embeddings), mask)
    x = scale * embeddings + sinusoids(config, positions)

    def layer(x: jax.Array, params: Params) -> jax.Array:
        h = layer_norm(params["norm_1"], x, config.epsilon)
        query, key, value = (
            split_heads(linear(params[name], h), config.num_heads) for name in PROJECTIONS
        )
        head_dim = config.hidden_size // config.num_heads
        h = grouped_attention(query, key, value, mask, scale=head_dim**-0.5)
        x = x + linear(params["out"], layer_norm(params["attention_norm"], h, config.epsilon))
        h = layer_norm(params["norm_2"], x, config.epsilon)
        h = ACTIVATIONS[config.activation](linear(params["up"], h))
        return x + linear(params["down"], layer_norm(params["mlp_norm"], h, config.epsilon))

    x = run_layers(layer, x.astype(dtype), params["layers"], remat=remat)
    return layer_norm(params["norm"], x, config.epsilon).astype(jnp.float32)


def sinusoids(config: KosmosDecoderConfig, positions: Array) -> jax.Array:
    """Returns the position embeddings `[..., D]` of positions `[...]`; that of padding is 0.

    All sines, then all cosines, of `position · 10000^(−i / (D/2 − 1))`.
    """
    half = config.hidden_size // 2
    step = math.log(10000.0) / (half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-step))
    positions = jnp.asarray(positions)
    angles = outer(positions, frequencies)
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.where((positions == config.padding_id)[..., None], 0.0, table)


def embed(params: Params, config: KosmosDecoderConfig, ids: Array) -> jax.Array:
    """Returns the embeddings `[..., D]` of token ids, not scaled; ids are clipped to [0, V)."""
    table = jnp.asarray(params["embed"]["embedding"])
    return table[jnp.clip(ids, 0, config.vocab_size - 1)].astype(jnp.float32)


def shapes(config: KosmosDecoderConfig) -> Params:
    """Returns the shapes of the params."""
    num_layers, dim, wide = config.num_layers, config.hidden_size, config.intermediate_size
    norm = {"scale": (num_layers, dim), "bias": (num_layers, dim)}
    square = {"kernel": (num_layers, dim, dim), "bias": (num_layers, dim)}
    return {
        "embed": {"embedding": (config.vocab_size, dim)},
        "layers": {
            **dict.fromkeys(("norm_1", "attention_norm", "norm_2"), norm),
            **dict.fromkeys((*PROJECTIONS, "out"), square),
            "mlp_norm": {"scale": (num_layers, wide), "bias": (num_layers, wide)},
            "up": {"kernel": (num_layers, dim, wide), "bias": (num_layers, wide)},
            "down": {"kernel": (num_layers, wide, dim), "bias": (num_layers, dim)},
        },
        "norm": {"scale": (dim,), "bias": (dim,)},
    }


def tensors(path: str, name: str) -> tuple[Tensor, ...]:
    """Returns the tensors of the language model.

    Args:
      path: of the model in the params.
      name: of the model in the file.
    """
    layer, layers = f"{name}.layers.{{}}", f"{path}/layers"
    norms = {
        "norm_1": "self_attn_layer_norm",
        "attention_norm": "self_attn.inner_attn_ln",
        "norm_2": "final_layer_norm",
        "mlp_norm": "ffn.ffn_layernorm",
    }
    maps = {**ATTENTION_NAMES, "up": "ffn.fc1", "down": "ffn.fc2"}
    return tensor_names.join(
        [Tensor(f"{path}/embed/embedding", f"{name}.embed_tokens.weight", SAME)],
        *(
            tensor_names.norm(f"{layers}/{ours}", f"{layer}.{file}", bias=True)
            for ours, file in norms.items()
        ),
        *(
            tensor_names.linear(f"{layers}/{ours}", f"{layer}.{file}", bias=True)
            for ours, file in maps.items()
        ),
        tensor_names.norm(f"{path}/norm", f"{name}.layer_norm", bias=True),
    )
