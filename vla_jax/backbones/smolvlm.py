"""SmolVLM and SmolVLM2: a SigLIP vision tower, pixel shuffling, and a Llama language model.

Source: Marafioti et al. 2025 (arXiv:2504.05299); Laurençon et al. 2024, Idefics3
(arXiv:2408.12637); as in Hugging Face's `SmolVLMForConditionalGeneration`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from vla_jax.backbones import (
    camera_images,
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
from vla_jax.backbones.sequence import PADDING
from vla_jax.backbones.tensor_names import Tensor
from vla_jax.backbones.vit import VisionConfig
from vla_jax.backbones.vlm import VisionLanguageModel, VLMSizes
from vla_jax.backbones.vlm_options import VLMOptions
from vla_jax.config import checked
from vla_jax.types import Array, Params


@dataclass(frozen=True)
@checked()
class SmolVLMConfig(VLMSizes):
    """SmolVLM or SmolVLM2 as a backbone; the default is SmolVLM2 500M."""

    SUPPORTED: ClassVar[Mapping[str, tuple[str, ...]]] = {**vlm.ALL, "layout": ("native",)}

    kind: Literal["smolvlm"] = "smolvlm"
    vision: VisionConfig = VisionConfig(  # sizes of the vision tower
        hidden_size=768,
        intermediate_size=3072,
        num_layers=12,
        num_heads=12,
        image_size=512,
        patch_size=16,
    )
    language: RotaryDecoderConfig = RotaryDecoderConfig(
        tied_head=False
    )  # sizes of the language model
    shuffle: int = 4  # patches along each side that are joined into one token
    image_token_id: int = 49190  # id of an image's places in the original's inputs
    # version of transformers whose faults `reference.forward` reproduces; the policy never does
    reference_version: str = ""
    # resampling and normalisation of images
    images: Preprocessing = Preprocessing("lanczos", HALF, HALF)
    options: VLMOptions = VLMOptions()  # cameras, prompt, readout, precision

    def __post_init__(self):
        if self.shuffle < 1 or self.vision.grid_size % self.shuffle:
            raise ValueError(
                f"shuffle must divide the {self.vision.grid_size} patches along a side, got "
                f"{self.shuffle}."
            )
        super().__post_init__()  # it counts the tokens of an image

    @property
    def tokens_per_image(self) -> int:
        """Positions of the sequence that one image takes."""
        return (self.vision.grid_size // self.shuffle) ** 2

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        return self.vision.image_size, self.vision.image_size


def image_tokens(
    params: Params,
    config: SmolVLMConfig,
    pixels: Array,
    *,
    patch_mask: np.ndarray | None = None,
    shrink: float = 0.0,
) -> jax.Array:
    """Returns the tokens of images.

    Args:
      params: of the model.
      config: of the model.
      pixels: normalised images `[I, h, w, 3]`.
      patch_mask: bool `[I, rows, columns]`, True where a patch is real; None = everywhere.
      shrink: relative reduction of the patches' coordinates, which shifts position embeddings;
        1e-6 is a fault of transformers 4.57.

    Returns:
      `[I, tokens_per_image, D]` in the dtype of the options.
    """
    size = config.vision
    full = np.ones((1, size.grid_size, size.grid_size), bool)
    features = vit.siglip(
        params["vision"],
        size,
        jnp.asarray(pixels, config.options.dtype),
        positions=_positions(size, full if patch_mask is None else patch_mask, shrink),
        mask=None if patch_mask is None else patch_mask.reshape(len(patch_mask), -1),
        remat=config.options.remat,
    )
    shuffled = rearrange(
        features,
        "I (h p w q) D -> I (h w) (p q D)",
        h=size.grid_size // config.shuffle,
        p=config.shuffle,
        q=config.shuffle,
    )
    return linear(params["projection"], shuffled)


def language_model(
    params: Params, config: SmolVLMConfig, embeddings: Array, positions: Array, mask: Array
) -> jax.Array:
    """Returns the hidden states after the last norm.

    Args:
      params: of the model.
      config: of the model.
      embeddings: from `embed`, `[B, T, D]`.
      positions: `[B or 1, T]`, from 0.
      mask: bool `[B, T, T]`, True where a query attends to a key.

    Returns:
      `[B, T, D]` float32.
    """
    return rotary_decoder.apply(
        params["language"],
        config.language,
        embeddings,
        rotary_decoder.rotary_angles(config.language, positions),
        mask,
        dtype=config.options.dtype,
        remat=config.options.remat,
    )


def embed(params: Params, config: SmolVLMConfig, ids: Array, images: Array) -> jax.Array:
    """Returns the embeddings `[B, S, D]` of sequences `[B, S]` with their images."""
    text = rotary_decoder.embed(params["language"], config.language, ids)
    encode = partial(image_tokens, params, config)
    return camera_images.embed(params, config, ids, images, text=text, encode=encode)


def hidden_states(params: Params, config: SmolVLMConfig, ids: Array, images: Array) -> jax.Array:
    """Returns the hidden states `[B, S, D]` of sequences `[B, S]` with their images."""
    embeddings = embed(params, config, ids, images)
    positions, mask = sequence.positions(ids, config.options), sequence.causal_mask(ids != PADDING)
    return language_model(params, config, embeddings, positions, mask)


def forward(
    params: Params, config: SmolVLMConfig, inputs: Mapping[str, Array]
) -> dict[str, jax.Array]:
    """Returns the outputs of the original's forward; see `reference.forward`.

    Args:
      params: of the model.
      config: of the model.
      inputs: `input_ids [B, T]`; optional `attention_mask [B, T]`, `pixel_values
        [B, I, 3, h, w]`, whose images of zeros do not count, and `pixel_attention_mask
        [B, I, h, w]`.
    """
    ids = jnp.asarray(inputs["input_ids"])
    embeddings = rotary_decoder.embed(params["language"], config.language, ids)
    if "pixel_values" in inputs:
        pixels = np.moveaxis(np.asarray(inputs["pixel_values"]), 2, -1)
        pixels = pixels.reshape(-1, *pixels.shape[2:])
        is_real = np.any(pixels != 0, axis=(1, 2, 3))
        is_real[0] |= not is_real.any()
        mask = np.asarray(inputs.get("pixel_attention_mask", np.ones_like(pixels[..., 0])))
        patch_mask = _patch_mask(config.vision, mask.reshape(-1, *mask.shape[-2:]))
        images = image_tokens(
            params,
            config,
            pixels[is_real],
            patch_mask=patch_mask[is_real],
            shrink=1e-6 if config.reference_version.startswith("4.57.") else 0.0,
        )
        is_image = np.asarray(inputs["input_ids"]) == config.image_token_id
        embeddings = sequence.scatter(embeddings, is_image, images)
    mask = jnp.asarray(inputs.get("attention_mask", jnp.ones_like(ids))).astype(bool)
    positions = np.arange(mask.shape[1])[None]
    hidden = language_model(params, config, embeddings, positions, sequence.causal_mask(mask))
    logits = rotary_decoder.logits(params["language"], config.language, hidden)
    return {"last_hidden": hidden, "logits": logits}


def shapes(config: SmolVLMConfig) -> Params:
    """Returns the shapes of the params."""
    size = config.vision.hidden_size * config.shuffle**2
    return {
        "vision": vit.siglip_shapes(config.vision),
        "projection": {"kernel": (size, config.language.hidden_size)},
        "language": rotary_decoder.shapes(config.language),
    }


def tensors(config: SmolVLMConfig) -> tuple[Tensor, ...]:
    """Returns the places of the params in a file."""
    return tensor_names.join(
        vit.siglip_tensors(config.vision, "vision", "model.vision_model"),
        tensor_names.linear("projection", "model.connector.modality_projection.proj", bias=False),
        rotary_decoder.tensors(
            config.language, "language", "model.text_model", head_name="lm_head"
        ),
    )


def from_json(data: Mapping[str, Any]) -> SmolVLMConfig:
    """Returns the config of a `config.json`."""
    text = model_json.section(data, "text_config", absent={"rms_norm_eps": 1e-5})
    vision = model_json.section(data, "vision_config")
    for name in ("attention_bias", "mlp_bias"):
        model_json.only(text, name, False)
    tied = any(model_json.number(d, "tie_word_embeddings", False) for d in (data, text))
    return SmolVLMConfig(
        vision=VisionConfig(**model_json.read(vision, _VISION, vit.JSON_FIELDS)),
        language=RotaryDecoderConfig(**rotary_decoder.from_json(text, _LLAMA), tied_head=tied),
        shuffle=model_json.number(data, "scale_factor", 2),
        image_token_id=model_json.number(data, "image_token_id", 128257),
        reference_version=model_json.number(data, "transformers_version", ""),
    )


def to_json(config: SmolVLMConfig) -> dict[str, Any]:
    """Returns the `config.json` of a config."""
    tied = config.language.tied_head
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": config.image_token_id,
        "scale_factor": config.shuffle,
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "llama",
            **rotary_decoder.to_json(config.language),
            "tie_word_embeddings": tied,
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            **model_json.write(config.vision, vit.JSON_FIELDS),
        },
    }


def prompt(config: SmolVLMConfig, tokenizer: Any, text: str) -> Sequence[int]:
    """Returns the ids of a step's prompt, with `IMAGE` for every feature of an image."""
    num_images = len(config.options.cameras)
    ids = prompts.smolvlm(tokenizer, text, num_images, config.tokens_per_image)
    return sequence.mark_images(ids, tokenizers.token_id(tokenizer, "<image>"))


def _patch_mask(config: VisionConfig, mask: np.ndarray) -> np.ndarray:
    """Returns which patches hold a real pixel, bool `[I, rows, columns]`, of a mask `[I, h, w]`."""
    size = config.patch_size
    whole = mask[:, : mask.shape[1] // size * size, : mask.shape[2] // size * size]
    return reduce(whole.astype(bool), "I (h p) (w q) -> I h w", "max", p=size, q=size)


def _positions(config: VisionConfig, patch_mask: np.ndarray, shrink: float) -> np.ndarray:
    """Returns the index `[I, S]` of each patch's position embedding.

    The position of a patch is relative to the real part of its image. The arithmetic is float32, as
    in the original: it decides on which side of a boundary a patch falls.

    Source: Dehghani et al. 2023, NaViT (arXiv:2307.06304); `SmolVLMVisionEmbeddings`.
    """
    size = config.grid_size
    boundaries = np.arange(1 / size, 1.0, 1 / size).astype(np.float32)

    def buckets(counts: np.ndarray, num_patches: int) -> np.ndarray:
        step = np.float32(1.0) / counts.astype(np.float32)
        fraction = np.arange(num_patches, dtype=np.float32) * step[:, None]
        fraction = fraction * np.float32(1.0 - shrink)
        fraction = np.minimum(fraction, np.float32(1.0 - 1e-6))
        return np.searchsorted(boundaries, fraction, side="right")

    _, height, width = patch_mask.shape
    rows = buckets(patch_mask[:, :, 0].sum(1), height)
    columns = buckets(patch_mask[:, 0, :].sum(1), width)
    index = rows[:, :, None] * size + columns[:, None, :]
    return np.where(patch_mask, index, 0).reshape(len(patch_mask), -1)


_VISION = VisionConfig(
    hidden_size=1152, intermediate_size=3072, num_layers=12, num_heads=16, patch_size=32
)  # defaults of Hugging Face's `SmolVLMVisionConfig`
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_layers": 32,
    "num_heads": 32,
    "activation": "silu",
    "epsilon": 1e-6,
    "rope_theta": 10_000.0,
}  # of its text model

MODEL = VisionLanguageModel(
    config=SmolVLMConfig,
    model_types=("smolvlm", "idefics3"),
    from_json=from_json,
    to_json=to_json,
    shapes=shapes,
    tensors=tensors,
    renames=((r"^(?=(text_model|vision_model|connector)\.)", "model."),),
    live_names=(),
    ignored=(r"lm_head\.weight", r".*rotary_emb\.inv_freq", r".*position_ids"),
    hidden_states=hidden_states,
    language_model=language_model,
    forward=forward,
    prompt=prompt,
    read_images=image_settings.read_smolvlm,
    image_sizes=lambda config: {"crop_size": config.vision.image_size},
    embed=embed,
)
