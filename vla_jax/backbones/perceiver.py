"""Perceiver: a small vision-language encoder that can be trained from scratch on a laptop.

The images of both cameras are divided into patches, each encoded by a linear map and a dense layer;
a few learned latents cross-attend to all patches, then self-attend together with the
proprioception. On a CPU this is several times faster than a convolutional network.

Source: Jaegle et al. 2021, "Perceiver" (arXiv:2103.03206), §3.1; Alayrac et al. 2022, "Flamingo"
(arXiv:2204.14198), use such latents as a resampler between vision and language.
"""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.sharding import PartitionSpec

from vla_jax.backbones import word_hashing
from vla_jax.backbones.backbone import Backbone, ImageSpec
from vla_jax.backbones.language import Words
from vla_jax.backbones.parts import (
    all_real,
    blank,
    camera_mask,
    column_present,
    flatten,
    mask_token,
    shape,
)
from vla_jax.config import MAX_SIDE, MAX_SIZE, checked
from vla_jax.nn import layers
from vla_jax.types import Array, Key, Observation, Params, Tokens

CAMERAS = ("image_primary", "image_wrist")
_INTO_HEADS = PartitionSpec("fsdp", "tensor", None)  # of kernels [width, M, E]


@dataclass(frozen=True)
@checked(
    image_size=(1, MAX_SIDE),
    patch_size=(1, MAX_SIDE),
    width=(1, MAX_SIZE),
    num_heads=(1, 2**16),
    num_latents=(1, 2**16),
    token_dim=(1, MAX_SIZE),
)
class PerceiverConfig:
    """Sizes of a Perceiver; its tokens are `num_latents` visual, one proprio, one language."""

    kind: Literal["perceiver"] = "perceiver"
    image_size: int = 64  # height and width of both cameras' images, pixels
    patch_size: int = 8  # height and width of a patch, pixels
    overlap: bool = True  # extend each patch by half of its neighbours
    width: int = 64  # features of patches and latents
    num_heads: int = 4  # heads of every attention layer
    num_latents: int = 8  # visual tokens per step
    token_dim: int = 16  # features D of a token; a small D needs fewer demonstrations
    patch_layers: int = 0  # self-attention layers over the patches (ViT); slow on a CPU
    latent_layers: int = 1  # self-attention layers over the latents
    proprio_dim: int = 8  # dimensions P of the proprioception
    vocab_size: int = 2048  # size of the vocabulary; word ids are in [0, vocab_size)
    max_words: int = 12  # words S of an instruction; further words are dropped
    dtype: str = "float32"  # dtype of the computation; params are float32

    def __post_init__(self):
        """Checks that images divide into patches, and the sizes of the vocabulary."""
        word_hashing.check_sizes(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size {self.patch_size}, "
                f"got {self.image_size}."
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads {self.num_heads}, got {self.width}."
            )

    @property
    def num_tokens(self) -> int:
        """N, tokens per step."""
        return self.num_latents + 2


def init(key: Key, config: PerceiverConfig) -> Params:
    """Returns random params; `key` is consumed."""
    return dict(Perceiver(config).init(key, blank(example(config)))["params"])


def apply(params: Params, config: PerceiverConfig, observation: Observation) -> Tokens:
    """Returns the tokens of each observation, independently of other time steps.

    Args:
      params: from `init`.
      config: config of the params.
      observation: `image_primary`, `image_wrist` uint8 `[..., h, w, 3]`, `proprio [..., P]`,
        `instruction [..., S]`, with any leading axes. Patches of a camera without an image
        (`image_mask`) are not attended to; without any number of proprio (`column_mask`) nor is
        its token, which is padding then.

    Returns:
      Tokens `[..., N, D]` float32, mask `[..., N]`.

    Raises:
      ValueError: a part is missing or has another size.
    """
    image = (config.image_size, config.image_size, 3)
    shapes = {
        "image_primary": image,
        "image_wrist": image,
        "proprio": (config.proprio_dim,),
        "instruction": (config.max_words,),
    }
    parts, lead = flatten(observation, shapes)
    real = camera_mask(observation, CAMERAS)
    present = column_present(observation, "proprio")
    tokens: Any = Perceiver(config).apply({"params": params}, parts, real, present)
    return mask_token(all_real(tokens, lead), config.num_latents, present)


def image_spec(config: PerceiverConfig) -> ImageSpec:
    """Returns the size of both cameras' images; they are normalised to [-1, 1]."""
    size, half = config.image_size, (0.5, 0.5, 0.5)
    return ImageSpec(size, size, CAMERAS, "area", mean=half, std=half)


def example(config: PerceiverConfig) -> Observation:
    """Returns the shapes of the observation of one step."""
    image = shape(config.image_size, config.image_size, 3, dtype=jnp.uint8)
    return Observation(
        image_primary=image,
        image_wrist=image,
        proprio=shape(config.proprio_dim),
        instruction=shape(config.max_words, dtype=jnp.int32),
    )


class Perceiver(nn.Module):
    """Linen module of `init` and `apply`."""

    config: PerceiverConfig

    @nn.compact
    def __call__(
        self, parts: dict[str, Array], real: Array | None = None, present: Array | None = None
    ) -> jax.Array:
        """Returns tokens `[B, N, D]` of the parts of an observation `[B, ...]`.

        `real [B, 2]` is False where a camera has no image, `present [B]` where there is no proprio;
        None means that there are both images, and proprio.
        """
        config = self.config
        width, dtype = config.width, jnp.dtype(config.dtype)
        patches = [self.patches(parts[name], name) for name in CAMERAS]
        patches = nn.LayerNorm(dtype=dtype)(jnp.concatenate(patches, axis=1))
        latents = self.param("latents", nn.initializers.normal(1.0), (config.num_latents, width))
        latents = repeat(latents, "N D -> B N D", B=patches.shape[0])
        mask = None
        if real is not None:
            mask = repeat(real, "B C -> B 1 N (C p)", N=config.num_latents, p=patches.shape[1] // 2)
        visual = attention(config, "look")(latents.astype(config.dtype), patches, mask=mask)
        proprio = nn.Dense(width, dtype=dtype, name="proprio")(parts["proprio"])
        tokens = MLP(width, config.dtype)(jnp.concatenate([visual, proprio[:, None]], axis=1))
        seen = None
        if present is not None:
            every = repeat(jnp.ones_like(present), "B -> B N", N=config.num_latents)
            seen = jnp.concatenate([every, present[:, None]], axis=1)[:, None, None, :]
        for _ in range(config.latent_layers):
            tokens = Mixer(config)(tokens, seen)
        tokens = nn.LayerNorm(dtype=dtype)(tokens)
        tokens = nn.Dense(config.token_dim, dtype=dtype, name="narrow")(tokens)
        words = Words(
            config.vocab_size, config.max_words, config.token_dim, config.dtype, name="words"
        )
        return jnp.concatenate([tokens, words(parts["instruction"])[:, None]], axis=1)

    def patches(self, image: Array, name: str) -> jax.Array:
        """Returns features `[B, num_patches, width]` of one camera's image."""
        config = self.config
        dtype, p = jnp.dtype(config.dtype), config.patch_size
        margin = (p // 2, p - p // 2) if config.overlap else (0, 0)
        x = jnp.pad(image, ((0, 0), margin, margin, (0, 0)), "edge")
        x = rearrange(x, "B (h p) (w q) c -> B h w (p q c)", p=p, q=p)
        if config.overlap:  # a patch of twice the size consists of four neighbouring blocks
            x = jnp.concatenate(
                [x[:, :-1, :-1], x[:, 1:, :-1], x[:, :-1, 1:], x[:, 1:, 1:]], axis=-1
            )
        # Normalised here, not before: bytes are copied four times as fast as floats.
        x = rearrange(x, "B h w F -> B (h w) F").astype(dtype) / 127.5 - 1
        x = nn.Dense(config.width, dtype=dtype, name=f"{name}_embed")(x)
        x = x + self.place(x, f"{name}_place_in")
        x = nn.Dense(config.width, dtype=dtype, name=f"{name}_mix")(nn.gelu(x))
        for _ in range(config.patch_layers):
            x = Mixer(config)(x)
        return x + self.place(x, f"{name}_place_out")

    def place(self, x: jax.Array, name: str) -> jax.Array:
        """Returns a learned position embedding `[1, num_patches, width]`."""
        return self.param(name, nn.initializers.normal(0.02), (1, *x.shape[1:])).astype(x.dtype)


class MLP(nn.Module):
    """Pre-norm MLP with residual: `x + W₂ gelu(W₁ norm(x))`."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array of the shape of `x`."""
        h = nn.Dense(2 * self.width, dtype=jnp.dtype(self.dtype))(
            nn.LayerNorm(dtype=jnp.dtype(self.dtype))(x)
        )
        return x + nn.Dense(self.width, dtype=jnp.dtype(self.dtype))(nn.gelu(h))


class Mixer(nn.Module):
    """Pre-norm transformer layer."""

    config: PerceiverConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns an array of the shape of `x`; `mask [B, 1, 1, N]` is False for padding."""
        h = nn.LayerNorm(dtype=jnp.dtype(self.config.dtype))(x)
        x = x + attention(self.config)(h, h, mask=mask)
        return MLP(self.config.width, self.config.dtype)(x)


def attention(config: PerceiverConfig, name: str | None = None) -> nn.MultiHeadDotProductAttention:
    """Returns multi-head attention with the sizes of the config."""
    return nn.MultiHeadDotProductAttention(
        config.num_heads, qkv_features=config.width, dtype=jnp.dtype(config.dtype), name=name
    )


BACKBONE = Backbone(
    config=PerceiverConfig,
    init=init,
    apply=apply,
    tokenize=word_hashing.tokenize_for,
    check_instructions=word_hashing.check_collisions_for,
    image_spec=image_spec,
    example=example,
    sharding_rules=(
        ("*/embedding", PartitionSpec(None, "fsdp")),
        ("*/out/kernel", PartitionSpec("tensor", None, "fsdp")),  # [M, E, width]
        ("*/query/kernel", _INTO_HEADS),
        ("*/key/kernel", _INTO_HEADS),
        ("*/value/kernel", _INTO_HEADS),
        ("*/Dense_0/kernel", layers.SPLIT_OUTPUTS),
        ("*/Dense_1/kernel", layers.SPLIT_INPUTS),
        ("*/kernel", PartitionSpec("fsdp")),
    ),
)
