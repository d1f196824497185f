"""Rotary positions of text and images in three dimensions (M-RoPE): time, row, column.

Source: Wang et al. 2024, Qwen2-VL (arXiv:2409.12191), section 2.1; Bai et al. 2025, Qwen3-VL
(arXiv:2511.21631); as in Hugging Face's models.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import rotary_decoder
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.types import Array


def positions(mask: Array, is_image: Array, grids: Sequence[tuple[int, int]]) -> jax.Array:
    """Returns the position of every token in the three dimensions.

    A token of text is one step after the token before it, in every dimension. All tokens of an
    image have the time of its first token, and their row and column are added to it; the token
    after an image is at the longer side of the image from there.

    Args:
      mask: bool `[B, T]`, True where a token is real.
      is_image: bool `[B, T]`, True where a token is one of an image.
      grids: rows and columns of tokens of an image: one entry for all images, or one for each of
        them, in their order over the whole batch; () if there are none.

    Returns:
      int32 `[3, B, T]`, arbitrary where `mask` is False.
    """
    mask, is_image = jnp.asarray(mask), jnp.asarray(is_image)
    advance = mask.astype(jnp.int32)
    inside = jnp.zeros((*mask.shape, 3), jnp.int32)
    if grids:
        tables = [_in_image(*grid) for grid in grids]
        table = np.concatenate([table for table, _ in tables])
        number = jnp.cumsum(is_image, axis=1) - 1
        if len(grids) > 1:
            counts = is_image.sum(1)
            number = number + (jnp.cumsum(counts) - counts)[:, None]
        number = number % len(table)
        steps = np.concatenate([step for _, step in tables])
        advance = jnp.where(is_image, jnp.asarray(steps)[number], advance)
        inside = jnp.where(is_image[..., None], jnp.asarray(table)[number], inside)
    start = jnp.cumsum(advance, axis=1) - advance
    return jnp.moveaxis(start[..., None] + inside, -1, 0)


def blocks(sections: Sequence[int]) -> np.ndarray:
    """Returns the dimension `[E/2]` of each rotary frequency: one block for each (Qwen2.5-VL).

    Args:
      sections: frequencies for time, row and column, whose sum is E/2.
    """
    return np.repeat(np.arange(3), sections)


def interleaved(sections: Sequence[int], num_frequencies: int) -> np.ndarray:
    """Returns the dimension `[E/2]` of each rotary frequency: in turns (Qwen3-VL).

    Every dimension thus has high and low frequencies. What rows and columns leave is for time.

    Args:
      sections: frequencies for time, row and column.
      num_frequencies: E/2.
    """
    dimensions = np.zeros(num_frequencies, np.int32)
    for dimension in (1, 2):
        dimensions[dimension : 3 * sections[dimension] : 3] = dimension
    return dimensions


def rotary_angles(
    config: RotaryDecoderConfig, positions: Array, dimensions: np.ndarray
) -> jax.Array:
    """Returns the rotary angles `[B, T, E/2]` rad.

    Args:
      config: of the language model.
      positions: `[3, B, T]`.
      dimensions: `[E/2]`, from `blocks` or `interleaved`.
    """
    time, row, column = rotary_decoder.rotary_angles(config, positions)
    dimensions = dimensions[None, None]
    return jnp.where(dimensions == 0, time, jnp.where(dimensions == 1, row, column))


def _in_image(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(0, row, column)` and the advance of each token of an image, `[N, 3]`, `[N]`."""
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), columns)
    advance = np.zeros_like(row)
    advance[-1] = max(rows, columns)
    return np.stack([np.zeros_like(row), row, column], axis=-1), advance
