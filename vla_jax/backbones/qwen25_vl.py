"""Qwen2.5-VL: a vision tower with attention in windows, and a Qwen2.5.

Source: Bai et al. 2025 (arXiv:2502.13923); as in Hugging Face's
`Qwen2_5_VLForConditionalGeneration`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import (
    image_settings,
    model_json,
    mrope,
    prompts,
    qwen25_vision,
    qwen_vision,
    qwen_vl,
    rotary_decoder,
    tensor_names,
)
from vla_jax.backbones.image_settings import CLIP_MEAN, CLIP_STD, Preprocessing
from vla_jax.backbones.qwen25_vision import Qwen25VisionConfig
from vla_jax.backbones.qwen_vision import Grid, ImageFeatures
from vla_jax.backbones.qwen_vl import QwenVLConfig, language_model
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.backbones.tensor_names import Tensor
from vla_jax.backbones.vlm import VisionLanguageModel
from vla_jax.config import checked
from vla_jax.types import Array, Params


@dataclass(frozen=True)
@checked()
class Qwen25VLConfig(QwenVLConfig):
    """Qwen2.5-VL as a backbone; the default is Qwen2.5-VL-3B-Instruct."""

    kind: Literal["qwen25_vl"] = "qwen25_vl"
    vision: Qwen25VisionConfig = Qwen25VisionConfig()  # sizes of the vision tower
    language: RotaryDecoderConfig = RotaryDecoderConfig(  # sizes of the language model
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_layers=36,
        num_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        epsilon=1e-6,
        rope_theta=1_000_000.0,
        qkv_bias=True,
    )
    # rotary frequencies of each head for time, row and column
    rope_sections: tuple[int, int, int] = (16, 24, 24)
    # height and width of all images, pixels, multiples of patch_size · merge_size
    image_size: tuple[int, int] = (224, 224)
    # resampling and normalisation of images
    images: Preprocessing = Preprocessing("bicubic", CLIP_MEAN, CLIP_STD)

    def __post_init__(self):
        super().__post_init__()
        if sum(self.rope_sections) != self.language.head_dim // 2:
            raise ValueError(
                f"rope_sections must have the sum head_dim / 2 = {self.language.head_dim // 2}, "
                f"got {self.rope_sections}."
            )

    @property
    def rope_dimensions(self) -> np.ndarray:
        """Dimension `[E/2]` of each rotary frequency."""
        return mrope.blocks(self.rope_sections)


def image_tokens(
    params: Params, config: Qwen25VLConfig, patches: Array, grids: Sequence[Grid]
) -> jax.Array:
    """Returns the tokens of images.

    Args:
      params: of the model.
      config: of the model.
      patches: `[I, S, 3·T·p·p]`, as `preprocess.patches` orders them.
      grids: one entry if every `[S]` is an image of this grid; several if it holds images one after
        another.

    Returns:
      `[I, N, D]` in the dtype of the options, N tokens for S patches.
    """
    patches = jnp.asarray(patches, config.options.dtype)
    return qwen25_vision.apply(
        params["vision"], config.vision, patches, grids, remat=config.options.remat
    )


def _features(
    params: Params, config: Qwen25VLConfig, patches: Array, grids: Sequence[Grid]
) -> ImageFeatures:
    tokens = image_tokens(params, config, patches, grids)
    return ImageFeatures(tokens, jnp.zeros((0, *tokens.shape), tokens.dtype))


def shapes(config: Qwen25VLConfig) -> Params:
    """Returns the shapes of the params."""
    return {
        "vision": qwen25_vision.shapes(config.vision, config.language.hidden_size),
        "language": rotary_decoder.shapes(config.language),
    }


def tensors(config: Qwen25VLConfig) -> tuple[Tensor, ...]:
    """Returns the places of the params in a file."""
    return tensor_names.join(
        qwen25_vision.tensors(config.vision, "visual"),
        rotary_decoder.tensors(config.language, "language", "model", head_name="lm_head"),
    )


def from_json(data: Mapping[str, Any]) -> Qwen25VLConfig:
    """Returns the config of a `config.json`; published ones have the text fields at the top."""
    text = data if data.get("text_config") is None else model_json.section(data, "text_config")
    model_json.only(text, "use_sliding_window", False)
    vision = qwen25_vision.from_json(model_json.section(data, "vision_config"))
    return Qwen25VLConfig(
        vision=vision,
        language=RotaryDecoderConfig(
            **rotary_decoder.from_json(text, _TEXT),
            qkv_bias=True,
            tied_head=qwen_vl.is_tied(data, text),
        ),
        rope_sections=qwen_vision.sections(text, (16, 24, 24)),
        image_size=qwen_vision.default_image_size(vision, 224),
        **qwen_vl.token_ids(data),
    )


def to_json(config: Qwen25VLConfig) -> dict[str, Any]:
    """Returns the `config.json` of a config."""
    vision = qwen25_vision.to_json(config.vision, config.language.hidden_size)
    name, architecture = "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"
    return qwen_vl.to_json(config, name, architecture, vision, {})


_TEXT = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_layers": 80,
    "num_heads": 64,
    "num_key_value_heads": 8,
    "activation": "silu",
    "epsilon": 1e-5,
    "rope_theta": 1_000_000.0,
}  # defaults of Hugging Face's `Qwen2_5_VLTextConfig`

MODEL = VisionLanguageModel(
    config=Qwen25VLConfig,
    model_types=("qwen2_5_vl",),
    from_json=from_json,
    to_json=to_json,
    shapes=shapes,
    tensors=tensors,
    renames=(
        (r"^model\.(?=visual\.)", ""),
        (r"^(model\.)?language_model\.", "model."),
    ),
    live_names=((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")),
    ignored=qwen_vl.IGNORED,
    hidden_states=partial(qwen_vl.hidden_states, _features),
    language_model=language_model,
    forward=partial(qwen_vl.forward, _features),
    prompt=partial(qwen_vl.prompt, system=prompts.QWEN25_SYSTEM),
    read_images=image_settings.read_qwen,
    image_sizes=qwen_vl.image_sizes,
)
