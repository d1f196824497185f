"""Kosmos-2: a CLIP vision tower, a latent projection, and a decoder with sub-layer norms.

Source: Peng et al. 2023 (arXiv:2306.14824); Wang et al. 2022, Magneto (arXiv:2210.06423); as in
Hugging Face's `Kosmos2ForConditionalGeneration`.
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
    image_settings,
    kosmos_decoder,
    model_json,
    prompts,
    sequence,
    tensor_names,
    tokenizers,
    vit,
    vlm,
)
from vla_jax.backbones.blocks import (
    layer_norm,
    linear,
    patches,
    split_heads,
)
from vla_jax.backbones.image_settings import CLIP_MEAN, CLIP_STD, Preprocessing
from vla_jax.backbones.kosmos_decoder import ATTENTION_NAMES, PROJECTIONS, KosmosDecoderConfig
from vla_jax.backbones.sequence import IMAGE, PADDING
from vla_jax.backbones.tensor_names import SAME, Tensor
from vla_jax.backbones.vit import VisionConfig
from vla_jax.backbones.vlm import VisionLanguageModel, VLMSizes
from vla_jax.backbones.vlm_options import VLMOptions
from vla_jax.config import checked
from vla_jax.nn.rotary import grouped_attention
from vla_jax.types import Array, Params


@dataclass(frozen=True)
@checked(num_latents=(1, 2**16))
class Kosmos2Config(VLMSizes):
    """Kosmos-2 as a backbone."""

    SUPPORTED: ClassVar[Mapping[str, tuple[str, ...]]] = vlm.ALL

    kind: Literal["kosmos2"] = "kosmos2"
    vision: VisionConfig = VisionConfig(  # sizes of the vision tower
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=24,
        activation="quick_gelu",
        epsilon=1e-5,
    )
    language: KosmosDecoderConfig = KosmosDecoderConfig()  # sizes of the language model
    num_latents: int = 64  # tokens of an image in the sequence
    # version of transformers whose faults `reference.forward` reproduces; the policy never does
    reference_version: str = ""
    # resampling and normalisation of images
    images: Preprocessing = Preprocessing("bicubic", CLIP_MEAN, CLIP_STD)
    options: VLMOptions = VLMOptions(  # cameras, prompt, readout, precision
        prompt="<grounding>An image of a robot {instruction}"
    )

    @property
    def tokens_per_image(self) -> int:
        """Positions of the sequence that one image takes."""
        return self.num_latents

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        return self.vision.image_size, self.vision.image_size


def image_tokens(
    params: Params, config: Kosmos2Config, pixels: Array, *, causal: bool = False
) -> jax.Array:
    """Returns the tokens of images.

    Args:
      params: of the model.
      config: of the model.
      pixels: normalised images `[I, h, w, 3]`.
      causal: latent i attends to the first i + 1 patch features only, a fault of transformers 4.57
        with its default attention.

    Returns:
      `[I, num_latents, D]` in the dtype of the options.
    """
    vision, size, options = params["vision"], config.vision, config.options
    x = linear(vision["patches"], patches(jnp.asarray(pixels, options.dtype), size.patch_size))
    first = jnp.broadcast_to(vision["class_embedding"], (len(x), 1, size.hidden_size))
    x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
    x = (x + jnp.broadcast_to(vision["positions"]["embedding"], x.shape)).astype(x.dtype)
    x = layer_norm(vision["pre_norm"], x, size.epsilon)
    mask = vit.all_patches(x.shape[1])
    x = vit.apply_layers(vision["layers"], size, x, mask=mask, remat=options.remat)
    x = layer_norm(vision["post_norm"], x, size.epsilon).astype(jnp.float32)
    # Unit length, as torch.nn.functional.normalize computes it.
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return _resample(params["projection"], config, x.astype(options.dtype), causal=causal)


def embed(params: Params, config: Kosmos2Config, ids: Array, images: Array) -> jax.Array:
    """Returns the embeddings `[B, S, D]`, not scaled, of sequences `[B, S]` with their images."""
    text = kosmos_decoder.embed(params["language"], config.language, ids)
    encode = partial(image_tokens, params, config)
    return camera_images.embed(params, config, ids, images, text=text, encode=encode)


def hidden_states(params: Params, config: Kosmos2Config, ids: Array, images: Array) -> jax.Array:
    """Returns the hidden states `[B, S, D]` of sequences `[B, S]` with their images."""
    embeddings = embed(params, config, ids, images)
    positions, mask = sequence.positions(ids, config.options), sequence.causal_mask(ids != PADDING)
    return language_model(params, config, embeddings, positions, mask)


def language_model(
    params: Params, config: Kosmos2Config, embeddings: Array, positions: Array, mask: Array
) -> jax.Array:
    """Returns the hidden states after the last norm.

    Args:
      params: of the model.
      config: of the model.
      embeddings: from `embed`, `[B, T, D]`.
      positions: `[B, T]`, from 0.
      mask: bool `[B, T, T]`, True where a query attends to a key.

    Returns:
      `[B, T, D]` float32.
    """
    return kosmos_decoder.apply(
        params["language"],
        config.language,
        embeddings,
        config.language.padding_id + 1 + positions,
        mask,
        dtype=config.options.dtype,
        remat=config.options.remat,
    )


def forward(
    params: Params, config: Kosmos2Config, inputs: Mapping[str, Array]
) -> dict[str, jax.Array]:
    """Returns the outputs of the original's forward; see `reference.forward`.

    Args:
      params: of the model.
      config: of the model.
      inputs: `input_ids [B, T]`; optional `attention_mask [B, T]`, `pixel_values [I, 3, h, w]` or
        `image_embeds [I, num_latents, D]`, `image_embeds_position_mask [B, T]`.
    """
    ids, language = jnp.asarray(inputs["input_ids"]), config.language
    embeddings = kosmos_decoder.embed(params["language"], language, ids)
    images = inputs.get("image_embeds")
    if images is None and "pixel_values" in inputs:
        pixels = jnp.moveaxis(jnp.asarray(inputs["pixel_values"]), 1, -1)
        causal = config.reference_version.startswith("4.57.")
        images = image_tokens(params, config, pixels, causal=causal)
    if images is not None:
        is_image = np.asarray(inputs["image_embeds_position_mask"]).astype(bool)
        embeddings = sequence.scatter(embeddings, is_image, images)
    real = ids != language.padding_id
    mask = jnp.asarray(inputs.get("attention_mask", jnp.ones_like(ids))).astype(bool)
    positions = jnp.cumsum(real, axis=1) * real - 1
    hidden = language_model(params, config, embeddings, positions, sequence.causal_mask(mask))
    logits = jnp.matmul(hidden, params["language"]["embed"]["embedding"].T)
    return {"last_hidden": hidden, "logits": logits}


def shapes(config: Kosmos2Config) -> Params:
    """Returns the shapes of the params."""
    vision, language, dim = config.vision, config.language, config.language.hidden_size
    num_patches = vision.grid_size**2
    norm = {"scale": (vision.hidden_size,), "bias": (vision.hidden_size,)}
    square = {"kernel": (dim, dim), "bias": (dim,)}
    return {
        "vision": {
            "patches": {"kernel": (vision.patch_size**2 * 3, vision.hidden_size)},
            "class_embedding": (vision.hidden_size,),
            "positions": {"embedding": (num_patches + 1, vision.hidden_size)},
            "pre_norm": norm,
            "layers": vit.layer_shapes(vision),
            "post_norm": norm,
        },
        "projection": {
            "dense": {"kernel": (vision.hidden_size, dim), "bias": (dim,)},
            "latents": {"embedding": (config.num_latents, dim)},
            **dict.fromkeys((*PROJECTIONS, "out"), square),
        },
        "language": kosmos_decoder.shapes(language),
    }


def tensors(config: Kosmos2Config) -> tuple[Tensor, ...]:
    """Returns the places of the params in a file."""
    vision, embeddings = "vision_model.model", "vision_model.model.embeddings"
    projection = "image_to_text_projection"
    convolution = tensor_names.patch_convolution(config.vision.patch_size)
    return tensor_names.join(
        [
            Tensor("vision/patches/kernel", f"{embeddings}.patch_embedding.weight", convolution),
            Tensor("vision/class_embedding", f"{embeddings}.class_embedding", SAME),
            Tensor("vision/positions/embedding", f"{embeddings}.position_embedding.weight", SAME),
        ],
        tensor_names.norm("vision/pre_norm", f"{vision}.pre_layrnorm", bias=True),
        vit.layer_tensors("vision/layers", f"{vision}.encoder.layers"),
        tensor_names.norm("vision/post_norm", f"{vision}.post_layernorm", bias=True),
        tensor_names.linear("projection/dense", f"{projection}.dense", bias=True),
        [Tensor("projection/latents/embedding", f"{projection}.latent_query", SAME)],
        *(
            tensor_names.linear(
                f"projection/{ours}", f"{projection}.{name.replace('self', 'x')}", bias=True
            )
            for ours, name in ATTENTION_NAMES.items()
        ),
        kosmos_decoder.tensors("language", "text_model.model"),
    )


def from_json(data: Mapping[str, Any]) -> Kosmos2Config:
    """Returns the config of a `config.json`."""
    text = model_json.section(data, "text_config")
    vision = model_json.section(data, "vision_config")
    model_json.only(text, "add_cross_attention", False)
    default = Kosmos2Config()
    decoder = model_json.read(text, default.language, kosmos_decoder.JSON_FIELDS)
    return Kosmos2Config(
        vision=VisionConfig(**model_json.read(vision, default.vision, vit.JSON_FIELDS)),
        language=KosmosDecoderConfig(**decoder),
        num_latents=model_json.number(data, "latent_query_num", default.num_latents),
        reference_version=model_json.number(data, "transformers_version", ""),
    )


def to_json(config: Kosmos2Config) -> dict[str, Any]:
    """Returns the `config.json` of a config."""
    return {
        "architectures": ["Kosmos2ForConditionalGeneration"],
        "model_type": "kosmos-2",
        "latent_query_num": config.num_latents,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "kosmos_2_text_model",
            **model_json.write(config.language, kosmos_decoder.JSON_FIELDS),
        },
        "vision_config": {
            "model_type": "kosmos_2_vision_model",
            **model_json.write(config.vision, vit.JSON_FIELDS),
        },
    }


def _resample(params: Params, config: Kosmos2Config, x: jax.Array, *, causal: bool) -> jax.Array:
    """Returns the tokens `[I, num_latents, D]` of patch features `[I, S, vision features]`."""
    language = config.language
    x = linear(params["dense"], x)
    latents = params["latents"]["embedding"].astype(x.dtype)
    latents = jnp.broadcast_to(latents, (len(x), *latents.shape))
    sources = {"query": latents, "key": jnp.concatenate([x, latents], axis=1)}
    sources["value"] = sources["key"]
    query, key, value = (
        split_heads(linear(params[name], sources[name]), language.num_heads) for name in PROJECTIONS
    )
    num_keys = sources["key"].shape[1]
    mask = jnp.tri(config.num_latents, num_keys, num_keys * (not causal), dtype=bool)[None]
    scale = (language.hidden_size // language.num_heads) ** -0.5
    return linear(params["out"], grouped_attention(query, key, value, mask, scale=scale))


def prompt(config: Kosmos2Config, tokenizer: Any, text: str) -> Sequence[int]:
    """Returns the ids of a step's prompt, with `IMAGE` for every feature of an image."""
    num_images, num_latents = len(config.options.cameras), config.num_latents
    if config.options.layout == "native":
        ids = prompts.kosmos2(tokenizer, text, num_images, num_latents)
        for position in prompts.kosmos2_image_positions(num_images, num_latents):
            ids[position] = IMAGE
        return ids
    first, *others = tokenizers.ids(tokenizer, text, special=True)
    return [first, *[IMAGE] * (num_images * num_latents), *others]


MODEL = VisionLanguageModel(
    config=Kosmos2Config,
    model_types=("kosmos-2",),
    from_json=from_json,
    to_json=to_json,
    shapes=shapes,
    tensors=tensors,
    renames=(
        (r"^model\.(?=text_model|vision_model|image_to_text)", ""),
        (r"\.latent_query\.weight$", ".latent_query"),
    ),
    live_names=(),
    ignored=(r"text_model\.lm_head\.weight", r".*\.embed_positions\.weights", r".*position_ids"),
    hidden_states=hidden_states,
    language_model=language_model,
    forward=forward,
    prompt=prompt,
    read_images=image_settings.read_kosmos2,
    image_sizes=lambda config: {"size": config.vision.image_size, "crop": False},
    embed=embed,
)
