"""Tiny configs of the vision-language models, with hashed words, and random params for them."""

import dataclasses
import functools

import jax
import numpy as np

from vla_jax.backbones import qwen_vision
from vla_jax.backbones.kosmos2 import Kosmos2Config
from vla_jax.backbones.kosmos_decoder import KosmosDecoderConfig
from vla_jax.backbones.models import MODELS
from vla_jax.backbones.paligemma import PaliGemmaConfig
from vla_jax.backbones.qwen3_vision import Qwen3VisionConfig
from vla_jax.backbones.qwen3_vl import Qwen3VLConfig
from vla_jax.backbones.qwen25_vision import Qwen25VisionConfig
from vla_jax.backbones.qwen25_vl import Qwen25VLConfig
from vla_jax.backbones.registry import BACKBONES
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.backbones.smolvlm import SmolVLMConfig
from vla_jax.backbones.vit import VisionConfig
from vla_jax.backbones.vlm_options import VLMOptions

VISION = VisionConfig(
    hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2, image_size=16, patch_size=4
)
LANGUAGE = RotaryDecoderConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
QWEN_VISION = {
    "hidden_size": 8, "intermediate_size": 16, "num_layers": 2, "num_heads": 2, "patch_size": 4,
}  # fmt: skip
IMAGE_ID = 63  # of the original's inputs
OPTIONS = VLMOptions(max_text_tokens=6, proprio_dim=8)
CONFIGS = {
    "kosmos2": Kosmos2Config(
        vision=VISION,
        language=KosmosDecoderConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2
        ),
        num_latents=3,
        options=OPTIONS,
    ),
    "paligemma": PaliGemmaConfig(
        vision=VISION, language=LANGUAGE, image_token_id=IMAGE_ID, options=OPTIONS
    ),
    "qwen3_vl": Qwen3VLConfig(
        vision=Qwen3VisionConfig(**QWEN_VISION, num_positions=9, deepstack_layers=(0,)),
        language=dataclasses.replace(LANGUAGE, qk_norm=True),
        rope_sections=(2, 1, 1),
        image_size=(16, 16),
        image_token_id=IMAGE_ID,
        options=OPTIONS,
    ),
    "qwen25_vl": Qwen25VLConfig(
        vision=Qwen25VisionConfig(**QWEN_VISION, window_size=8, full_layers=(1,)),
        language=dataclasses.replace(LANGUAGE, qkv_bias=True),
        rope_sections=(2, 1, 1),
        image_size=(16, 16),
        image_token_id=IMAGE_ID,
        options=OPTIONS,
    ),
    "smolvlm": SmolVLMConfig(
        vision=VISION, language=LANGUAGE, shuffle=2, image_token_id=IMAGE_ID, options=OPTIONS
    ),
}
assert CONFIGS.keys() == MODELS.keys()


@functools.cache
def params(config):
    """Random params with entries of order 0.3, so that every part matters."""
    tree = jax.jit(BACKBONES[config.kind].init, static_argnums=1)(jax.random.key(0), config)
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [
        0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, [a + b for a, b in zip(leaves, noise, strict=True)])


def image_inputs(config, pixels, is_image):
    """Inputs of the original's forward for normalised images `[B·C, h, w, 3]` of two cameras."""
    return _IMAGE_INPUTS[config.kind](config, pixels, is_image)


def _plain(config, pixels, is_image):
    return {"pixel_values": np.moveaxis(pixels, -1, 1)}


def _kosmos2(config, pixels, is_image):
    return {"pixel_values": np.moveaxis(pixels, -1, 1), "image_embeds_position_mask": is_image}


def _smolvlm(config, pixels, is_image):
    flat = np.moveaxis(pixels, -1, 1)
    return {"pixel_values": flat.reshape(-1, 2, *flat.shape[1:])}


def _qwen(config, pixels, is_image):
    patches = np.asarray(qwen_vision.patches(config.vision, pixels))
    return {
        "pixel_values": patches.reshape(-1, patches.shape[-1]),
        "image_grid_thw": np.tile((1, *config.grid), (len(patches), 1)),
    }


_IMAGE_INPUTS = {
    "kosmos2": _kosmos2,
    "paligemma": _plain,
    "smolvlm": _smolvlm,
    "qwen3_vl": _qwen,
    "qwen25_vl": _qwen,
}
