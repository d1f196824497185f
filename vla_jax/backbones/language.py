"""Instruction encoder: the sum of its word embeddings as one token."""

import flax.linen as nn
import jax.numpy as jnp
from einops import repeat

from vla_jax.types import Array


class Words(nn.Module):
    """Maps word ids `[..., S]` to `[..., D]`; an empty instruction gives a learned vector.

    A word id of 0 is padding. The sum is divided by the square root of the number of words.
    """

    vocab_size: int
    max_words: int
    token_dim: int
    dtype: str

    @nn.compact
    def __call__(self, instruction: Array) -> Array:
        """Embeds words, adds their position embeddings, applies a dense layer, and sums."""
        embed = nn.Embed(self.vocab_size, self.token_dim, dtype=jnp.dtype(self.dtype), name="embed")
        place = self.param("place", nn.initializers.normal(1.0), (self.max_words, self.token_dim))
        silence = self.param("silence", nn.initializers.normal(1.0), (self.token_dim,))
        is_word = (instruction > 0)[..., None]
        words = embed(instruction) * self.token_dim**0.5
        words = words + place.astype(words.dtype).reshape(
            *(1,) * (instruction.ndim - 1), *place.shape
        )
        words = jnp.tanh(nn.Dense(self.token_dim, dtype=jnp.dtype(self.dtype), name="mix")(words))
        count = is_word.sum(-2)
        total = (words * is_word).sum(-2) / jnp.sqrt(jnp.maximum(count, 1))
        silence = repeat(silence, "D -> B D", B=instruction.shape[0]).astype(total.dtype)
        return jnp.where(count > 0, total, silence)
