"""PaliGemma and PaliGemma 2: a SigLIP vision tower and a Gemma or Gemma 2 language model.

Source: Beyer et al. 2024 (arXiv:2407.07726); Steiner et al. 2024 (arXiv:2412.03555); as in Hugging
Face's `PaliGemmaForConditionalGeneration`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import (
    camera_images,
    gemma_json,
    image_settings,
    model_json,
    prompts,
    rotary_decoder,
    sequence,
    tensor_names,
    tokenizers,
    vit,
    vlm,
)
from vla_jax.backbones.blocks import linear
from vla_jax.backbones.image_settings import HALF, Preprocessing
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.backbones.sequence import IMAGE, PADDING
from vla_jax.backbones.tensor_names import Tensor
from vla_jax.backbones.vit import VisionConfig
from vla_jax.backbones.vlm import VisionLanguageModel, VLMSizes
from vla_jax.backbones.vlm_options import VLMOptions
from vla_jax.config import checked
from vla_jax.types import Array, Params


@dataclass(frozen=True)
@checked()
class PaliGemmaConfig(VLMSizes):
    """PaliGemma or PaliGemma 2 as a backbone; the default is PaliGemma 3B with 224 pixels."""

    SUPPORTED: ClassVar[Mapping[str, tuple[str, ...]]] = vlm.ALL
    POLICY_FIELDS: ClassVar[tuple[str, ...]] = ("prefix", "options")

    kind: Literal["paligemma"] = "paligemma"
    vision: VisionConfig = VisionConfig()  # sizes of the vision tower
    language: RotaryDecoderConfig = RotaryDecoderConfig(  # sizes of the language model
        vocab_size=257216,
        hidden_size=2048,
        intermediate_size=16384,
        num_layers=18,
        num_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        activation="gelu_pytorch_tanh",
        epsilon=1e-6,
        rope_theta=10_000.0,
        norm_offset=1.0,
        embedding_scale=math.sqrt(2048),
    )
    image_token_id: int = 257152  # id of an image's places in the original's inputs
    # tokens of the prompt that see each other in both directions; "none" = causal, as RoboVLMs
    prefix: Literal["prompt", "none"] = "prompt"
    # version of transformers whose faults `reference.forward` reproduces; the policy never does
    reference_version: str = ""
    # resampling and normalisation of images
    images: Preprocessing = Preprocessing("bicubic", HALF, HALF)
    options: VLMOptions = VLMOptions()  # cameras, prompt, readout, precision

    def __post_init__(self):
        super().__post_init__()
        if self.options.history == "window" and self.prefix != "none":
            raise ValueError(
                "prefix must be 'none' with history 'window', in which later steps would be seen, "
                f"got '{self.prefix}'."
            )

    @property
    def tokens_per_image(self) -> int:
        """Positions of the sequence that one image takes."""
        return self.vision.grid_size**2

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        return self.vision.image_size, self.vision.image_size


def image_tokens(params: Params, config: PaliGemmaConfig, pixels: Array) -> jax.Array:
    """Returns the tokens of images, as they stand among scaled embeddings.

    Args:
      params: of the model.
      config: of the model.
      pixels: normalised images `[I, h, w, 3]`.

    Returns:
      `[I, tokens_per_image, D]` in the dtype of the options.
    """
    pixels = jnp.asarray(pixels, config.options.dtype)
    features = vit.siglip(params["vision"], config.vision, pixels, remat=config.options.remat)
    return linear(params["projection"], features)


def language_model(
    params: Params, config: PaliGemmaConfig, embeddings: Array, positions: Array, mask: Array
) -> jax.Array:
    """Returns the hidden states after the last norm.

    In sliding layers, too, two tokens that see each other do so at any distance, as in a prefix.

    Args:
      params: of the model.
      config: of the model.
      embeddings: scaled, from `embed`, `[B, T, D]`.
      positions: `[B or 1, T]`, from 0.
      mask: bool `[B, T, T]`, True where a query attends to a key; see `prefix_mask`.

    Returns:
      `[B, T, D]` float32.
    """
    language = config.language
    distance = positions[:, :, None] - positions[:, None, :]
    near = distance < (language.sliding_window or mask.shape[2])
    return rotary_decoder.apply(
        params["language"],
        language,
        embeddings,
        rotary_decoder.rotary_angles(language, positions),
        mask,
        sliding_mask=mask & (near | jnp.swapaxes(mask, 1, 2)),
        dtype=config.options.dtype,
        remat=config.options.remat,
    )


def prefix_mask(real: Array, prefix: Array) -> jax.Array:
    """Returns the mask `[B, T, T]`: causal, but the tokens of a prefix all see one another.

    Args:
      real: bool `[B, T]`, True where a token is real.
      prefix: bool `[B, T]`, True where a token belongs to the prefix.
    """
    real, prefix = jnp.asarray(real), jnp.asarray(prefix)
    both = prefix[:, :, None] & prefix[:, None, :]
    return (jnp.tri(real.shape[1], dtype=bool)[None] | both) & real[:, None, :]


def embed(params: Params, config: PaliGemmaConfig, ids: Array, images: Array) -> jax.Array:
    """Returns the scaled embeddings `[B, S, D]` of sequences `[B, S]` with their images."""
    return camera_images.embed(
        params,
        config,
        ids,
        images,
        text=rotary_decoder.embed(params["language"], config.language, ids),
        encode=partial(image_tokens, params, config),
        learned_scale=config.language.embedding_scale,
    )


def hidden_states(params: Params, config: PaliGemmaConfig, ids: Array, images: Array) -> jax.Array:
    """Returns the hidden states `[B, S, D]` of sequences `[B, S]` with their images."""
    embeddings = embed(params, config, ids, images)
    is_prompt = ids < config.language.vocab_size
    prefix = is_prompt if config.prefix == "prompt" else jnp.zeros_like(is_prompt)
    positions, mask = sequence.positions(ids, config.options), prefix_mask(ids != PADDING, prefix)
    return language_model(params, config, embeddings, positions, mask)


def forward(
    params: Params, config: PaliGemmaConfig, inputs: Mapping[str, Array]
) -> dict[str, jax.Array]:
    """Returns the outputs of the original's forward; see `reference.forward`.

    Args:
      params: of the model.
      config: of the model.
      inputs: `input_ids [B, T]`; optional `attention_mask [B, T]`, `pixel_values [I, 3, h, w]`,
        `token_type_ids [B, T]` (0 = prefix; absent = no prefix, but all of it if transformers 4
        saved the model). Or `inputs_embeds [B, T, D]`, as transformers 4.44 takes them and
        RoboVLMs trains: scaled by √D here, and causal.
    """
    version, language = config.reference_version, config.language
    if version.startswith("4.57."):  # its default attention and its logits have no bounds
        language = dataclasses.replace(language, score_cap=None, logit_cap=None)
        config = dataclasses.replace(config, language=language)
    if "inputs_embeds" in inputs:
        embeddings = language.embedding_scale * jnp.asarray(inputs["inputs_embeds"])
        prefix = jnp.zeros(embeddings.shape[:2], bool)
    else:
        ids = jnp.asarray(inputs["input_ids"])
        embeddings = rotary_decoder.embed(params["language"], language, ids)
        types = jnp.full_like(ids, 0 if version.startswith("4.") else 1)
        prefix = jnp.asarray(inputs.get("token_type_ids", types)) == 0
        if "pixel_values" in inputs:
            pixels = jnp.moveaxis(jnp.asarray(inputs["pixel_values"]), 1, -1)
            is_image = np.asarray(inputs["input_ids"]) == config.image_token_id
            images = image_tokens(params, config, pixels)
            embeddings = sequence.scatter(embeddings, is_image, images)
    real = jnp.ones(embeddings.shape[:2], bool)
    mask = jnp.asarray(inputs.get("attention_mask", real)).astype(bool)
    positions = np.arange(mask.shape[1])[None]
    hidden = language_model(params, config, embeddings, positions, prefix_mask(mask, prefix))
    logits = rotary_decoder.logits(params["language"], language, hidden)
    return {"last_hidden": hidden, "logits": logits}


def shapes(config: PaliGemmaConfig) -> Params:
    """Returns the shapes of the params."""
    dim = config.language.hidden_size
    return {
        "vision": vit.siglip_shapes(config.vision),
        "projection": {"kernel": (config.vision.hidden_size, dim), "bias": (dim,)},
        "language": rotary_decoder.shapes(config.language),
    }


def tensors(config: PaliGemmaConfig) -> tuple[Tensor, ...]:
    """Returns the places of the params in a file."""
    return tensor_names.join(
        vit.siglip_tensors(config.vision, "vision", "vision_tower"),
        tensor_names.linear("projection", "multi_modal_projector.linear", bias=True),
        rotary_decoder.tensors(
            config.language,
            "language",
            "language_model.model",
            head_name="language_model.lm_head",
        ),
    )


def from_json(data: Mapping[str, Any]) -> PaliGemmaConfig:
    """Returns the config of a `config.json`."""
    text = model_json.section(data, "text_config", absent=_ABSENT_TEXT)
    vision = model_json.section(data, "vision_config", absent=_ABSENT_VISION)
    model_json.only(text, "attention_bias", False)
    kind = model_json.number(text, "model_type", "gemma")
    if kind not in gemma_json.GEMMAS:
        raise ValueError(f"text_config.model_type must be gemma or gemma2, got {kind!r}.")
    return PaliGemmaConfig(
        vision=VisionConfig(**model_json.read(vision, vit.SIGLIP_BASE, vit.JSON_FIELDS)),
        language=gemma_json.GEMMAS[kind](text),
        image_token_id=model_json.number(
            data, "image_token_id", model_json.number(data, "image_token_index", 256000)
        ),
        reference_version=model_json.number(data, "transformers_version", ""),
    )


def to_json(config: PaliGemmaConfig) -> dict[str, Any]:
    """Returns the `config.json` of a config."""
    language, dim = config.language, config.language.hidden_size
    text = {
        "model_type": "gemma",
        **rotary_decoder.to_json(language),
        "hidden_activation": language.activation,
        "num_image_tokens": config.tokens_per_image,
    }
    if language.post_norms:
        text |= {
            "model_type": "gemma2",
            "attn_logit_softcapping": language.score_cap,
            "final_logit_softcapping": language.logit_cap,
            "query_pre_attn_scalar": round(language.query_scale**-2),
            "sliding_window": language.sliding_window,
            "layer_types": [
                "sliding_attention" if slides else "full_attention"
                for slides in language.sliding_layers
            ],
        }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "hidden_size": dim,
        "projection_dim": dim,
        "image_token_index": config.image_token_id,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "projection_dim": dim,
            "vision_use_head": False,
            **model_json.write(config.vision, vit.JSON_FIELDS),
        },
    }


def prompt(config: PaliGemmaConfig, tokenizer: Any, text: str) -> Sequence[int]:
    """Returns the ids of a step's prompt, with `IMAGE` for every feature of an image."""
    num_images, count = len(config.options.cameras), config.tokens_per_image
    if config.options.layout == "native":
        ids = prompts.paligemma(tokenizer, text, num_images, count)
        return sequence.mark_images(ids, tokenizers.token_id(tokenizer, "<image>"))
    first, *others = tokenizers.ids(tokenizer, f"<eos>{text}\n", special=False)
    return [first, *[IMAGE] * (num_images * count), *others]


# What `PaliGemmaConfig` takes for a whole `text_config` or `vision_config` that is absent.
_ABSENT_TEXT = {
    "hidden_size": 2048,
    "num_hidden_layers": 18,
    "intermediate_size": 16384,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 257152,
}
_ABSENT_VISION = {
    "intermediate_size": 4096,
    "hidden_size": 1152,
    "patch_size": 14,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}

MODEL = VisionLanguageModel(
    config=PaliGemmaConfig,
    model_types=("paligemma",),
    from_json=from_json,
    to_json=to_json,
    shapes=shapes,
    tensors=tensors,
    renames=(
        # names of live modules, and of files of transformers 4
        (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
        (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
        (r"^vision_tower\.vision_model\.", "vision_tower."),
    ),
    live_names=(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(?=vision_tower\.|multi_modal_projector\.)", "model."),
    ),
    ignored=(
        r"(language_model\.)?lm_head\.weight",
        r"vision_tower\.head\..*",
        r".*rotary_emb\.inv_freq",
        r".*position_ids",
    ),
    hidden_states=hidden_states,
    language_model=language_model,
    forward=forward,
    prompt=prompt,
    read_images=image_settings.read_paligemma,
    image_sizes=lambda config: {"size": config.vision.image_size},
    embed=embed,
)
