"""Policies whose backbone sees the earlier steps of a window: their tokens, windowed and streamed.

A step's tokens are those that `History.attend` gives it in a window of the last W steps. Streaming
keeps the embedded steps, so that every image is encoded once, and repeats the rest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.backbones.backbone import Backbone, History
from vla_jax.nn.attention import causal_mask
from vla_jax.types import Array, Observation, Params, Tokens


class PastSteps(NamedTuple):
    """The last W embedded steps; the present one comes last."""

    steps: Any  # tree, every leaf [B, W, ...]
    count: jax.Array  # [B] int32, steps of this episode among them


def encode_window(
    history: History,
    params: Params,
    config: Any,
    observation: Observation,
    window_size: int,
    *,
    timestep_mask: Array | None,
    reset: Array | None,
) -> Tokens:
    """Returns the tokens of all steps of a window.

    Args:
      history: of the backbone.
      params: of the backbone.
      config: of the backbone.
      observation: `[B, W, ...]`.
      window_size: greatest W.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.

    Returns:
      Tokens `[B, W, N, D]`, mask `[B, W, N]`.

    Raises:
      ValueError: the window is longer than `window_size`.
    """
    steps = history.embed(params, config, observation)
    shape = jax.tree.leaves(steps)[0].shape[:2]
    if shape[1] > window_size:
        raise ValueError(
            f"windows must have at most window_size = {window_size} steps with history 'window', "
            f"got {shape[1]}; shorten them, or raise window_size."
        )
    mask = jnp.ones(shape, bool) if timestep_mask is None else jnp.asarray(timestep_mask)
    reset = jnp.zeros(shape, bool) if reset is None else jnp.asarray(reset)
    return history.attend(params, config, steps, causal_mask(mask, reset, shape[1]))


def init(
    member: Backbone, history: History, params: Params, config: Any, batch_size: int, window: int
) -> PastSteps:
    """Returns the memory before the first step.

    Args:
      member: the backbone.
      history: of the backbone.
      params: of the backbone.
      config: of the backbone.
      batch_size: B.
      window: W, steps.
    """
    assert member.example is not None
    one = jax.tree.map(
        lambda part: jax.ShapeDtypeStruct((batch_size, window, *part.shape), part.dtype),
        member.example(config),
    )
    shapes = jax.eval_shape(lambda params, seen: history.embed(params, config, seen), params, one)
    steps = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shapes)
    return PastSteps(steps, jnp.zeros(batch_size, jnp.int32))


def step(
    history: History,
    params: Params,
    config: Any,
    past: PastSteps,
    observation: Observation,
    reset: Array | None,
) -> tuple[PastSteps, Tokens]:
    """Returns the memory after a step, and the tokens of this step.

    Args:
      history: of the backbone.
      params: of the backbone.
      config: of the backbone.
      past: from `init` or the step before.
      observation: `[B, ...]`.
      reset: `[B]`, True where a new episode starts with this observation; None means nowhere.

    Returns:
      The memory, and tokens `[B, N, D]`, mask `[B, N]`.
    """
    new = history.embed(params, config, observation)
    steps = jax.tree.map(
        lambda old, part: jnp.concatenate([old[:, 1:], part[:, None].astype(old.dtype)], axis=1),
        past.steps,
        new,
    )
    window = jax.tree.leaves(steps)[0].shape[1]
    count = past.count if reset is None else jnp.where(reset, 0, past.count)
    count = jnp.minimum(count + 1, window)
    real = jnp.arange(window)[None] >= window - count[:, None]
    visible = causal_mask(real, jnp.zeros_like(real), window)
    tokens = history.attend(params, config, steps, visible)
    return PastSteps(steps, count), Tokens(*(part[:, -1] for part in tokens))
