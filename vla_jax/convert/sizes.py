"""Sizes read off the names and shapes of tensors, whichever of them are there."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from vla_jax.convert.conversion_report import Shape, check, compare
from vla_jax.nn import recurrence
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.types import Params


def read_size(shapes: Mapping[str, Shape], axis: int, *names: str) -> int | None:
    """Returns the length of an axis of the first tensor that has it, None where none has.

    Args:
      shapes: of the tensors, by name.
      axis: which one.
      names: regular expressions of whole names, tried one after the other.
    """
    for pattern in names:
        for name, shape in shapes.items():
            if re.fullmatch(pattern, name) and axis < len(shape) and shape[axis]:
                return shape[axis]
    return None


def count_layers(names: Iterable[str], pattern: str) -> int:
    """Returns one more than the highest number that the pattern's group finds, at least 1."""
    found = (re.fullmatch(pattern, name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=0)


def check_known(
    unknown: Sequence[str], expected: Mapping[str, Shape], shapes: Mapping[str, Shape], remedy: str
) -> None:
    """Raises a ValueError with the names of all missing tensors where sizes are unknown.

    Args:
      unknown: sizes that no tensor says.
      expected: name to shape of what is needed; only the number of axes matters.
      shapes: of the tensors, by name.
      remedy: how the sentence ends.
    """
    if unknown:
        missing = [
            name for name, shape in expected.items() if len(shapes.get(name, ())) != len(shape)
        ]
        raise ValueError(
            f"{' and '.join(unknown)} cannot be read off the tensors, where {len(missing)} are "
            f"missing or have other axes: {', '.join(missing)}; {remedy}."
        )


def check_config(config: Any, kind: type) -> None:
    """Raises a ValueError where something else stands in a config's place.

    Args:
      config: what a user gave.
      kind: class that it must be of.
    """
    if not isinstance(config, kind):
        raise ValueError(
            f"config must be a {kind.__name__}, got a {type(config).__name__}; it comes first, "
            "and then the params."
        )


def check_params(config: RecurrenceConfig, params: Params) -> None:
    """Raises a ValueError unless the params are those of the recurrence.

    Args:
      config: what a user gave for it.
      params: of any input size.
    """
    check_config(config, RecurrenceConfig)
    given: dict[str, Any] = flatten_dict(params, sep="/")
    shapes = {path: tuple(leaf.shape) for path, leaf in given.items()}
    input_size = read_size(shapes, 0, "layers_0/forward/input_kernel")
    expected = recurrence_shapes(config, input_size or 1)
    check(
        compare(expected, given),
        "params must be all those of one recurrence",
        "give all layers from below, of one hidden size, and the config they were made with",
    )


def recurrence_shapes(config: RecurrenceConfig, input_size: int) -> dict[str, Shape]:
    """Returns path to shape of every param of a recurrence, such as `layers_0/forward/…`."""
    params = jax.eval_shape(lambda key: recurrence.init(key, config, input_size), jax.random.key(0))
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}
