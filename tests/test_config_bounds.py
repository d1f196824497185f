"""Every field of every config refuses, in one sentence, values that cannot be meant."""

import contextlib
import dataclasses
import importlib
import math
import pkgutil
import types
import typing

import pytest

import train
import vla_jax
from vla_jax import config as configs
from vla_jax.config import checked
from vla_jax.rl.network import NetworkConfig

MODULES = [
    module.name
    for package in (vla_jax, train)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__") and ".benchmark" not in module.name
]
# Negative numbers have a meaning: steps from the end or "all", values of a robot, logits, means of
# pixels, a decay that favours new chunks, returns of tasks whose rewards are negative.
SIGNED = {
    "instruction_steps", "grippers", "closed", "opened", "ensemble_decay", "gripper_threshold",
    "mean", "gripper_range", "solved_at",
}  # fmt: skip
HUGE = {int: (10**20, 10**308), float: (math.nan, math.inf, -math.inf, 1e20, 1e308)}


def config_classes():
    found = {}
    for name in MODULES:
        for member in vars(importlib.import_module(name)).values():
            if isinstance(member, type) and hasattr(member, "field_bounds"):
                found[f"{member.__module__}.{member.__name__}"] = member
    return found


CLASSES = config_classes()


def numbers(annotation):
    """Returns int or float if the annotation is one, optional or not, and the number of items."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        size = 1 if args[-1] is Ellipsis else len(args)
        return (args[0], size) if args[0] in (int, float) else (None, 0)
    for kind in (int, float):
        if annotation is kind or (origin in (typing.Union, types.UnionType) and kind in args):
            return kind, 0
    return None, 0


def refusal(config, name, value):
    """Returns the sentence that refuses a value, "" if it is accepted."""
    try:
        dataclasses.replace(config, **{name: value})
    except ValueError as error:
        return str(error)
    return ""


def test_all_configs_are_found():
    assert len(CLASSES) > 50


@pytest.mark.parametrize("path", sorted(CLASSES))
def test_every_field_refuses_what_cannot_be_meant(path):
    try:
        config = CLASSES[path]()
    except TypeError:  # fields without a default
        return
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        annotation, name = hints[field.name], field.name
        kind, size = numbers(annotation)
        if typing.get_origin(annotation) is typing.Literal or name == "dtype":
            assert "float31" in refusal(config, name, "float31"), (name, "float31")
        if kind is None:
            continue
        values = (*HUGE[kind], *(() if name in SIGNED else (kind(-1),)))
        for value in values:
            assert refusal(config, name, (value,) * size if size else value), (name, value)
        refusal(config, name, (kind(0),) * size if size else kind(0))  # nothing but a ValueError


def test_a_refusal_names_field_bounds_and_value():
    @dataclasses.dataclass(frozen=True)
    @checked(size=(1, 8))
    class Base:
        size: int = 4
        rate: float = 0.5
        sizes: tuple[int, ...] = (1,)

    @dataclasses.dataclass(frozen=True)
    @checked()
    class Derived(Base):
        dtype: str = "float32"

        def __post_init__(self):
            8 // self.size

    for cls in (Base, Derived):
        for options, message in (
            ({"size": 0}, r"^size must be at least 1, got 0\.$"),
            ({"rate": math.nan}, r"rate must be in \[-10+\.0, 10+\.0\], got nan"),
            ({"sizes": (3, -1)}, r"sizes must be at least 0, got -1\.$"),
            ({"size": 10**60}, r"size must be at most 8, got a number of 61 digits\.$"),
        ):
            with pytest.raises(ValueError, match=message):
                cls(**options)
    with pytest.raises(ValueError, match="unknown dtype 'float31'; choose from float32"):
        Derived(dtype="float31")
    assert configs.from_dict(Derived, {"size": 2}) == Derived(size=2)


@pytest.mark.parametrize("count", [1001, 100_000, 10**9])
def test_so_many_layers_that_their_names_would_fill_the_memory_are_refused(count):
    fields = [
        (path, name)
        for path, each in CLASSES.items()
        for name in ("num_layers", "patch_layers", "latent_layers")
        if name in {field.name for field in dataclasses.fields(each)}
    ]
    num_checked = 0
    for path, name in fields:
        with contextlib.suppress(TypeError):  # fields without a default
            config = CLASSES[path]()
            limit = CLASSES[path].field_bounds.get(name, (0, 1000))[1]
            if count > limit:
                assert f"{name} must be at most {limit:g}, got {count}" in refusal(
                    config, name, count
                )
                num_checked += 1
    assert num_checked > 6


@pytest.mark.parametrize("name", ["object_sizes", "hidden_sizes", "joint_sizes"])
def test_layers_that_would_fill_the_memory_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at most 65536, got 1000000000"):
        NetworkConfig(**{name: (1_000_000_000,)})
