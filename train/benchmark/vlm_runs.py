"""A vision-language backbone against the same model in transformers."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.benchmark import baselines_vlm
from train.benchmark.timing import Comparison, Implementation
from vla_jax.backbones import models, smolvlm
from vla_jax.backbones.sequence import IMAGE
from vla_jax.backbones.smolvlm import SmolVLMConfig
from vla_jax.types import Params


class FrameBatch(NamedTuple):
    """Inputs of one batch of frames."""

    ids: np.ndarray  # [B, S] int32, IMAGE for the features of images
    images: np.ndarray  # [B, C, h, w, 3] uint8
    cotangent: np.ndarray  # [B, S, D], by which the hidden states are multiplied before summing


def backbones(config: SmolVLMConfig, batch_size: int) -> Iterator[Comparison]:
    """Yields the hidden states of frames, and their gradients with respect to all params.

    Args:
      config: of the model.
      batch_size: B, frames with all their cameras' images.
    """
    params, frames = draw(config, batch_size)
    makers = [] if baselines_vlm.why_no_transformers() else [baselines_vlm.run_transformers]
    num_bytes = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    for name, gradients in (("forward", False), ("forward and backward", True)):
        implementations = [
            run_vla_jax(config, params, frames, gradients=gradients, weight_bytes=num_bytes),
            *(
                make(config, params, frames, gradients=gradients, weight_bytes=num_bytes)
                for make in makers
            ),
        ]
        setting = f"{name}, {num_bytes / 4e6:.3g} M params, B {batch_size}, S {frames.ids.shape[1]}"
        flop = (3 if gradients else 1) * forward_flop(config, params, batch_size)
        yield Comparison("backbone", setting, flop, implementations)


def run_vla_jax(
    config: SmolVLMConfig, params: Params, frames: FrameBatch, *, gradients: bool, weight_bytes: int
) -> Implementation:
    """Returns our implementation; see `backbones`."""

    def forward(params: Params, ids: jax.Array, images: jax.Array) -> jax.Array:
        return smolvlm.hidden_states(params, config, ids, images)

    @jax.jit
    def compute(params: Params, ids: jax.Array, images: jax.Array, cotangent: jax.Array) -> Any:
        if not gradients:
            return {"hidden": forward(params, ids, images)}
        hidden, pull = jax.vjp(lambda params: forward(params, ids, images), params)
        return {"hidden": hidden, "grads": pull(cotangent)[0]}

    inputs = jax.device_put((params, *frames))
    return Implementation("vla_jax", lambda: compute(*inputs), jax.device_get, weight_bytes)


def draw(config: SmolVLMConfig, batch_size: int) -> tuple[Params, FrameBatch]:
    """Returns random params, and frames whose sequences are images followed by text."""
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: jnp.asarray(0.05 * random.normal(size=shape), jnp.float32),
        models.get(config).shapes(config),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    num_cameras, num_text = len(config.options.cameras), config.options.max_text_tokens
    ids = random.integers(0, config.image_token_id, (batch_size, num_text))
    places = np.full((batch_size, num_cameras * config.tokens_per_image), IMAGE)
    ids = np.concatenate([places, ids], axis=1).astype(np.int32)
    shape = (batch_size, num_cameras, *config.image_shape, 3)
    cotangent = random.normal(size=(*ids.shape, config.token_dim)).astype(np.float32)
    return params, FrameBatch(ids, random.integers(0, 256, shape, np.uint8), cotangent)


def forward_flop(config: SmolVLMConfig, params: Params, batch_size: int) -> float:
    """Returns the floating-point operations of the matrix products with weights."""
    num_images = batch_size * len(config.options.cameras)
    num_patches, num_tokens = config.vision.grid_size**2, config.tokens_per_image
    sequence = batch_size * (config.sequence_length - config.options.num_learned)

    def size(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    vision = size(params["vision"]["layers"]) + size(params["vision"]["patches"])
    projection = num_images * num_tokens * size(params["projection"])
    language = sequence * size(params["language"]["layers"])
    return 2.0 * (num_images * num_patches * vision + projection + language)
