"""The steps of a window as one causal sequence of a vision-language model, history "window".

The sequences of the steps are concatenated in time. The learned tokens of every step are read out,
so that one pass gives the tokens of all steps, each from the steps up to it.

Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), history "pre" ("interleaved").
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from vla_jax.backbones.sequence import PADDING
from vla_jax.types import Array


class EmbeddedStep(NamedTuple):
    """The part of a step that does not depend on other steps."""

    embeddings: Array  # [..., S, D]
    ids: Array  # [..., S]
    proprio: Array | None  # [..., P]
    present: Array | None  # [...] bool, False where there is no proprio; None without `proprio`


class WindowSequence(NamedTuple):
    """The sequences of W steps as one."""

    embeddings: jax.Array  # [B, W·S, D]
    positions: jax.Array  # [B, W·S] int32, from 0 at the first step that is visible
    mask: jax.Array  # bool [B, W·S, W·S], True where a query attends to a key


def concatenate(steps: EmbeddedStep, visible: Array, *, count_padding: bool) -> WindowSequence:
    """Returns the sequence of a window.

    Args:
      steps: `[B, W, ...]`.
      visible: bool `[B, W, W]`, True where a step may see another.
      count_padding: padding takes a position, as in RoboVLMs' training.
    """
    ids = rearrange(jnp.asarray(steps.ids), "B W S -> B (W S)")
    length = jnp.shape(steps.ids)[-1]
    seen = repeat(jnp.asarray(visible), "B W V -> B (W s) (V t)", s=length, t=length)
    seen = seen & jnp.tri(ids.shape[1], dtype=bool)[None]
    mask = seen & (ids != PADDING)[:, None, :]
    counted = seen if count_padding else mask
    positions = jnp.maximum(jnp.sum(counted, axis=-1) - 1, 0)
    embeddings = rearrange(jnp.asarray(steps.embeddings), "B W S D -> B (W S) D")
    return WindowSequence(embeddings, positions, mask)


def split(hidden: jax.Array, steps: EmbeddedStep) -> tuple[jax.Array, Any]:
    """Returns hidden states `[B, W·S, D]` as `[B·W, S, D]`, and the ids `[B·W, S]`."""
    ids = rearrange(jnp.asarray(steps.ids), "B W S -> (B W) S")
    return rearrange(hidden, "B (W S) D -> (B W) S D", S=ids.shape[1]), ids
