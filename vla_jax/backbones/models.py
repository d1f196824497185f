"""Registry of the vision-language models, by the `kind` of their config."""

from collections.abc import Mapping
from typing import Any

from vla_jax.backbones import kosmos2, paligemma, qwen3_vl, qwen25_vl, smolvlm, tensor_names
from vla_jax.backbones.tensor_names import Place
from vla_jax.backbones.vlm import VisionLanguageModel
from vla_jax.config import did_you_mean

MODELS: dict[str, VisionLanguageModel] = {
    "kosmos2": kosmos2.MODEL,
    "paligemma": paligemma.MODEL,
    "qwen3_vl": qwen3_vl.MODEL,
    "qwen25_vl": qwen25_vl.MODEL,
    "smolvlm": smolvlm.MODEL,
}
MODEL_TYPES = {name: kind for kind, model in MODELS.items() for name in model.model_types}


def get(config: Any) -> VisionLanguageModel:
    """Returns the model of a config.

    Raises:
      ValueError: the config is of another backbone.
    """
    if config.kind not in MODELS:
        raise ValueError(
            f"config must be of a vision-language model, got '{config.kind}'; "
            f"{did_you_mean(config.kind, MODELS)}"
        )
    return MODELS[config.kind]


def kind_of(data: Mapping[str, Any]) -> str:
    """Returns the kind of a model's `config.json`.

    Raises:
      ValueError: the model is not supported.
    """
    name = data.get("model_type")
    if not isinstance(name, str) or name not in MODEL_TYPES:
        raise ValueError(f"unknown model_type {name!r}; {did_you_mean(str(name), MODEL_TYPES)}")
    return MODEL_TYPES[name]


def from_json(data: Mapping[str, Any]) -> Any:
    """Returns the config of a model's `config.json`.

    Raises:
      ValueError: the model is not supported, or a field is.
    """
    return MODELS[kind_of(data)].from_json(data)


def places(config: Any) -> dict[str, Place]:
    """Returns name in a model's file -> place in its params, in the order of the table."""
    model = get(config)
    return tensor_names.places(model.tensors(config), model.shapes(config))
