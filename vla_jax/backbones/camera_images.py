"""Images of all cameras as one batch for a vision tower, and back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from vla_jax.backbones import preprocess, sequence
from vla_jax.backbones.image_settings import Preprocessing
from vla_jax.types import Array, Params


def pixels(images: Array, settings: Preprocessing) -> jax.Array:
    """Returns normalised images `[B·C, h, w, 3]` of all cameras, uint8 `[B, C, h, w, 3]`."""
    flat = rearrange(jnp.asarray(images), "B C h w c -> (B C) h w c")
    return jnp.asarray(preprocess.normalize(flat, settings.mean, settings.std))


def embed(
    params: Params,
    config: Any,
    ids: Array,
    images: Array,
    *,
    text: jax.Array,
    encode: Callable[[jax.Array], jax.Array],
    learned_scale: float = 1.0,
) -> jax.Array:
    """Returns the embeddings of sequences with their images and learned tokens.

    Args:
      params: of the model.
      config: of the model.
      ids: `[B, S]`.
      images: uint8 `[B, C, h, w, 3]`.
      text: embeddings `[B, S, D]` of the ids.
      encode: from normalised images `[I, h, w, 3]` to tokens `[I, N, D]`.
      learned_scale: factor of the learned tokens.

    Returns:
      `[B, S, D]`.
    """
    tokens = map_images(encode, pixels(images, config.images), config)
    learned = params.get("action_token")
    return sequence.place(
        text,
        ids,
        unfold_cameras(tokens, ids.shape[0]),
        vocab_size=config.language.vocab_size,
        learned=None if learned is None else learned_scale * learned,
    )


def map_images(encode: Callable[[jax.Array], Any], images: jax.Array, config: Any) -> Any:
    """Returns `encode(images)`, computed for `options.images_per_pass` images at a time.

    Args:
      encode: from images `[I, ...]` to arrays `[I, ...]`, each independent of the other images.
      images: `[I, ...]`.
      config: of the model.
    """
    num_images, size = images.shape[0], config.options.images_per_pass
    if not 0 < size < num_images:
        return encode(images)
    num_passes = -(-num_images // size)
    missing = -num_images % num_passes
    padded = jnp.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1))
    # Pass p takes every num_passes-th image, so that an axis split over devices stays split.
    passes = rearrange(padded, "(I p) ... -> p I ...", p=num_passes)
    encoded = jax.lax.map(jax.checkpoint(encode), passes)
    return jax.tree.map(lambda x: rearrange(x, "p I ... -> (I p) ...")[:num_images], encoded)


def unfold_cameras(features: jax.Array, batch_size: int) -> jax.Array:
    """Returns the features of all images `[B·C, N, D]` as `[B, C·N, D]`."""
    return rearrange(features, "(B C) N D -> B (C N) D", B=batch_size)
