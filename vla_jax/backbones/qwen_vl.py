"""Parts that Qwen3-VL and Qwen2.5-VL share: sizes, sequence and forward pass.

Source: Wang et al. 2024, Qwen2-VL (arXiv:2409.12191); Bai et al. 2025 (arXiv:2502.13923,
arXiv:2511.21631).
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import (
    camera_images,
    model_json,
    mrope,
    prompts,
    qwen_vision,
    rotary_decoder,
    sequence,
    tokenizers,
)
from vla_jax.backbones.image_settings import Preprocessing
from vla_jax.backbones.qwen_vision import Grid, ImageFeatures, QwenVisionConfig
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.backbones.sequence import IMAGE, PADDING
from vla_jax.backbones.vlm import VLMSizes
from vla_jax.backbones.vlm_options import VLMOptions
from vla_jax.config import checked
from vla_jax.types import Array, Params

# (params, config, patches [I, S, 3·T·p·p], grids) -> features; see `image_tokens` of a model
Encode = Callable[[Params, Any, Array, Sequence[Grid]], ImageFeatures]
IGNORED = (r"lm_head\.weight", r".*rotary_(pos_)?emb\.inv_freq")  # tensors without a param


@dataclass(frozen=True)
@checked()
class QwenVLConfig(VLMSizes):
    """Fields that both models have."""

    POLICY_FIELDS: ClassVar[tuple[str, ...]] = ("image_size", "options")

    vision: QwenVisionConfig = QwenVisionConfig()  # sizes of the vision tower
    language: RotaryDecoderConfig = RotaryDecoderConfig()  # sizes of the language model
    rope_sections: tuple[int, int, int] = (24, 20, 20)  # frequencies for time, row and column
    image_size: tuple[int, int] = (256, 256)  # height and width of all images, pixels
    image_token_id: int = 151655  # id of an image's places in the original's inputs
    vision_start_token_id: int = 151652  # id before an image, for a config.json only
    images: Preprocessing = Preprocessing()  # resampling and normalisation of images
    options: VLMOptions = VLMOptions()  # cameras, prompt, readout, precision

    def __post_init__(self):
        super().__post_init__()
        factor = self.vision.factor
        if min(self.image_size) < factor or any(side % factor for side in self.image_size):
            raise ValueError(
                f"image_size must be two positive multiples of patch_size · merge_size {factor}, "
                f"got {self.image_size}."
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        return self.image_size

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches of an image."""
        height, width = self.image_size
        return height // self.vision.patch_size, width // self.vision.patch_size

    @property
    def tokens_per_image(self) -> int:
        """Positions of the sequence that one image takes."""
        rows, columns = self.grid
        return rows * columns // self.vision.merge_size**2

    @property
    @abc.abstractmethod
    def rope_dimensions(self) -> np.ndarray:
        """Dimension `[E/2]` of each rotary frequency, see `mrope`."""


def language_model(
    params: Params,
    config: QwenVLConfig,
    embeddings: Array,
    positions: Array,
    mask: Array,
    *,
    added: Array | None = None,
) -> jax.Array:
    """Returns the hidden states after the last norm.

    Args:
      params: of the model.
      config: of the model.
      embeddings: `[B, T, D]`.
      positions: `[3, B, T]`, from `mrope.positions`.
      mask: bool `[B, T, T]`, True where a query attends to a key.
      added: `[J, B, T, D]`, added to the hidden states after each of the first J layers.

    Returns:
      `[B, T, D]` float32.
    """
    return rotary_decoder.apply(
        params["language"],
        config.language,
        embeddings,
        mrope.rotary_angles(config.language, positions, config.rope_dimensions),
        mask,
        added=added if added is not None and len(added) else None,
        dtype=config.options.dtype,
        remat=config.options.remat,
    )


def hidden_states(
    encode: Encode, params: Params, config: QwenVLConfig, ids: Array, images: Array
) -> jax.Array:
    """Returns the hidden states `[B, S, D]` of sequences `[B, S]` with their images."""
    language, vision = config.language, config.vision
    patches = qwen_vision.patches(vision, camera_images.pixels(images, config.images))

    def encode_pass(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = encode(params, config, patches, [config.grid])
        return features.tokens, jnp.moveaxis(features.added, 0, 1)  # images first

    tokens, added = camera_images.map_images(encode_pass, patches, config)

    def place(text: jax.Array, tokens: jax.Array, learned: Array | None = None) -> jax.Array:
        tokens = camera_images.unfold_cameras(tokens, ids.shape[0])
        return sequence.place(text, ids, tokens, vocab_size=language.vocab_size, learned=learned)

    embeddings = rotary_decoder.embed(params["language"], language, ids)
    embeddings = place(embeddings, tokens, params.get("action_token"))
    nothing = jnp.zeros(embeddings.shape, added.dtype)
    real, grids = ids != PADDING, qwen_vision.token_grids(vision, [config.grid])
    return language_model(
        params,
        config,
        embeddings,
        mrope.positions(real, ids == IMAGE, grids),
        sequence.causal_mask(real),
        added=jnp.stack([place(nothing, part) for part in jnp.moveaxis(added, 1, 0)])
        if added.shape[1]
        else None,
    )


def forward(
    encode: Encode, params: Params, config: QwenVLConfig, inputs: Mapping[str, Array]
) -> dict[str, jax.Array]:
    """Returns the outputs of the original's forward; see `reference.forward`.

    Args:
      encode: vision tower.
      params: of the model.
      config: of the model.
      inputs: `input_ids [B, T]`; optional `attention_mask [B, T]`, and `pixel_values
        [S, 3·T·p·p]` with `image_grid_thw [I, 3]`.
    """
    ids = np.asarray(inputs["input_ids"])
    real = np.asarray(inputs.get("attention_mask", np.ones_like(ids))).astype(bool)
    embeddings = rotary_decoder.embed(params["language"], config.language, ids)
    is_image, grids, added = np.zeros_like(real), [], None
    if "pixel_values" in inputs:
        pixels = jnp.asarray(inputs["pixel_values"])
        grids = qwen_vision.read_grids(config.vision, inputs["image_grid_thw"], len(pixels))
        features = encode(params, config, pixels[None], grids)
        is_image = ids == config.image_token_id
        nothing = jnp.zeros_like(embeddings)
        embeddings = sequence.scatter(embeddings, is_image, features.tokens)
        added = jnp.asarray([sequence.scatter(nothing, is_image, x) for x in features.added])
    positions = mrope.positions(real, is_image, qwen_vision.token_grids(config.vision, grids))
    mask = sequence.causal_mask(real)
    hidden = language_model(params, config, embeddings, positions, mask, added=added)
    logits = rotary_decoder.logits(params["language"], config.language, hidden)
    return {"last_hidden": hidden, "logits": logits}


def prompt(config: QwenVLConfig, tokenizer: Any, text: str, *, system: str = "") -> Sequence[int]:
    """Returns the ids of a step's prompt, with `IMAGE` for every feature of an image."""
    num_images = len(config.options.cameras)
    ids = prompts.qwen(tokenizer, text, num_images, config.tokens_per_image, system=system)
    return sequence.mark_images(ids, tokenizers.token_id(tokenizer, "<|image_pad|>"))


def is_tied(data: model_json.Json, text: model_json.Json) -> bool:
    """Returns whether the logits use the embedding, from a `config.json` and its text config."""
    return any(model_json.number(d, "tie_word_embeddings", False) for d in (data, text))


def token_ids(data: model_json.Json) -> dict[str, Any]:
    """Returns the fields of the config that are ids in a `config.json`."""
    return {
        "image_token_id": model_json.number(data, "image_token_id", 151655),
        "vision_start_token_id": model_json.number(data, "vision_start_token_id", 151652),
    }


def to_json(
    config: QwenVLConfig,
    name: str,
    architecture: str,
    vision: Mapping[str, Any],
    rope: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the `config.json` of a config.

    Args:
      config: of the model.
      name: its `model_type`.
      architecture: name of the original's class.
      vision: `vision_config` without the `model_type`.
      rope: fields of `rope_scaling` that only one of the models has.
    """
    tied = config.language.tied_head
    sections = {"rope_type": "default", "mrope_section": list(config.rope_sections)}
    return {
        "architectures": [architecture],
        "model_type": name,
        "image_token_id": config.image_token_id,
        "vision_start_token_id": config.vision_start_token_id,  # transformers 4 looks for it
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": f"{name}_text",
            **rotary_decoder.to_json(config.language),
            "rope_scaling": {**sections, **rope},
            "tie_word_embeddings": tied,
        },
        "vision_config": {"model_type": name, **vision},
    }


def image_sizes(config: QwenVLConfig) -> dict[str, int]:
    """Returns the settings of image preprocessing that follow from the config."""
    vision = config.vision
    return {
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
        "temporal_patch_size": vision.num_frames,
    }
