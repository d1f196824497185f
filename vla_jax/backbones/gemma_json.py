"""Configs of the language models Gemma and Gemma 2, from the `text_config` of a config.json."""

import math
from collections.abc import Mapping
from typing import Any

from vla_jax.backbones import model_json, rotary_decoder
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig

# Defaults of Hugging Face's `GemmaConfig` and `Gemma2Config`.
_GEMMA_1 = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_layers": 28,
    "num_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "activation": "gelu_pytorch_tanh",
    "epsilon": 1e-6,
    "rope_theta": 10_000.0,
}
_GEMMA_2 = {
    **_GEMMA_1,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_layers": 26,
    "num_heads": 8,
    "num_key_value_heads": 4,
}


def gemma_1(text: Mapping[str, Any]) -> RotaryDecoderConfig:
    """Returns Gemma's config."""
    return RotaryDecoderConfig(**_gemma_fields(text, _GEMMA_1))


def gemma_2(text: Mapping[str, Any]) -> RotaryDecoderConfig:
    """Returns Gemma 2's config."""
    fields = _gemma_fields(text, _GEMMA_2)
    alternating = [
        "full_attention" if i % 2 else "sliding_attention" for i in range(fields["num_layers"])
    ]
    types = model_json.number(text, "layer_types", alternating)
    known = {"full_attention", "sliding_attention"}
    if len(types) != len(alternating) or not all(t in known for t in map(str, types)):
        raise ValueError(
            f"layer_types must have one of {sorted(known)} for each of the {len(alternating)} "
            f"layers, got {types}."
        )
    return RotaryDecoderConfig(
        **fields,
        query_scale=model_json.number(text, "query_pre_attn_scalar", 256.0) ** -0.5,
        post_norms=True,
        score_cap=_optional(text, "attn_logit_softcapping", 50.0),
        logit_cap=_optional(text, "final_logit_softcapping", 30.0),
        sliding_window=_optional(text, "sliding_window", 4096),
        sliding_layers=tuple(name == "sliding_attention" for name in types),
    )


def _gemma_fields(text: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    fields = rotary_decoder.from_json(text, defaults)
    # "gelu" in old configs means the tanh approximation, which Gemma was trained with.
    name = (
        model_json.number(text, "hidden_activation", "")
        or model_json.number(text, "hidden_act", "")
        or "gelu"
    )
    return {
        **fields,
        "activation": "gelu_pytorch_tanh" if name == "gelu" else name,
        "norm_offset": 1.0,
        "embedding_scale": math.sqrt(fields["hidden_size"]),
    }


def _optional(data: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns a field that may be null, which is different from absent."""
    return None if data.get(name, default) is None else model_json.number(data, name, default)


# `model_type` -> config of its `text_config`
GEMMAS = {"gemma": gemma_1, "gemma2": gemma_2}
