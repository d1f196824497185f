"""Sizes inferred from the names and shapes of tensors, some of which may be missing."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from vla_jax.convert.conversion_report import Shape, check, compare
from vla_jax.nn import recurrence
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.types import Params

MAX_LAYERS = 1000  # of a foreign model


def read_size(shapes: Mapping[str, Shape], axis: int, *names: str) -> int | None:
    """Returns the length of an axis of the first matching tensor that has it, or None.

    Args:
      shapes: of the tensors, by name.
      axis: index of the axis.
      names: regular expressions of complete names, tried in this order.
    """
    for pattern in names:
        for name, shape in shapes.items():
            if re.fullmatch(pattern, name) and axis < len(shape) and shape[axis]:
                return shape[axis]
    return None


def count_layers(names: Iterable[str], pattern: str) -> int:
    """Returns 1 + the largest number that the pattern's group matches, at least 1.

    Raises:
      ValueError: the number is larger than any model's, whose names would fill the memory.
    """
    matches = (re.fullmatch(pattern, name) for name in names)
    count, name = max(((1 + int(m[1][:9]), m[0]) for m in matches if m), default=(1, ""))
    if count > MAX_LAYERS:
        raise ValueError(
            f"tensor {name:.80} must be of one of at most {MAX_LAYERS} layers; its name is "
            "damaged: copy the file again."
        )
    return count


def check_known(
    unknown: Sequence[str], expected: Mapping[str, Shape], shapes: Mapping[str, Shape], remedy: str
) -> None:
    """Raises a ValueError that names all missing tensors if any size is unknown.

    Args:
      unknown: sizes that no tensor determines.
      expected: name to shape of the tensors needed; only the number of axes matters.
      shapes: of the tensors, by name.
      remedy: ends the message.
    """
    if unknown:
        missing = [
            name for name, shape in expected.items() if len(shapes.get(name, ())) != len(shape)
        ]
        raise ValueError(
            f"{' and '.join(unknown)} cannot be inferred from the tensors: {len(missing)} are "
            f"missing or have another number of axes: {', '.join(missing)}; {remedy}."
        )


def check_config(config: Any, config_class: type) -> None:
    """Raises a ValueError unless a config is an instance of a class.

    Args:
      config: config to check.
      config_class: class that it must be of.
    """
    if not isinstance(config, config_class):
        raise ValueError(
            f"config must be a {config_class.__name__}, got a {type(config).__name__}; it is the "
            "first argument, the params are the second."
        )


def check_params(config: RecurrenceConfig, params: Params) -> None:
    """Raises a ValueError unless the params are those of the recurrence.

    Args:
      config: of the recurrence.
      params: with any input size.
    """
    check_config(config, RecurrenceConfig)
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    input_size = read_size(shapes, 0, "layers_0/forward/input_kernel")
    expected = recurrence_shapes(config, input_size or 1)
    check(
        compare(expected, leaves),
        "params must be all those of one recurrence",
        "give all layers, lowest first, of one hidden size, and the config they were made with",
    )


def recurrence_shapes(config: RecurrenceConfig, input_size: int) -> dict[str, Shape]:
    """Returns path, such as `layers_0/forward/input_kernel`, to shape of each param."""
    params = jax.eval_shape(lambda key: recurrence.init(key, config, input_size), jax.random.key(0))
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}
