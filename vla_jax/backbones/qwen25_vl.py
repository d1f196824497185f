"""Qwen2.5-VL: a vision tower with attention in windows, and a Qwen2.5.

Source: Bai et al. 2025 (arXiv:2502.13923); as in Hugging Face's
`Qwen2_5_VLForConditionalGeneration`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import (
    camera_images,
    model_json,
    mrope,
    prompts,
    qwen25_vision,
    qwen_vision,
    rotary_decoder,
    sequence,
    tensor_names,
    tokenizers,
    vlm,
)
from vla_jax.backbones.image_settings import CLIP_MEAN, CLIP_STD
from vla_jax.backbones.qwen25_vision import Qwen25VisionConfig
from vla_jax.backbones.qwen_vision import Grid, QwenVLSizes
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.backbones.sequence import IMAGE, PADDING
from vla_jax.backbones.tensor_names import Tensor
from vla_jax.backbones.vlm import VisionLanguageModel
from vla_jax.backbones.vlm_options import VLMOptions
from vla_jax.types import Array, Params


@dataclass(frozen=True)
class Qwen25VLConfig(QwenVLSizes):
    """Qwen2.5-VL as a backbone; the default is Qwen2.5-VL-3B-Instruct."""

    POLICY_FIELDS: ClassVar[tuple[str, ...]] = ("image_size", "options")

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
    image_token_id: int = 151655  # id of an image's places in the original's inputs
    vision_start_token_id: int = 151652  # id before an image, for a config.json only
    options: VLMOptions = VLMOptions()  # cameras, prompt, readout, precision

    def __post_init__(self):
        super().__post_init__()
        if sum(self.rope_sections) != self.language.head_dim // 2:
            raise ValueError(
                f"rope_sections must have the sum head_dim / 2 = {self.language.head_dim // 2}, "
                f"got {self.rope_sections}."
            )


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


def language_model(
    params: Params, config: Qwen25VLConfig, embeddings: Array, mask: Array, positions: Array
) -> jax.Array:
    """Returns the hidden states after the last norm.

    Args:
      params: of the model.
      config: of the model.
      embeddings: `[B, T, D]`.
      mask: bool `[B, T]`, True where a token is real.
      positions: `[3, B, T]`, from `mrope.positions`.

    Returns:
      `[B, T, D]` float32.
    """
    dimensions = mrope.blocks(config.rope_sections)
    return rotary_decoder.apply(
        params["language"],
        config.language,
        embeddings,
        mrope.rotary_angles(config.language, positions, dimensions),
        sequence.causal_mask(mask),
        dtype=config.options.dtype,
        remat=config.options.remat,
    )


def hidden_states(params: Params, config: Qwen25VLConfig, ids: Array, images: Array) -> jax.Array:
    """Returns the hidden states `[B, S, D]` of sequences `[B, S]` with their images."""
    patches = qwen_vision.patches(config.vision, camera_images.pixels(images, MODEL))
    encode = partial(image_tokens, params, config, grids=[config.grid])
    tokens = camera_images.map_images(encode, patches, config)
    embeddings = sequence.place(
        rotary_decoder.embed(params["language"], config.language, ids),
        ids,
        camera_images.unfold_cameras(tokens, len(ids)),
        vocab_size=config.language.vocab_size,
        learned=params.get("action_token"),
    )
    mask, grids = ids != PADDING, qwen_vision.token_grids(config.vision, [config.grid])
    positions = mrope.positions(mask, ids == IMAGE, grids)
    return language_model(params, config, embeddings, mask, positions)


def forward(
    params: Params, config: Qwen25VLConfig, inputs: Mapping[str, Array]
) -> dict[str, jax.Array]:
    """Returns the outputs of the original's forward; see `reference.forward`.

    Args:
      params: of the model.
      config: of the model.
      inputs: `input_ids [B, T]`; optional `attention_mask [B, T]`, and `pixel_values
        [S, 3·T·p·p]` with `image_grid_thw [I, 3]`.
    """
    ids = np.asarray(inputs["input_ids"])
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids))).astype(bool)
    embeddings = rotary_decoder.embed(params["language"], config.language, ids)
    is_image, grids = np.zeros_like(mask), []
    if "pixel_values" in inputs:
        pixels = jnp.asarray(inputs["pixel_values"])
        grids = qwen_vision.read_grids(config.vision, inputs["image_grid_thw"], len(pixels))
        is_image = ids == config.image_token_id
        tokens = image_tokens(params, config, pixels[None], grids)
        embeddings = sequence.scatter(embeddings, is_image, tokens)
    positions = mrope.positions(mask, is_image, qwen_vision.token_grids(config.vision, grids))
    hidden = language_model(params, config, embeddings, mask, positions)
    logits = rotary_decoder.logits(params["language"], config.language, hidden)
    return {"last_hidden": hidden, "logits": logits}


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
    tied = any(model_json.number(d, "tie_word_embeddings", False) for d in (data, text))
    return Qwen25VLConfig(
        vision=vision,
        language=RotaryDecoderConfig(
            **rotary_decoder.from_json(text, _TEXT), qkv_bias=True, tied_head=tied
        ),
        rope_sections=qwen_vision.sections(text, (16, 24, 24)),
        image_size=qwen_vision.default_image_size(vision, 224),
        image_token_id=model_json.number(data, "image_token_id", 151655),
        vision_start_token_id=model_json.number(data, "vision_start_token_id", 151652),
    )


def to_json(config: Qwen25VLConfig) -> dict[str, Any]:
    """Returns the `config.json` of a config."""
    language, tied = config.language, config.language.tied_head
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": config.image_token_id,
        "vision_start_token_id": config.vision_start_token_id,  # transformers 4 looks for it
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            **rotary_decoder.to_json(language),
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": list(config.rope_sections),
            },
            "tie_word_embeddings": tied,
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            **qwen25_vision.to_json(config.vision, language.hidden_size),
        },
    }


def prompt(config: Qwen25VLConfig, tokenizer: Any, text: str) -> Sequence[int]:
    """Returns the ids of a step's prompt, with `IMAGE` for every feature of an image."""
    ids = prompts.qwen(
        tokenizer,
        text,
        len(config.options.cameras),
        config.tokens_per_image,
        system=prompts.QWEN25_SYSTEM,
    )
    return sequence.mark_images(ids, tokenizers.token_id(tokenizer, "<|image_pad|>"))


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
    from_json=from_json,
    to_json=to_json,
    shapes=shapes,
    tensors=tensors,
    renames=(
        (r"^model\.(?=visual\.)", ""),
        (r"^(model\.)?language_model\.", "model."),
    ),
    live_names=((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")),
    ignored=(r"lm_head\.weight", r".*rotary_(pos_)?emb\.inv_freq"),
    hidden_states=hidden_states,
    forward=forward,
    prompt=prompt,
    resampling="bicubic",
    mean=CLIP_MEAN,
    std=CLIP_STD,
)
BACKBONE = vlm.make_backbone(MODEL)
