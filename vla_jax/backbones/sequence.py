"""The sequence of a step for a vision-language model: prompt, images, learned tokens, readout.

A sequence is ids `[S]` int32: token ids in [0, V), `IMAGE` where a feature of an image stands,
V + k for learned token k, and `PADDING`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce

from vla_jax.backbones.vlm_options import VLMOptions
from vla_jax.types import Array, Tokens

PADDING, IMAGE = -1, -2


def arrange(ids: Sequence[int], options: VLMOptions, *, vocab_size: int, length: int) -> np.ndarray:
    """Returns the padded sequence of a prompt, with the learned tokens in their place.

    Args:
      ids: of the prompt, with `IMAGE` for every feature of an image.
      options: readout and layout.
      vocab_size: V.
      length: S.

    Returns:
      `[S]` int32.

    Raises:
      ValueError: the prompt is too long.
    """
    learned = [vocab_size + k for k in range(options.num_learned)]
    room = length - len(learned)
    if len(ids) > room:
        num_images = sum(i == IMAGE for i in ids)
        raise ValueError(
            f"the prompt has {len(ids) - num_images} tokens, but max_text_tokens is "
            f"{options.max_text_tokens}; raise max_text_tokens, or shorten the instruction."
        )
    padding = [PADDING] * (room - len(ids))
    sequence = {
        "native": [*ids, *learned, *padding],
        "robovlms": [*ids[:-1], *learned, *ids[-1:], *padding],
        "robovlms_padded": [*[*ids, *padding][:-1], *learned, *[*ids, *padding][-1:]],
    }[options.layout]
    return np.asarray(sequence, np.int32)


def mark_images(ids: Sequence[int], image_id: int) -> list[int]:
    """Returns the ids of a prompt with `IMAGE` instead of the model's own placeholder."""
    return [IMAGE if token == image_id else token for token in ids]


def place(
    text: jax.Array, ids: Array, images: Array, *, vocab_size: int, learned: Array | None = None
) -> jax.Array:
    """Returns the embeddings of a sequence: those of its text, images and learned tokens.

    Args:
      text: embeddings `[B, S, D]` of the ids; arbitrary where an id is not a token's.
      ids: `[B, S]`.
      images: features `[B, N, D]`, in the order of the `IMAGE` places.
      vocab_size: V.
      learned: embeddings `[K, D]` of the learned tokens; None if there are none.

    Returns:
      `[B, S, D]`.
    """
    is_image = ids == IMAGE
    number = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, images.shape[1] - 1)
    at_place = jnp.take_along_axis(jnp.asarray(images), number[..., None], axis=1)
    embeddings = jnp.where(is_image[..., None], at_place.astype(text.dtype), text)
    if learned is None:
        return embeddings
    learned = jnp.asarray(learned)
    rows = learned[jnp.clip(ids - vocab_size, 0, len(learned) - 1)]
    return jnp.where((ids >= vocab_size)[..., None], rows.astype(text.dtype), embeddings)


def hide_cameras(ids: Array, images: Array, real: Array) -> tuple[jax.Array, jax.Array]:
    """Returns sequence and images in which the tokens of missing cameras are padding.

    Args:
      ids: `[B, S]`.
      images: `[B, C, h, w, 3]`.
      real: `[B, C]` bool, False where a camera has no image.

    Returns:
      ids `[B, S]`, and images with those of missing cameras last, as `place` counts them.
    """
    is_image = ids == IMAGE
    number = jnp.cumsum(is_image, axis=1) - 1
    tokens_per_image = jnp.sum(is_image, axis=1, keepdims=True) // real.shape[1]
    camera = jnp.clip(number // jnp.maximum(tokens_per_image, 1), 0, real.shape[1] - 1)
    hidden = is_image & ~jnp.take_along_axis(real, camera, axis=1)
    order = jnp.argsort(~real, axis=1, stable=True)
    moved = jnp.take_along_axis(images, order[..., None, None, None], axis=1)
    return jnp.where(hidden, PADDING, ids), moved


def mask_cameras(tokens: Tokens, real: Array, options: VLMOptions) -> Tokens:
    """Returns the tokens of `read_out` with those of missing cameras masked and set to 0.

    Args:
      tokens: `[B, N, D]`, read out of the sequence before its cameras were hidden.
      real: `[B, C]` bool.
      options: readout.
    """
    if options.readout not in ("image", "image_mean"):
        return tokens
    mask = tokens.mask & jnp.repeat(real, tokens.mask.shape[1] // real.shape[1], axis=1)
    return Tokens(jnp.where(mask[..., None], tokens.tokens, 0.0), mask)


def read_out(hidden: jax.Array, ids: Array, config: Any) -> Tokens:
    """Returns the tokens of a step: the hidden states that `config.options.readout` chooses.

    Args:
      hidden: hidden states `[B, S, D]`.
      ids: `[B, S]`.
      config: of the model.

    Returns:
      Tokens `[B, N, D]` float32, mask `[B, N]`; masked tokens are 0.
    """
    options, count = config.options, num_tokens(config)
    is_learned = ids >= config.language.vocab_size
    is_text = (ids >= 0) & ~is_learned
    position = jnp.arange(ids.shape[1])[None]
    chosen = {
        "action_token": is_learned,
        "image": ids == IMAGE,
        "image_mean": ids == IMAGE,
        "text": is_text,
        "last": position == jnp.max(jnp.where(ids != PADDING, position, 0), 1, keepdims=True),
        "all": ids != PADDING,
    }[options.readout]
    if options.readout == "image_mean":
        tokens = _select(hidden, chosen, count * config.tokens_per_image)
        means = reduce(tokens.tokens, "B (C N) D -> B C D", "mean", C=count)
        return Tokens(means, jnp.ones(means.shape[:-1], bool))
    return _select(hidden, chosen, count)


def num_tokens(config: Any) -> int:
    """Returns the tokens per step of `read_out`."""
    options = config.options
    num_images = len(options.cameras) * config.tokens_per_image
    return {
        "action_token": options.num_action_tokens,
        "image": num_images,
        "image_mean": len(options.cameras),
        "text": options.max_text_tokens,
        "last": 1,
        "all": num_images + options.max_text_tokens,
    }[options.readout]


def _select(hidden: jax.Array, chosen: jax.Array, count: int) -> Tokens:
    """Returns the first `count` chosen positions of each row, in order."""
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :count]
    mask = jnp.take_along_axis(chosen, order, axis=1)
    tokens = jnp.take_along_axis(hidden, order[..., None], axis=1)
    return Tokens(jnp.where(mask[..., None], tokens, 0.0), mask)


def positions(ids: Array, options: VLMOptions) -> jax.Array:
    """Returns the position `[B, S]` of every token of sequences `[B, S]`, from 0."""
    real = jnp.asarray(ids) != PADDING
    # RoboVLMs passes embeddings, so that the original counts padding too.
    counts = jnp.ones_like(real) if options.layout == "robovlms_padded" else real
    return jnp.cumsum(counts, axis=1) - 1


def causal_mask(real: Array) -> jax.Array:
    """Returns the mask `[B, T, T]` of causal attention to real tokens, bool `[B, T]`."""
    return jnp.tri(real.shape[1], dtype=bool)[None] & jnp.asarray(real)[:, None, :]


def scatter(embeddings: jax.Array, is_image: np.ndarray, features: Array) -> jax.Array:
    """Returns the embeddings with features at the places of images, in order over the whole batch.

    Args:
      embeddings: `[B, T, D]`.
      is_image: bool `[B, T]`.
      features: `[..., D]`, as many as there are places.

    Raises:
      ValueError: the numbers of places and features differ.
    """
    flat = jnp.asarray(features).reshape(-1, embeddings.shape[-1])
    if is_image.sum() != len(flat):
        raise ValueError(
            f"input_ids must have one image token for each of the {len(flat)} image features, got "
            f"{is_image.sum()}; check the images and the prompt."
        )
    return embeddings.at[np.nonzero(is_image)].set(flat)
