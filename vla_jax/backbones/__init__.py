"""Backbones: images and an instruction to tokens `[..., N, D]`.

`config, params = backbones.load(folder)` reads a vision-language model in Hugging Face's format;
`backbones.reference.forward(params, config, inputs)` computes what the original's forward does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_jax.backbones import reference
    from vla_jax.backbones.weight_export import export
    from vla_jax.backbones.weights import load, load_config

_MODULES = {"export": "weight_export", "load": "weights", "load_config": "weights"}
__all__ = ["export", "load", "load_config", "reference"]


def __getattr__(name: str) -> Any:
    # On first use, since the modules of this package import it.
    if name == "reference":
        return importlib.import_module("vla_jax.backbones.reference")
    if name in _MODULES:
        return getattr(importlib.import_module(f"vla_jax.backbones.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'vla_jax.backbones' has no attribute '{name}'")
