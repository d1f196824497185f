"""The `adapter_config.json` of a PEFT adapter: ranks and scales of its factors."""

import collections
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vla_jax.backbones import model_json
from vla_jax.files import read_json

# Others change the weights of the model when the adapter is loaded.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_UNSUPPORTED = (
    "alora_invocation_tokens", "layer_replication", "lora_bias", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip
_HARMLESS = ("use_rslora", "eva_config", "loftq_config", "megatron_config")


class Settings(NamedTuple):
    """Ranks and scales of an adapter, by the names of live modules."""

    default_rank: int
    default_alpha: float
    rank_stabilized: bool  # scale by alpha / √rank instead of alpha / rank
    ranks: Mapping[str, int]  # regular expression of names -> rank
    alphas: Mapping[str, float]  # regular expression of names -> alpha

    def rank(self, name: str) -> int:
        """Rank r of a module."""
        return _lookup(self.ranks, name, self.default_rank)

    def scale(self, name: str) -> float:
        """Factor of a module's update."""
        alpha, rank = _lookup(self.alphas, name, self.default_alpha), self.rank(name)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read(path: pathlib.Path) -> Settings:
    """Returns the settings of an `adapter_config.json`.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it is damaged, or of an adapter that is not supported.
    """
    data = read_json(path, "the config of a PEFT adapter")
    try:
        _check_supported(data)
        return Settings(
            model_json.number(data, "r", 8, least=1),
            model_json.number(data, "lora_alpha", 8.0),
            model_json.number(data, "use_rslora", False),
            _patterns(data, "rank_pattern", 1, least=1),
            _patterns(data, "alpha_pattern", 1.0),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_json(modules: Sequence[tuple[str, int, float]], saved: Sequence[str]) -> dict[str, Any]:
    """Returns the `adapter_config.json` of an adapter.

    Args:
      modules: (live name, rank, scale) of each adapted module.
      saved: live names of the modules that are stored whole.
    """
    ranks = {name: rank for name, rank, _ in modules}
    alphas = {name: _alpha(rank, scale) for name, rank, scale in modules}
    rank, alpha = (_most_common(values.values()) for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {re.escape(n): value for n, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(n): value for n, value in alphas.items() if value != alpha},
        "target_modules": [name for name, _, _ in modules],
        "modules_to_save": list(saved) or None,
    }


def _check_supported(data: Mapping[str, Any]) -> None:
    """Raises a ValueError for anything but plain LoRA."""
    if data.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be 'LORA', got {data.get('peft_type')!r}.")
    if data.get("bias", "none") != "none":
        raise ValueError(f"bias must be 'none', got {data['bias']!r}; trained biases are not read.")
    if data.get("init_lora_weights", True) not in _INITS:
        raise ValueError(
            f"init_lora_weights {data['init_lora_weights']!r} changes the weights of the model; "
            "convert the adapter to plain LoRA with peft."
        )
    for name, value in data.items():
        is_variant = name.startswith("use_") or name.endswith("_config") or name in _UNSUPPORTED
        if value and is_variant and name not in _HARMLESS:
            raise ValueError(
                f"{name} is not supported; only plain LoRA is, with or without rslora."
            )


def _patterns(
    data: Mapping[str, Any], name: str, default: Any, *, least: int = 0
) -> dict[str, Any]:
    section = model_json.section(data, name)
    for pattern in section:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{name} has {pattern!r}, which is not a regular expression ({error}); restore it."
            ) from error
    return {
        pattern: model_json.number(section, pattern, default, least=least) for pattern in section
    }


def _lookup(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a name, as `peft` does."""
    return next(
        (v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default
    )


def _alpha(rank: int, scale: float) -> float:
    """Returns the alpha that gives a float32 scale with this rank; a whole number if there is one.

    The scale is `alpha / rank`.
    """
    alpha = scale * rank
    whole = round(alpha)
    return whole if np.float32(whole / rank) == np.float32(scale) else alpha


def _most_common(values: Any) -> Any:
    return collections.Counter(values).most_common(1)[0][0]
