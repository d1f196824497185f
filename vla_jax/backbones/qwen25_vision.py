"""Vision tower of Qwen2.5-VL, with attention in windows in most layers.

Source: Bai et al. 2025 (arXiv:2502.13923), section 2.1; as in Hugging Face's
`Qwen2_5_VisionTransformerPretrainedModel`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import model_json, qwen_vision, tensor_names
from vla_jax.backbones.blocks import ACTIVATIONS, Remat, linear, rms_norm, run_layers
from vla_jax.backbones.qwen_vision import EPSILON, Grid, PatchPlaces, QwenVisionConfig
from vla_jax.backbones.tensor_names import Tensor
from vla_jax.config import LEAST_FLOAT, MAX_SIZE, checked
from vla_jax.types import Params


@dataclass(frozen=True)
@checked(intermediate_size=(1, MAX_SIZE), num_layers=(1, 10_000), rope_theta=(LEAST_FLOAT, 1e12))
class Qwen25VisionConfig(QwenVisionConfig):
    """Sizes of the vision tower of Qwen2.5-VL; the default is that of the 3B and 7B models."""

    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_layers: int = 32
    patch_size: int = 14
    activation: str = "silu"
    window_size: int = 112  # height and width of the windows of attention, pixels
    full_layers: tuple[int, ...] = (7, 15, 23, 31)  # layers whose attention spans the whole image

    def __post_init__(self):
        super().__post_init__()
        if self.window_size < self.factor:
            raise ValueError(
                f"window_size must be at least patch_size · merge_size {self.factor}, got "
                f"{self.window_size}."
            )


def apply(
    params: Params,
    config: Qwen25VisionConfig,
    patches: jax.Array,
    grids: Sequence[Grid],
    *,
    remat: Remat = "none",
) -> jax.Array:
    """Returns the tokens of images.

    Args:
      params: of `shapes`.
      config: sizes.
      patches: `[I, S, 3·T·p·p]`, those of a token after one another.
      grids: one entry if every `[S]` is an image of this grid; several if it holds images one after
        another.
      remat: see `blocks.run_layers`.

    Returns:
      `[I, N, D]` in the dtype of `patches`, N tokens for S patches.
    """
    places = qwen_vision.patch_places(config, grids)
    angles = qwen_vision.rotary_angles(config, places)
    image = jnp.asarray(places.image[:, None] == places.image)[None]
    window = jnp.asarray(_same_window(config, places))[None]
    activation = ACTIVATIONS[config.activation]

    def layer(x: jax.Array, arrays: tuple[Params, jax.Array]) -> jax.Array:
        params, is_full = arrays
        h = rms_norm(params["norm_1"], x, EPSILON)
        mask = image & (window | is_full)
        x = x + qwen_vision.attention(params["attention"], config, h, angles, mask)
        h, mlp = rms_norm(params["norm_2"], x, EPSILON), params["mlp"]
        return x + linear(mlp["down"], activation(linear(mlp["gate"], h)) * linear(mlp["up"], h))

    is_full = np.isin(np.arange(config.num_layers), config.full_layers)
    x = linear(params["patches"], patches)
    x = run_layers(layer, x, (params["layers"], is_full), remat=remat)
    x = qwen_vision.group(config, rms_norm(params["merger"]["norm"], x, EPSILON))
    return qwen_vision.project(params["merger"], x)


def shapes(config: Qwen25VisionConfig, output_size: int) -> Params:
    """Returns the shapes of the params.

    Args:
      config: sizes.
      output_size: D, features of a token of the language model.
    """
    num_layers, size, wide = config.num_layers, config.hidden_size, config.intermediate_size
    widen = {"kernel": (num_layers, size, wide), "bias": (num_layers, wide)}
    return {
        "patches": qwen_vision.patch_shapes(config),
        "layers": {
            "norm_1": {"scale": (num_layers, size)},
            "attention": qwen_vision.attention_shapes(config),
            "norm_2": {"scale": (num_layers, size)},
            "mlp": {
                "gate": widen,
                "up": widen,
                "down": {"kernel": (num_layers, wide, size), "bias": (num_layers, size)},
            },
        },
        "merger": {
            "norm": {"scale": (size,)},
            **qwen_vision.projection_shapes(config, output_size),
        },
    }


def tensors(config: Qwen25VisionConfig, name: str) -> tuple[Tensor, ...]:
    """Returns the tensors of the tower, whose name in the file is `name`."""
    layer, path = f"{name}.blocks.{{}}", "vision/layers"
    return tensor_names.join(
        [qwen_vision.patch_tensor(config, name)],
        tensor_names.norm(f"{path}/norm_1", f"{layer}.norm1", bias=False),
        qwen_vision.attention_tensors(name),
        tensor_names.norm(f"{path}/norm_2", f"{layer}.norm2", bias=False),
        *(
            tensor_names.linear(f"{path}/mlp/{ours}", f"{layer}.mlp.{ours}_proj", bias=True)
            for ours in ("gate", "up", "down")
        ),
        tensor_names.norm("vision/merger/norm", f"{name}.merger.ln_q", bias=False),
        tensor_names.linear("vision/merger/hidden", f"{name}.merger.mlp.0", bias=True),
        tensor_names.linear("vision/merger/output", f"{name}.merger.mlp.2", bias=True),
    )


def from_json(vision: model_json.Json) -> Qwen25VisionConfig:
    """Returns the config of a `vision_config`."""
    return Qwen25VisionConfig(
        **qwen_vision.from_json(vision, _DEFAULTS),
        window_size=model_json.number(vision, "window_size", 112),
        full_layers=model_json.integers(vision, "fullatt_block_indexes", (7, 15, 23, 31)),
    )


def to_json(config: Qwen25VisionConfig, output_size: int) -> dict[str, Any]:
    """Returns the `vision_config` of a config."""
    return {
        **qwen_vision.to_json(config, output_size),
        "window_size": config.window_size,
        "fullatt_block_indexes": list(config.full_layers),
    }


def _same_window(config: Qwen25VisionConfig, places: PatchPlaces) -> np.ndarray:
    """Returns which patches are in the same window, bool `[S, S]`; those at the edges are cut."""
    side = config.window_size // config.factor * config.merge_size
    row, column = places.row // side, places.column // side
    return (row[:, None] == row) & (column[:, None] == column)


_DEFAULTS = Qwen25VisionConfig(hidden_size=3584)  # of `Qwen2_5_VLVisionConfig`
