"""Tiny configs of the vision-language models, with hashed words, and random params for them."""

import functools

import jax

from vla_jax.backbones.kosmos2 import Kosmos2Config
from vla_jax.backbones.kosmos_decoder import KosmosDecoderConfig
from vla_jax.backbones.models import MODELS
from vla_jax.backbones.paligemma import PaliGemmaConfig
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
        vision=VISION, language=LANGUAGE, image_token_id=63, options=OPTIONS
    ),
    "smolvlm": SmolVLMConfig(
        vision=VISION, language=LANGUAGE, shuffle=2, image_token_id=63, options=OPTIONS
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
