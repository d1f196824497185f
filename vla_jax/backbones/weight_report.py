"""Comparison of the tensors of a file with those that a config describes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from vla_jax.backbones import tensor_names
from vla_jax.backbones.safetensors_files import StoredTensor
from vla_jax.backbones.tensor_names import Place
from vla_jax.backbones.vlm import VisionLanguageModel
from vla_jax.files import Path

Value = TypeVar("Value")


class LoadReport(NamedTuple):
    """Names of tensors, after renaming."""

    used: tuple[str, ...]  # tensors of the file that become params
    missing: tuple[str, ...]  # tensors that the model needs and the file lacks
    left_over: tuple[str, ...]  # tensors of the file that the model does not know
    ignored: tuple[str, ...]  # tensors of the file that the model does not need


def rename(model: VisionLanguageModel, name: str) -> str:
    """Returns the name that a tensor has in the model's table, whatever wrote the file."""
    for pattern, replacement in model.renames:
        name = re.sub(pattern, replacement, name)
    return name


def rename_all(
    model: VisionLanguageModel, stored: Mapping[str, Value], folder: Path
) -> dict[str, Value]:
    """Returns the entries under the names of the model's table.

    Raises:
      ValueError: two entries get the same name.
    """
    names: dict[str, str] = {}
    for name in stored:
        other = names.setdefault(rename(model, name), name)
        if other != name:
            raise ValueError(
                f"{folder} has the same tensor under two names, {other} and {name}; delete one, or "
                "download the model again."
            )
    return {new: stored[old] for new, old in names.items()}


def compare(model: VisionLanguageModel, config: Any, names: Iterable[str]) -> LoadReport:
    """Returns which tensors of a file are used, missing, left over and ignored.

    `load` refuses a file with missing or left-over tensors. Ignored are those that the original has
    besides, such as buffers of positions and a second copy of a tied head.

    Args:
      model: the model, from `models.get(config)`.
      config: its config.
      names: of the tensors of the file, under the names of the model's table (`rename`).
    """
    return _compare(model, tensor_names.places(model.tensors(config), model.shapes(config)), names)


def check(
    model: VisionLanguageModel,
    folder: Path,
    stored: Mapping[str, StoredTensor],
    places: Mapping[str, Place],
) -> None:
    """Raises a ValueError for the first difference between a file and the config.

    Args:
      model: the model.
      folder: of the file, for the messages.
      stored: tensors from `rename_all`.
      places: of the tensors that the config describes.
    """
    report = _compare(model, places, stored)
    for names, problem in (
        (report.missing, f"lacks {{}} of {len(places)} tensors that its config.json needs"),
        (report.left_over, "has {} tensors that its config.json does not describe"),
    ):
        if names:
            raise ValueError(
                f"{folder} {problem.format(len(names))}: {_abbreviate(names)}; check that "
                "config.json and weights belong to the same, complete model."
            )
    for name, place in places.items():
        found = stored[name]
        if found.shape != place.shape:
            raise ValueError(
                f"{found.file}: {name} must be {list(place.shape)} by config.json, got "
                f"{list(found.shape)}; check that both belong to the same model."
            )


def _compare(
    model: VisionLanguageModel, places: Mapping[str, Place], names: Iterable[str]
) -> LoadReport:
    names = dict.fromkeys(names)
    others = [name for name in names if name not in places]
    ignored = {n for n in others if any(re.fullmatch(p, n) for p in model.ignored)}
    return LoadReport(
        used=tuple(name for name in places if name in names),
        missing=tuple(name for name in places if name not in names),
        left_over=tuple(name for name in others if name not in ignored),
        ignored=tuple(name for name in others if name in ignored),
    )


def _abbreviate(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
