"""Qwen3-VL: a vision tower whose intermediate layers feed the first layers of a Qwen3.

Source: Bai et al. 2025, Qwen3-VL (arXiv:2511.21631); Meng et al. 2024, DeepStack
(arXiv:2406.04334); as in Hugging Face's `Qwen3VLForConditionalGeneration`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import (
    camera_images,
    model_json,
    mrope,
    prompts,
    qwen3_vision,
    qwen_vision,
    rotary_decoder,
    sequence,
    tensor_names,
    tokenizers,
    vlm,
)
from vla_jax.backbones.image_settings import HALF
from vla_jax.backbones.qwen3_vision import ImageFeatures, Qwen3VisionConfig
from vla_jax.backbones.qwen_vision import Grid, QwenVLSizes
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.backbones.sequence import IMAGE, PADDING
from vla_jax.backbones.tensor_names import Tensor
from vla_jax.backbones.vlm import VisionLanguageModel
from vla_jax.backbones.vlm_options import VLMOptions
from vla_jax.types import Array, Params


@dataclass(frozen=True)
class Qwen3VLConfig(QwenVLSizes):
    """Qwen3-VL as a backbone; the default is Qwen3-VL-2B-Instruct."""

    POLICY_FIELDS: ClassVar[tuple[str, ...]] = ("image_size", "options")

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
    image_token_id: int = 151655  # id of an image's places in the original's inputs
    vision_start_token_id: int = 151652  # id before an image, for a config.json only
    options: VLMOptions = VLMOptions()  # cameras, prompt, readout, precision


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


def language_model(
    params: Params,
    config: Qwen3VLConfig,
    embeddings: Array,
    mask: Array,
    positions: Array,
    *,
    added: Array | None = None,
) -> jax.Array:
    """Returns the hidden states after the last norm.

    Args:
      params: of the model.
      config: of the model.
      embeddings: `[B, T, D]`.
      mask: bool `[B, T]`, True where a token is real.
      positions: `[3, B, T]`, from `mrope.positions`.
      added: `[J, B, T, D]`, added to the hidden states after each of the first J layers.

    Returns:
      `[B, T, D]` float32.
    """
    language = config.language
    dimensions = mrope.interleaved(config.rope_sections, language.head_dim // 2)
    return rotary_decoder.apply(
        params["language"],
        language,
        embeddings,
        mrope.rotary_angles(language, positions, dimensions),
        sequence.causal_mask(mask),
        added=added if added is not None and len(added) else None,
        dtype=config.options.dtype,
        remat=config.options.remat,
    )


def hidden_states(params: Params, config: Qwen3VLConfig, ids: Array, images: Array) -> jax.Array:
    """Returns the hidden states `[B, S, D]` of sequences `[B, S]` with their images."""
    language, vision = config.language, config.vision
    patches = qwen_vision.patches(vision, camera_images.pixels(images, MODEL))

    def encode(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = image_tokens(params, config, patches, [config.grid])
        return features.tokens, jnp.moveaxis(features.added, 0, 1)  # images first

    tokens, added = camera_images.map_images(encode, patches, config)

    def place(text: jax.Array, tokens: jax.Array, learned: Array | None = None) -> jax.Array:
        tokens = camera_images.unfold_cameras(tokens, len(ids))
        return sequence.place(text, ids, tokens, vocab_size=language.vocab_size, learned=learned)

    embeddings = rotary_decoder.embed(params["language"], language, ids)
    embeddings = place(embeddings, tokens, params.get("action_token"))
    nothing = jnp.zeros(embeddings.shape, added.dtype)
    mask, is_image = ids != PADDING, ids == IMAGE
    return language_model(
        params,
        config,
        embeddings,
        mask,
        mrope.positions(mask, is_image, qwen_vision.token_grids(vision, [config.grid])),
        added=jax.vmap(lambda tokens: place(nothing, tokens), in_axes=1)(added),
    )


def forward(
    params: Params, config: Qwen3VLConfig, inputs: Mapping[str, Array]
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
    is_image, grids, added = np.zeros_like(mask), [], None
    if "pixel_values" in inputs:
        pixels = jnp.asarray(inputs["pixel_values"])
        grids = qwen_vision.read_grids(config.vision, inputs["image_grid_thw"], len(pixels))
        features = image_tokens(params, config, pixels[None], grids)
        is_image = ids == config.image_token_id
        nothing = jnp.zeros_like(embeddings)
        embeddings = sequence.scatter(embeddings, is_image, features.tokens)
        added = jnp.asarray([sequence.scatter(nothing, is_image, x) for x in features.added])
    positions = mrope.positions(mask, is_image, qwen_vision.token_grids(config.vision, grids))
    hidden = language_model(params, config, embeddings, mask, positions, added=added)
    logits = rotary_decoder.logits(params["language"], config.language, hidden)
    return {"last_hidden": hidden, "logits": logits}


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
    tied = any(model_json.number(d, "tie_word_embeddings", False) for d in (data, text))
    return Qwen3VLConfig(
        vision=vision,
        language=RotaryDecoderConfig(
            **rotary_decoder.from_json(text, {**_TEXT, "rope_theta": theta}),
            qk_norm=True,
            tied_head=tied,
        ),
        rope_sections=qwen_vision.sections(text, (24, 20, 20)),
        image_size=qwen_vision.default_image_size(vision, 256),
        image_token_id=model_json.number(data, "image_token_id", 151655),
        vision_start_token_id=model_json.number(data, "vision_start_token_id", 151652),
    )


def to_json(config: Qwen3VLConfig) -> dict[str, Any]:
    """Returns the `config.json` of a config."""
    language, tied = config.language, config.language.tied_head
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": config.image_token_id,
        "vision_start_token_id": config.vision_start_token_id,  # transformers 4 looks for it
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_vl_text",
            **rotary_decoder.to_json(language),
            "rope_scaling": {
                "rope_type": "default",
                "mrope_interleaved": True,
                "mrope_section": list(config.rope_sections),
            },
            "tie_word_embeddings": tied,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            **qwen3_vision.to_json(config.vision, language.hidden_size),
        },
    }


def prompt(config: Qwen3VLConfig, tokenizer: Any, text: str) -> Sequence[int]:
    """Returns the ids of a step's prompt, with `IMAGE` for every feature of an image."""
    num_images = len(config.options.cameras)
    ids = prompts.qwen(tokenizer, text, num_images, config.tokens_per_image)
    return sequence.mark_images(ids, tokenizers.token_id(tokenizer, "<|image_pad|>"))


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
    from_json=from_json,
    to_json=to_json,
    shapes=shapes,
    tensors=tensors,
    renames=(
        (r"^(?=(visual|language_model)\.)", "model."),
        (r"^model\.(?=(layers|norm|embed_tokens)\.)", "model.language_model."),
    ),
    live_names=(),
    ignored=(r"lm_head\.weight", r".*rotary_(pos_)?emb\.inv_freq"),
    hidden_states=hidden_states,
    forward=forward,
    prompt=prompt,
    resampling="bicubic",
    mean=HALF,
    std=HALF,
)
BACKBONE = vlm.make_backbone(MODEL)
