"""Vision tower of Qwen3-VL, with tokens of intermediate layers too (DeepStack).

Source: Bai et al. 2025, Qwen3-VL (arXiv:2511.21631); Meng et al. 2024, DeepStack
(arXiv:2406.04334); as in Hugging Face's `Qwen3VLVisionModel`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import model_json, qwen_vision, tensor_names
from vla_jax.backbones.blocks import ACTIVATIONS, Remat, layer_norm, linear, run_tapped_layers
from vla_jax.backbones.qwen_vision import (
    EPSILON,
    Grid,
    ImageFeatures,
    PatchPlaces,
    QwenVisionConfig,
)
from vla_jax.backbones.tensor_names import SAME, Tensor
from vla_jax.config import LEAST_FLOAT, checked
from vla_jax.types import Array, Params


@dataclass(frozen=True)
@checked(rope_theta=(LEAST_FLOAT, 1e12))
class Qwen3VisionConfig(QwenVisionConfig):
    """Sizes of the vision tower of Qwen3-VL; the default is that of the 2B model."""

    num_positions: int = 2304  # position embeddings of a square grid, interpolated for an image
    # layers after which tokens are taken for the first layers of the language model, ascending
    deepstack_layers: tuple[int, ...] = (5, 11, 17)

    def __post_init__(self):
        super().__post_init__()
        if self.num_positions < 1:
            raise ValueError(f"num_positions must be at least 1, got {self.num_positions}.")
        layers = self.deepstack_layers
        if list(layers) != sorted(set(layers)) or not set(layers) <= set(range(self.num_layers)):
            raise ValueError(
                f"deepstack_layers must be ascending numbers of the {self.num_layers} layers, "
                f"counted from 0, got {layers}."
            )


def apply(
    params: Params,
    config: Qwen3VisionConfig,
    patches: jax.Array,
    grids: Sequence[Grid],
    *,
    remat: Remat = "none",
) -> ImageFeatures:
    """Returns the features of images.

    Args:
      params: of `shapes`.
      config: sizes.
      patches: `[I, S, 3·T·p·p]`, those of a token after one another.
      grids: one entry if every `[S]` is an image of this grid; several if it holds images one after
        another.
      remat: see `blocks.run_layers`.

    Returns:
      In the dtype of `patches`.
    """
    places = qwen_vision.patch_places(config, grids)
    angles = qwen_vision.rotary_angles(config, places)
    mask = (places.image[:, None] == places.image)[None]
    activation = ACTIVATIONS[config.activation]

    def layer(x: jax.Array, params: Params) -> jax.Array:
        h = layer_norm(params["norm_1"], x, EPSILON)
        x = x + qwen_vision.attention(params["attention"], config, h, angles, mask)
        h = layer_norm(params["norm_2"], x, EPSILON)
        return x + linear(params["mlp"]["down"], activation(linear(params["mlp"]["up"], h)))

    x = linear(params["patches"], patches)
    embeddings = _position_embeddings(params["positions"]["embedding"], grids, places)
    x = (x + jnp.broadcast_to(embeddings, x.shape)).astype(x.dtype)
    x, tapped = run_tapped_layers(
        layer,
        x,
        params["layers"],
        taps=config.deepstack_layers,
        num_layers=config.num_layers,
        remat=remat,
    )
    x = qwen_vision.group(config, layer_norm(params["merger"]["norm"], x, EPSILON))
    tokens = qwen_vision.project(params["merger"], x)
    if not config.deepstack_layers:
        return ImageFeatures(tokens, jnp.zeros((0, *tokens.shape), tokens.dtype))
    added = jax.vmap(_deepstack)(params["deepstack"], qwen_vision.group(config, tapped))
    return ImageFeatures(tokens, added)


def shapes(config: Qwen3VisionConfig, output_size: int) -> Params:
    """Returns the shapes of the params.

    Args:
      config: sizes.
      output_size: D, features of a token of the language model.
    """
    num_layers, size, wide = config.num_layers, config.hidden_size, config.intermediate_size
    num_taps, grouped = len(config.deepstack_layers), config.merge_size**2 * size
    norm = {"scale": (num_layers, size), "bias": (num_layers, size)}
    deepstack = {
        "norm": {"scale": (num_taps, grouped), "bias": (num_taps, grouped)},
        **qwen_vision.projection_shapes(config, output_size, num_taps),
    }
    return {
        "patches": {**qwen_vision.patch_shapes(config), "bias": (size,)},
        "positions": {"embedding": (config.num_positions, size)},
        "layers": {
            "norm_1": norm,
            "attention": qwen_vision.attention_shapes(config),
            "norm_2": norm,
            "mlp": {
                "up": {"kernel": (num_layers, size, wide), "bias": (num_layers, wide)},
                "down": {"kernel": (num_layers, wide, size), "bias": (num_layers, size)},
            },
        },
        "merger": {
            "norm": {"scale": (size,), "bias": (size,)},
            **qwen_vision.projection_shapes(config, output_size),
        },
        **({"deepstack": deepstack} if num_taps else {}),
    }


def tensors(config: Qwen3VisionConfig, name: str) -> tuple[Tensor, ...]:
    """Returns the tensors of the tower, whose name in the file is `name`."""
    layer, path = f"{name}.blocks.{{}}", "vision/layers"
    deepstack = _merger_tensors("vision/deepstack", f"{name}.deepstack_merger_list.{{}}")
    return tensor_names.join(
        [
            qwen_vision.patch_tensor(config, name),
            Tensor("vision/patches/bias", f"{name}.patch_embed.proj.bias", SAME),
            Tensor("vision/positions/embedding", f"{name}.pos_embed.weight", SAME),
        ],
        tensor_names.norm(f"{path}/norm_1", f"{layer}.norm1", bias=True),
        qwen_vision.attention_tensors(name),
        tensor_names.norm(f"{path}/norm_2", f"{layer}.norm2", bias=True),
        tensor_names.linear(f"{path}/mlp/up", f"{layer}.mlp.linear_fc1", bias=True),
        tensor_names.linear(f"{path}/mlp/down", f"{layer}.mlp.linear_fc2", bias=True),
        _merger_tensors("vision/merger", f"{name}.merger"),
        deepstack if config.deepstack_layers else (),
    )


def from_json(vision: model_json.Json) -> Qwen3VisionConfig:
    """Returns the config of a `vision_config`."""
    return Qwen3VisionConfig(
        **qwen_vision.from_json(vision, _DEFAULTS),
        num_positions=model_json.number(vision, "num_position_embeddings", 2304),
        deepstack_layers=model_json.integers(vision, "deepstack_visual_indexes", (8, 16, 24)),
    )


def to_json(config: Qwen3VisionConfig, output_size: int) -> dict[str, Any]:
    """Returns the `vision_config` of a config."""
    return {
        **qwen_vision.to_json(config, output_size),
        "num_position_embeddings": config.num_positions,
        "deepstack_visual_indexes": list(config.deepstack_layers),
    }


def _deepstack(params: Params, x: jax.Array) -> jax.Array:
    """Returns the tokens `[I, N, D]` that one tapped layer gives, grouped `[I, N, m²·size]`."""
    return qwen_vision.project(params, layer_norm(params["norm"], x, EPSILON))


def _merger_tensors(path: str, name: str) -> tuple[Tensor, ...]:
    return tensor_names.join(
        tensor_names.norm(f"{path}/norm", f"{name}.norm", bias=True),
        tensor_names.linear(f"{path}/hidden", f"{name}.linear_fc1", bias=True),
        tensor_names.linear(f"{path}/output", f"{name}.linear_fc2", bias=True),
    )


def _position_embeddings(table: Array, grids: Sequence[Grid], places: PatchPlaces) -> jax.Array:
    """Returns the position embedding `[S, size]` of each patch, interpolated bilinearly.

    The corners of an image are at the corners of the square grid of the table.

    Args:
      table: `[num_positions, size]`.
      grids: of the images.
      places: of their patches.
    """
    table = jnp.asarray(table)
    side = int(len(table) ** 0.5)
    axes = []
    for axis, index in enumerate((places.row, places.column)):
        last = np.maximum(np.asarray(grids, np.float32)[places.image, axis] - 1, 1)
        place = index.astype(np.float32) * np.float32(side - 1) / last
        floor = np.floor(place)
        nearest = np.minimum(floor.astype(np.int32)[:, None] + np.arange(2), side - 1)
        after = (place - floor)[:, None]
        axes.append((nearest, np.concatenate([1 - after, after], axis=1)))
    (rows, row_weights), (columns, column_weights) = axes
    neighbours = table[rows[:, :, None] * side + columns[:, None, :]]
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    return jnp.sum(neighbours * weights[..., None], axis=(1, 2))


_DEFAULTS = QwenVisionConfig(
    hidden_size=1152, intermediate_size=4304, num_layers=27
)  # of Hugging Face's `Qwen3VLVisionConfig`
