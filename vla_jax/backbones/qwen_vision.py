"""Parts that the vision towers of Qwen3-VL and Qwen2.5-VL share.

An image is a grid of patches. Those of m × m neighbours follow one another and are merged into one
token. Images of different grids may lie one after another in one array; a patch sees only those of
its own image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vla_jax.backbones import blocks, model_json, preprocess, tensor_names
from vla_jax.backbones.blocks import check_activation, linear, split_heads
from vla_jax.backbones.image_settings import PatchSettings
from vla_jax.backbones.tensor_names import Tensor
from vla_jax.config import LEAST_FLOAT, checked
from vla_jax.nn.rotary import grouped_attention, rotate
from vla_jax.types import Array, Params

EPSILON = 1e-6  # added to the variance, or mean square, in the norms of the towers
Grid = tuple[int, int]  # rows and columns of patches of an image


@dataclass(frozen=True)
@checked(rope_theta=(LEAST_FLOAT, 1e12), merge_size=(0, 1024), num_frames=(0, 1024))
class QwenVisionConfig:
    """Sizes that both vision towers have."""

    hidden_size: int = 1024  # features of a patch
    intermediate_size: int = 4096  # hidden units of the MLPs
    num_layers: int = 24  # number of transformer layers
    num_heads: int = 16  # number of attention heads
    patch_size: int = 16  # height and width of a patch, pixels
    merge_size: int = 2  # patches along each side that are merged into one token
    num_frames: int = 2  # frames of a patch; an image is repeated
    activation: str = "gelu_pytorch_tanh"  # of the MLPs, by Hugging Face's name
    rope_theta: float = 10_000.0  # base of the wavelengths of the rotary positions

    def __post_init__(self):
        check_activation(self.activation)
        for name in ("hidden_size", "num_heads", "patch_size", "merge_size", "num_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 4 · num_heads {4 * self.num_heads}, got "
                f"{self.hidden_size}."
            )

    @property
    def factor(self) -> int:
        """Divisor of the height and width of an image, pixels."""
        return self.patch_size * self.merge_size


class ImageFeatures(NamedTuple):
    """Features of images for the language model; N tokens per image."""

    tokens: jax.Array  # [I, N, D], in the places of the images
    added: jax.Array  # [J, I, N, D], added there after each of the first J layers; J may be 0


class PatchPlaces(NamedTuple):
    """Places of the patches of images that lie one after another."""

    image: np.ndarray  # [S], number of the image
    row: np.ndarray  # [S], inside the image
    column: np.ndarray  # [S], inside the image


def patch_places(config: QwenVisionConfig, grids: Sequence[Grid]) -> PatchPlaces:
    """Returns the places of all patches, those of a merged token after one another."""
    m = config.merge_size
    places = []
    for number, grid in enumerate(grids):
        row, column = (rearrange(x, "(i m) (j n) -> (i j m n)", m=m, n=m) for x in np.indices(grid))
        places.append((np.full_like(row, number), row, column))
    return PatchPlaces(*(np.concatenate(parts) for parts in zip(*places, strict=True)))


def patches(config: QwenVisionConfig, pixels: jax.Array) -> jax.Array:
    """Returns the patches `[I, S, 3·T·p·p]` of normalised images `[I, h, w, 3]`."""
    settings = PatchSettings(
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        temporal_patch_size=config.num_frames,
    )
    return preprocess.patchify(pixels, settings)


def read_grids(config: QwenVisionConfig, image_grid_thw: Array, num_patches: int) -> list[Grid]:
    """Returns the grids of the images.

    Args:
      config: sizes.
      image_grid_thw: `[I, 3]`, frames, rows and columns of patches.
      num_patches: rows of `pixel_values`.

    Raises:
      ValueError: an image has several frames, or the number of patches differs.
    """
    frames, rows, columns = np.asarray(image_grid_thw).T
    if (frames != 1).any():
        raise ValueError(
            f"image_grid_thw must have 1 frame for each image, got {frames.max()}; videos are not "
            "supported."
        )
    if ((rows % config.merge_size) | (columns % config.merge_size)).any():
        raise ValueError(
            f"image_grid_thw must have multiples of {config.merge_size} rows and columns, got "
            f"{np.asarray(image_grid_thw).tolist()}."
        )
    if (rows * columns).sum() != num_patches:
        raise ValueError(
            f"pixel_values must have the {(rows * columns).sum()} rows that image_grid_thw "
            f"describes, got {num_patches}."
        )
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def token_grids(config: QwenVisionConfig, grids: Sequence[Grid]) -> list[tuple[int, int]]:
    """Returns rows and columns of tokens, after merging."""
    return [(rows // config.merge_size, columns // config.merge_size) for rows, columns in grids]


def rotary_angles(config: QwenVisionConfig, places: PatchPlaces) -> jax.Array:
    """Returns the rotary angles `[1, S, E/2]` rad: the row's, then the column's."""
    size = config.hidden_size // config.num_heads // 2
    frequencies = 1.0 / config.rope_theta ** (np.arange(0, size, 2, dtype=np.float32) / size)
    angles = np.stack([places.row, places.column])[..., None].astype(np.float32) * frequencies
    return jnp.asarray(np.concatenate(angles, axis=-1))[None]


def attention(
    params: Params, config: QwenVisionConfig, x: jax.Array, angles: jax.Array, mask: Array
) -> jax.Array:
    """Returns the outputs `[I, S, D]` of self-attention.

    Args:
      params: `qkv` and `out`.
      config: sizes.
      x: normalised, `[I, S, D]`.
      angles: `[1, S, E/2]`, from `rotary_angles`.
      mask: bool `[1, S, S]`, True where a query attends to a key.
    """
    parts = jnp.split(linear(params["qkv"], x), 3, axis=-1)
    query, key, value = (split_heads(part, config.num_heads) for part in parts)
    scale = (config.hidden_size // config.num_heads) ** -0.5
    query, key = rotate(query, angles), rotate(key, angles)
    return linear(params["out"], grouped_attention(query, key, value, mask, scale=scale))


def group(config: QwenVisionConfig, x: jax.Array) -> jax.Array:
    """Returns the patches `[..., S, D]` of every token side by side, `[..., N, m²·D]`."""
    return rearrange(x, "... (N m) D -> ... N (m D)", m=config.merge_size**2)


def project(params: Params, x: jax.Array) -> jax.Array:
    """Returns tokens for the language model `[..., N, D]` from those of `group`."""
    return linear(params["output"], blocks.ACTIVATIONS["gelu"](linear(params["hidden"], x)))


def patch_shapes(config: QwenVisionConfig) -> Params:
    """Returns the shapes of the embedding of patches, without bias."""
    return {"kernel": (3 * config.num_frames * config.patch_size**2, config.hidden_size)}


def attention_shapes(config: QwenVisionConfig) -> Params:
    """Returns the shapes of the stacked layers' attention."""
    num_layers, size = config.num_layers, config.hidden_size
    return {
        "qkv": {"kernel": (num_layers, size, 3 * size), "bias": (num_layers, 3 * size)},
        "out": {"kernel": (num_layers, size, size), "bias": (num_layers, size)},
    }


def projection_shapes(config: QwenVisionConfig, output_size: int, *stack: int) -> Params:
    """Returns the shapes of the linear maps of `project`, with leading axes `stack`."""
    size = config.merge_size**2 * config.hidden_size
    return {
        "hidden": {"kernel": (*stack, size, size), "bias": (*stack, size)},
        "output": {"kernel": (*stack, size, output_size), "bias": (*stack, output_size)},
    }


def patch_tensor(config: QwenVisionConfig, name: str) -> Tensor:
    """Returns the tensor of the kernel of the embedding of patches of the tower `name`."""
    order = tensor_names.video_convolution(config.patch_size, config.num_frames)
    return Tensor("vision/patches/kernel", f"{name}.patch_embed.proj.weight", order)


def attention_tensors(name: str) -> tuple[Tensor, ...]:
    """Returns the tensors of the layers' attention of the tower `name`."""
    path, layer = "vision/layers/attention", f"{name}.blocks.{{}}.attn"
    return tensor_names.join(
        tensor_names.linear(f"{path}/qkv", f"{layer}.qkv", bias=True),
        tensor_names.linear(f"{path}/out", f"{layer}.proj", bias=True),
    )


def default_image_size(config: QwenVisionConfig, side: int) -> tuple[int, int]:
    """Returns the size of a square image of about `side` pixels that the patches fill."""
    side = max(1, round(side / config.factor)) * config.factor
    return side, side


def from_json(vision: model_json.Json, defaults: QwenVisionConfig) -> dict[str, Any]:
    """Returns the fields of the config of a `vision_config`.

    Args:
      vision: the dict of the `config.json`.
      defaults: of the original's class.

    Raises:
      ValueError: a field has another type or a value that is not supported.
    """
    for name in ("in_channels", "in_chans"):
        model_json.only(vision, name, 3)
    theta = model_json.number(
        model_json.section(vision, "rope_parameters"), "rope_theta", defaults.rope_theta
    )
    return {**model_json.read(vision, defaults, _JSON_FIELDS), "rope_theta": theta}


def to_json(config: QwenVisionConfig, output_size: int) -> dict[str, Any]:
    """Returns the fields of a `vision_config` that both models have."""
    return {
        **model_json.write(config, _JSON_FIELDS),
        "in_channels": 3,
        "out_hidden_size": output_size,
        "rope_parameters": {"rope_type": "axial", "rope_theta": config.rope_theta},
    }


def sections(text: model_json.Json, default: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns the rotary frequencies for time, row and column, from the fields of either version.

    Raises:
      ValueError: they are not three integers.
    """
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope |= model_json.section(text, name)
    found = model_json.integers(rope, "mrope_section", default)
    if len(found) != 3:
        raise ValueError(f"mrope_section must be 3 integers, got {list(found)}.")
    return found


_JSON_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "depth",
    "num_heads": "num_heads",
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "num_frames": "temporal_patch_size",
    "activation": "hidden_act",
}  # our field -> that of `vision_config` in a config.json
