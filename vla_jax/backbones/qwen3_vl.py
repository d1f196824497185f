"""Qwen3-VL: a vision tower whose intermediate layers feed the first layers of a Qwen3.

Source: Bai et al. 2025, Qwen3-VL (arXiv:2511.21631); Meng et al. 2024, DeepStack
(arXiv:2406.04334); as in Hugging Face's `Qwen3VLForConditionalGeneration`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import (
    image_settings,
    model_json,
    mrope,
    qwen3_vision,
    qwen_vision,
    qwen_vl,
    rotary_decoder,
    tensor_names,
)
from vla_jax.backbones.image_settings import HALF, Preprocessing
from vla_jax.backbones.qwen3_vision import Qwen3VisionConfig
from vla_jax.backbones.qwen_vision import Grid, ImageFeatures
from vla_jax.backbones.qwen_vl import QwenVLConfig, language_model
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.backbones.tensor_names import Tensor
from vla_jax.backbones.vlm import VisionLanguageModel
from vla_jax.config import checked
from vla_jax.types import Array, Params


@dataclass(frozen=True)
@checked()
class Qwen3VLConfig(QwenVLConfig):
    """Qwen3-VL as a backbone; the default is Qwen3-VL-2B-Instruct."""

    kind: Literal["qwen3_vl"] = "qwen3_vl"
    vision: Qwen3VisionConfig = Qwen3VisionConfig()  # sizes of the vision tower
    language: RotaryDecoderConfig = RotaryDecoderConfig(  # sizes of the language model
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=28,
        num_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        epsilon=1e-6,
        rope_theta=5_000_000.0,
        qk_norm=True,
    )
    # rotary frequencies of each head for time, row and column
    rope_sections: tuple[int, int, int] = (24, 20, 20)
    # height and width of all images, pixels, multiples of patch_size · merge_size; a smaller square
    # than 256 × 256 would be enlarged by the original's image processor
    image_size: tuple[int, int] = (256, 256)
    # resampling and normalisation of images
    images: Preprocessing = Preprocessing("bicubic", HALF, HALF)

    @property
    def rope_dimensions(self) -> np.ndarray:
        """Dimension `[E/2]` of each rotary frequency."""
        return mrope.interleaved(self.rope_sections, self.language.head_dim // 2)


def image_tokens(
    params: Params, config: Qwen3VLConfig, patches: Array, grids: Sequence[Grid]
) -> ImageFeatures:
    """Returns the features of images.

    Args:
      params: of the model.
      config: of the model.
      patches: `[I, S, 3·T·p·p]`, as `preprocess.patches` orders them.
      grids: one entry if every `[S]` is an image of this grid; several if it holds images one after
        another.

    Returns:
      In the dtype of the options.
    """
    patches = jnp.asarray(patches, config.options.dtype)
    return qwen3_vision.apply(
        params["vision"], config.vision, patches, grids, remat=config.options.remat
    )


def shapes(config: Qwen3VLConfig) -> Params:
    """Returns the shapes of the params."""
    return {
        "vision": qwen3_vision.shapes(config.vision, config.language.hidden_size),
        "language": rotary_decoder.shapes(config.language),
    }


def tensors(config: Qwen3VLConfig) -> tuple[Tensor, ...]:
    """Returns the places of the params in a file."""
    return tensor_names.join(
        qwen3_vision.tensors(config.vision, "model.visual"),
        rotary_decoder.tensors(
            config.language, "language", "model.language_model", head_name="lm_head"
        ),
    )


def from_json(data: Mapping[str, Any]) -> Qwen3VLConfig:
    """Returns the config of a `config.json`."""
    text = model_json.section(data, "text_config")
    model_json.only(text, "attention_bias", False)
    vision = qwen3_vision.from_json(model_json.section(data, "vision_config"))
    is_4 = model_json.number(data, "transformers_version", "").startswith("4.")
    theta = 5_000_000.0 if is_4 else 500_000.0
    return Qwen3VLConfig(
        vision=vision,
        language=RotaryDecoderConfig(
            **rotary_decoder.from_json(text, {**_TEXT, "rope_theta": theta}),
            qk_norm=True,
            tied_head=qwen_vl.is_tied(data, text),
        ),
        rope_sections=qwen_vision.sections(text, (24, 20, 20)),
        image_size=qwen_vision.default_image_size(vision, 256),
        **qwen_vl.token_ids(data),
    )


def to_json(config: Qwen3VLConfig) -> dict[str, Any]:
    """Returns the `config.json` of a config."""
    vision = qwen3_vision.to_json(config.vision, config.language.hidden_size)
    name, architecture = "qwen3_vl", "Qwen3VLForConditionalGeneration"
    return qwen_vl.to_json(config, name, architecture, vision, {"mrope_interleaved": True})


_TEXT = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_layers": 32,
    "num_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "activation": "silu",
    "epsilon": 1e-6,
}  # defaults of Hugging Face's `Qwen3VLTextConfig`

MODEL = VisionLanguageModel(
    config=Qwen3VLConfig,
    model_types=("qwen3_vl",),
    from_json=from_json,
    to_json=to_json,
    shapes=shapes,
    tensors=tensors,
    renames=(
        (r"^(?=(visual|language_model)\.)", "model."),
        (r"^model\.(?=(layers|norm|embed_tokens)\.)", "model.language_model."),
    ),
    live_names=(),
    ignored=qwen_vl.IGNORED,
    hidden_states=partial(qwen_vl.hidden_states, image_tokens),
    language_model=language_model,
    forward=partial(qwen_vl.forward, image_tokens),
    prompt=qwen_vl.prompt,
    read_images=image_settings.read_qwen,
    image_sizes=qwen_vl.image_sizes,
)
