"""A small vision-language encoder that trains from scratch on a laptop.

Both cameras are cut into patches; dense layers read each patch; a few learned latents look at all
patches by cross-attention and then at each other and the robot's own state. On a CPU this is
several times faster than convolutions, since everything is a matrix product.

Source: the latents are Jaegle et al. 2021, "Perceiver" (arXiv:2103.03206), §3.1; Alayrac et al.
2022, "Flamingo" (arXiv:2204.14198), use them as a resampler between vision and language.
"""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from vla_jax.backbones.language import Words
from vla_jax.backbones.parts import flatten
from vla_jax.types import Array, Key, Observation, Params


@dataclass(frozen=True)
class PerceiverConfig:
    """Sizes; the tokens are `num_latents` of vision, then one of proprio, one of language."""

    kind: Literal["perceiver"] = "perceiver"
    image_size: int = 64  # pixels, both cameras
    patch_size: int = 8  # pixels; patches overlap by half where `overlap` is on
    overlap: bool = True  # each patch is read with half of its neighbours
    width: int = 64  # features of a patch and a latent, inside
    num_heads: int = 4  # attention heads
    num_latents: int = 8  # visual tokens
    token_dim: int = (
        16  # D, features of a token; few of them make a decoder learn from few episodes
    )
    patch_layers: int = 0  # self-attention layers over the patches (a ViT), slow on a CPU
    latent_layers: int = 1  # self-attention layers over the latents
    proprio_dim: int = 8  # P, numbers of the robot's own state
    vocab_size: int = 2048  # word ids lie in [0, vocab_size)
    max_words: int = 12  # S, words of an instruction
    dtype: str = "float32"  # of the computation; params are float32

    def __post_init__(self):
        """Checks that the pictures can be cut."""
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
    """Random params; `key` is consumed."""
    size = config.image_size
    blank = {
        "image_primary": jnp.zeros((1, size, size, 3), jnp.uint8),
        "image_wrist": jnp.zeros((1, size, size, 3), jnp.uint8),
        "proprio": jnp.zeros((1, config.proprio_dim)),
        "instruction": jnp.zeros((1, config.max_words), jnp.int32),
    }
    return dict(Perceiver(config).init(key, blank)["params"])


def apply(params: Params, config: PerceiverConfig, observation: Observation) -> jax.Array:
    """Tokens of each observation, on its own; time is the decoder's business.

    Args:
      params: from `init`.
      config: the same.
      observation: `image_primary`, `image_wrist` uint8 `[..., h, w, 3]`, `proprio [..., P]`,
        `instruction [..., S]`, with any leading axes.

    Returns:
      Tokens `[..., N, D]` float32.

    Raises:
      ValueError: a part is missing or has another size.
    """
    picture = (config.image_size, config.image_size, 3)
    shapes = {
        "image_primary": picture,
        "image_wrist": picture,
        "proprio": (config.proprio_dim,),
        "instruction": (config.max_words,),
    }
    parts, lead = flatten(observation, shapes)
    tokens: Any = Perceiver(config).apply({"params": params}, parts)
    return tokens.astype(jnp.float32).reshape(*lead, *tokens.shape[1:])


class Perceiver(nn.Module):
    """Linen module behind `init` and `apply`."""

    config: PerceiverConfig

    @nn.compact
    def __call__(self, parts: dict[str, Array]) -> jax.Array:
        """Tokens `[B, N, D]` of the parts of an observation `[B, ...]`."""
        config = self.config
        width, dtype = config.width, jnp.dtype(config.dtype)
        patches = [self.patches(parts[name], name) for name in ("image_primary", "image_wrist")]
        patches = nn.LayerNorm(dtype=dtype)(jnp.concatenate(patches, axis=1))
        latents = self.param("latents", nn.initializers.normal(1.0), (config.num_latents, width))
        latents = repeat(latents, "N D -> B N D", B=patches.shape[0])
        seen = attention(config, "look")(latents.astype(config.dtype), patches)
        own = nn.Dense(width, dtype=dtype, name="proprio")(parts["proprio"])
        tokens = MLP(width, config.dtype)(jnp.concatenate([seen, own[:, None]], axis=1))
        for _ in range(config.latent_layers):
            tokens = Mixer(config)(tokens)
        tokens = nn.LayerNorm(dtype=dtype)(tokens)
        tokens = nn.Dense(config.token_dim, dtype=dtype, name="narrow")(tokens)
        words = Words(
            config.vocab_size, config.max_words, config.token_dim, config.dtype, name="words"
        )
        return jnp.concatenate([tokens, words(parts["instruction"])[:, None]], axis=1)

    def patches(self, image: Array, name: str) -> jax.Array:
        """Features `[B, patches, D]` of one camera's picture."""
        config = self.config
        x = image.astype(config.dtype) / 127.5 - 1
        p = config.patch_size
        if config.overlap:
            # Four shifted grids of patches side by side: one patch of twice the size, stride p.
            margin = p // 2
            x = jnp.pad(x, ((0, 0), (margin, p - margin), (margin, p - margin), (0, 0)), "edge")
        x = rearrange(x, "B (h p) (w q) c -> B h w (p q c)", p=p, q=p)
        if config.overlap:
            x = jnp.concatenate(
                [x[:, :-1, :-1], x[:, 1:, :-1], x[:, :-1, 1:], x[:, 1:, 1:]], axis=-1
            )
        x = rearrange(x, "B h w F -> B (h w) F")
        x = nn.Dense(config.width, dtype=jnp.dtype(config.dtype), name=f"{name}_embed")(x)
        x = x + self.place(x, f"{name}_place_in")
        x = nn.Dense(config.width, dtype=jnp.dtype(config.dtype), name=f"{name}_mix")(nn.gelu(x))
        for _ in range(config.patch_layers):
            x = Mixer(config)(x)
        return x + self.place(x, f"{name}_place_out")

    def place(self, x: jax.Array, name: str) -> jax.Array:
        """Learned position `[1, patches, D]`."""
        return self.param(name, nn.initializers.normal(0.02), (1, *x.shape[1:])).astype(x.dtype)


class MLP(nn.Module):
    """`x + W₂ gelu(W₁ norm(x))`."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Same shape."""
        h = nn.Dense(2 * self.width, dtype=jnp.dtype(self.dtype))(
            nn.LayerNorm(dtype=jnp.dtype(self.dtype))(x)
        )
        return x + nn.Dense(self.width, dtype=jnp.dtype(self.dtype))(nn.gelu(h))


class Mixer(nn.Module):
    """One pre-norm transformer layer."""

    config: PerceiverConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Same shape."""
        h = nn.LayerNorm(dtype=jnp.dtype(self.config.dtype))(x)
        x = x + attention(self.config)(h, h)
        return MLP(self.config.width, self.config.dtype)(x)


def attention(config: PerceiverConfig, name: str | None = None) -> nn.MultiHeadDotProductAttention:
    """Multi-head attention of the config's sizes."""
    return nn.MultiHeadDotProductAttention(
        config.num_heads, qkv_features=config.width, dtype=jnp.dtype(config.dtype), name=name
    )
