"""A vision transformer with pre-norm layers: the vision towers of CLIP, SigLIP and SmolVLM.

Source: Dosovitskiy et al. 2021 (arXiv:2010.11929), as in Hugging Face's `CLIPVisionModel` and
`SiglipVisionModel`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import tensor_names
from vla_jax.backbones.blocks import (
    ACTIVATIONS,
    Remat,
    check_activation,
    layer_norm,
    linear,
    patches,
    run_layers,
    split_heads,
)
from vla_jax.backbones.tensor_names import SAME, Tensor
from vla_jax.config import checked
from vla_jax.nn.rotary import grouped_attention
from vla_jax.types import Array, Params


@dataclass(frozen=True)
@checked(epsilon=(0, 1))
class VisionConfig:
    """Sizes of a vision transformer."""

    hidden_size: int = 1152  # features of a patch
    intermediate_size: int = 4304  # hidden units of the MLPs
    num_layers: int = 27  # number of transformer layers
    num_heads: int = 16  # heads of every attention layer
    image_size: int = 224  # height and width of an image, pixels
    patch_size: int = 14  # height and width of a patch, pixels
    activation: str = "gelu_pytorch_tanh"  # of the MLPs, by Hugging Face's name
    epsilon: float = 1e-6  # added to the variance in layer norms

    def __post_init__(self):
        check_activation(self.activation)
        for name in ("hidden_size", "intermediate_size", "num_heads", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_layers < 0:
            raise ValueError(f"num_layers must be 0 or more, got {self.num_layers}.")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads {self.num_heads}, got "
                f"{self.hidden_size}."
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size must be at least patch_size {self.patch_size}, got {self.image_size}."
            )

    @property
    def grid_size(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size


def apply_layers(
    params: Params, config: VisionConfig, x: jax.Array, *, mask: Array, remat: Remat = "none"
) -> jax.Array:
    """Returns the hidden states after all layers.

    Args:
      params: stacked layers of `layer_shapes`.
      config: sizes.
      x: embedded patches `[I, S, D]`.
      mask: bool `[I or 1, 1, S]`, True where a patch is real.
      remat: see `blocks.run_layers`.

    Returns:
      `[I, S, D]`.
    """
    activation = ACTIVATIONS[config.activation]
    scale = (config.hidden_size // config.num_heads) ** -0.5

    def layer(x: jax.Array, params: Params) -> jax.Array:
        h = layer_norm(params["norm_1"], x, config.epsilon)
        parts = params["attention"]
        query, key, value = (
            split_heads(linear(parts[name], h), config.num_heads)
            for name in ("query", "key", "value")
        )
        x = x + linear(parts["out"], grouped_attention(query, key, value, mask, scale=scale))
        h = layer_norm(params["norm_2"], x, config.epsilon)
        return x + linear(params["mlp"]["down"], activation(linear(params["mlp"]["up"], h)))

    return run_layers(layer, x, params, remat=remat)


def all_patches(num_patches: int) -> jax.Array:
    """Returns the mask `[1, 1, S]` of images without padding."""
    return jnp.ones((1, 1, num_patches), bool)


def layer_shapes(config: VisionConfig) -> Params:
    """Returns the shapes of the stacked layers."""
    num_layers, size, wide = config.num_layers, config.hidden_size, config.intermediate_size
    norm = {"scale": (num_layers, size), "bias": (num_layers, size)}
    square = {"kernel": (num_layers, size, size), "bias": (num_layers, size)}
    return {
        "norm_1": norm,
        "attention": dict.fromkeys(("query", "key", "value", "out"), square),
        "norm_2": norm,
        "mlp": {
            "up": {"kernel": (num_layers, size, wide), "bias": (num_layers, wide)},
            "down": {"kernel": (num_layers, wide, size), "bias": (num_layers, size)},
        },
    }


def layer_tensors(path: str, name: str) -> tuple[Tensor, ...]:
    """Returns the tensors of the layers.

    Args:
      path: of the layers in the params.
      name: of the layers in the file, such as `vision_tower.encoder.layers`.
    """
    layer = f"{name}.{{}}"
    attention_names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    return tensor_names.join(
        tensor_names.norm(f"{path}/norm_1", f"{layer}.layer_norm1", bias=True),
        *(
            tensor_names.linear(f"{path}/attention/{ours}", f"{layer}.self_attn.{file}", bias=True)
            for ours, file in attention_names.items()
        ),
        tensor_names.norm(f"{path}/norm_2", f"{layer}.layer_norm2", bias=True),
        tensor_names.linear(f"{path}/mlp/up", f"{layer}.mlp.fc1", bias=True),
        tensor_names.linear(f"{path}/mlp/down", f"{layer}.mlp.fc2", bias=True),
    )


JSON_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "activation": "hidden_act",
    "epsilon": "layer_norm_eps",
}  # our field -> that of `vision_config` in a config.json

SIGLIP_BASE = VisionConfig(
    hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, patch_size=16
)  # defaults of Hugging Face's `SiglipVisionConfig`


def siglip(
    params: Params,
    config: VisionConfig,
    pixels: jax.Array,
    *,
    positions: Array | None = None,
    mask: Array | None = None,
    remat: Remat = "none",
) -> jax.Array:
    """Returns the features of all patches after the last norm of a SigLIP tower.

    Args:
      params: of `siglip_shapes`.
      config: sizes.
      pixels: normalised images `[I, h, w, 3]`.
      positions: index of the position embedding of each patch, `[I or 1, S]`; None = raster order.
      mask: bool `[I, S]`, True where a patch is real; None = everywhere. Others may be NaN.
      remat: see `blocks.run_layers`.

    Returns:
      `[I, S, hidden_size]`.
    """
    parts = patches(pixels, config.patch_size)
    if mask is not None:
        parts = jnp.where(jnp.asarray(mask)[..., None], parts, 0.0)
    x = linear(params["patches"], parts)
    embeddings = jnp.asarray(params["positions"]["embedding"])
    if positions is None:
        positions = np.arange(x.shape[1])[None]
    x = (x + jnp.broadcast_to(embeddings[positions], x.shape)).astype(x.dtype)
    seen = all_patches(x.shape[1]) if mask is None else jnp.asarray(mask)[:, None]
    x = apply_layers(params["layers"], config, x, mask=seen, remat=remat)
    return layer_norm(params["post_norm"], x, config.epsilon)


def siglip_shapes(config: VisionConfig) -> Params:
    """Returns the shapes of the params of a SigLIP tower."""
    size, num_pixels = config.hidden_size, config.patch_size**2 * 3
    return {
        "patches": {"kernel": (num_pixels, size), "bias": (size,)},
        "positions": {"embedding": (config.grid_size**2, size)},
        "layers": layer_shapes(config),
        "post_norm": {"scale": (size,), "bias": (size,)},
    }


def siglip_tensors(config: VisionConfig, path: str, name: str) -> tuple[Tensor, ...]:
    """Returns the tensors of a SigLIP tower.

    Args:
      config: sizes.
      path: of the tower in the params.
      name: of the tower in the file, such as `vision_tower`.
    """
    embeddings = f"{name}.embeddings"
    convolution = tensor_names.patch_convolution(config.patch_size)
    return tensor_names.join(
        [
            Tensor(f"{path}/patches/kernel", f"{embeddings}.patch_embedding.weight", convolution),
            Tensor(f"{path}/patches/bias", f"{embeddings}.patch_embedding.bias", SAME),
            Tensor(f"{path}/positions/embedding", f"{embeddings}.position_embedding.weight", SAME),
        ],
        layer_tensors(f"{path}/layers", f"{name}.encoder.layers"),
        tensor_names.norm(f"{path}/post_norm", f"{name}.post_layernorm", bias=True),
    )
