"""Every field of every config refuses, in one sentence, values that cannot be meant."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import time
import types
import typing

import pytest

import train
import vla_jax
from train.cache_frames import CacheConfig
from train.configs import ImitateConfig
from train.sweep import SweepConfig
from vla_jax import config as configs
from vla_jax.config import MAX_SIZE, checked
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.rl.network import NetworkConfig
from vla_jax.training.optim import OptimConfig

MODULES = [
    module.name
    for package in (vla_jax, train)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__") or ".benchmark" in module.name
]
# Negative numbers have a meaning: steps from the end or "all", values of a robot, logits, means of
# pixels, a decay that favours new chunks, returns of tasks whose rewards are negative.
SIGNED = {
    "instruction_steps", "grippers", "closed", "opened", "ensemble_decay", "gripper_threshold",
    "mean", "gripper_range", "solved_at",
}  # fmt: skip
WRONG = {
    int: (10**20, 10**308, 0.5, math.nan),
    float: (math.nan, math.inf, -math.inf, 1e20, 1e308),
}
# Integers that are only counted, compared or written to a file; all others are sizes of something.
COUNTED = {
    "seed", "first_seed", "noise_seed", "num_updates", "max_updates", "pretrain_updates",
    "decay_updates", "warmup_steps", "log_every", "save_every", "keep", "step", "stride",
    "instruction_steps", "episode_length", "message_bytes", "cache_bytes", "min_pixels",
    "max_pixels", "window_delay", "chunk", "burn_in",
}  # fmt: skip
# Integers that lists, processes or steps of a program are made of: name -> greatest bound.
LOOPS = {
    "num_layers": 10_000, "patch_layers": 1000, "latent_layers": 1000, "layers": 1000,
    "conv_size": 64, "num_obstacles": 100, "obstacles": 100, "num_workers": 1000,
    "num_threads": 1000, "num_processes": 1000, "prefetch": 1000, "action_dim": 4096,
    "action_horizon": 4096, "num_trainings": 1000, "num_epochs": 1000, "num_bins": 2**16,
    "num_heads": 2**16, "max_words": 2**16, "image_size": 2**14, "window_size": 2**20,
    "max_steps": 2**20, "num_envs": 2**24, "batch_size": 2**20, "num_episodes": 2**20,
}  # fmt: skip


def config_classes():
    found = {}
    for name in MODULES:
        for member in vars(importlib.import_module(name)).values():
            is_config = inspect.isclass(member) and dataclasses.is_dataclass(member)
            is_config &= hasattr(member, "field_bounds") or str(member).endswith("Config'>")
            if is_config and not inspect.isabstract(member):  # of these the members are found
                found[f"{member.__module__}.{member.__name__}"] = member
    return found


CLASSES = config_classes()


def number_type(annotation):
    """Returns the type of the numbers in values of this annotation, None if there are none."""
    if annotation in (int, float):
        return annotation
    if typing.get_origin(annotation) is typing.Literal:
        return None
    found = {number_type(member) for member in typing.get_args(annotation)} - {None}
    assert len(found) < 2, annotation
    return next(iter(found), None)


def filled(annotation, number):
    """Returns a value of an annotation all of whose numbers are this one.

    Fails for a form that `checked` does not look into.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (int, float):
        return number
    if annotation is str:
        return "text"
    if origin is tuple:
        members = args[:1] if args[-1] is Ellipsis else args
        return tuple(filled(member, number) for member in members)
    members = [member for member in args if member is not type(None)]
    assert origin in (typing.Union, types.UnionType), f"numbers in {annotation} are not checked"
    assert len(members) == 1, f"numbers in {annotation} are not checked"
    return filled(members[0], number)


def example(cls):
    """Returns a config of a class, with a text in each field that has no default."""
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    return cls(**dict.fromkeys(required, "text"))


def numeric_fields(cls):
    """Returns (name, annotation, type) of the fields of a config with numbers."""
    hints = typing.get_type_hints(cls)
    fields = [(field.name, hints[field.name]) for field in dataclasses.fields(cls)]
    return [(name, each, number_type(each)) for name, each in fields if number_type(each)]


def refusal(config, name, value):
    """Returns the sentence that refuses a value, "" if it is accepted."""
    try:
        dataclasses.replace(config, **{name: value})
    except ValueError as error:
        return str(error)
    return ""


def test_all_configs_are_found():
    assert len(CLASSES) > 80
    assert {path for path, cls in CLASSES.items() if not hasattr(cls, "field_bounds")} == set()
    packages = {path.rpartition(".")[0].rpartition(".")[0] for path in CLASSES}
    assert {"train", "train.benchmark", "vla_jax.nn", "vla_jax.data.readers"} <= packages


@pytest.mark.parametrize("path", sorted(CLASSES))
def test_every_field_refuses_what_cannot_be_meant(path):
    config = example(CLASSES[path])
    for name, annotation in typing.get_type_hints(type(config)).items():
        if typing.get_origin(annotation) is typing.Literal or name == "dtype":
            assert "float31" in refusal(config, name, "float31"), (name, "float31")
    for name, annotation, kind in numeric_fields(type(config)):
        for number in (*WRONG[kind], *(() if name in SIGNED else (kind(-1),))):
            assert refusal(config, name, filled(annotation, number)), (name, number)
        refusal(config, name, filled(annotation, kind(0)))  # nothing but a ValueError


@pytest.mark.parametrize("path", sorted(CLASSES))
def test_the_greatest_value_of_every_field_can_be_made(path):
    """A config with it takes neither memory nor time, and a greater one is refused."""
    config, bounds = example(CLASSES[path]), CLASSES[path].field_bounds
    started = time.process_time()
    for name, annotation, kind in numeric_fields(type(config)):
        if kind is int:
            greatest = bounds.get(name, (0, MAX_SIZE))[1]
            assert greatest <= (2**50 if name in COUNTED else LOOPS.get(name, MAX_SIZE)), name
            refusal(config, name, filled(annotation, greatest))  # nothing but a ValueError
            assert refusal(config, name, filled(annotation, greatest + 1)).endswith("."), name
    assert time.process_time() - started < 1


@pytest.mark.parametrize("path", sorted(CLASSES))
def test_learning_rates_are_those_of_the_optimiser(path):
    config = example(CLASSES[path])
    for name, annotation, _ in numeric_fields(type(config)):
        if name in ("learning_rate", "learning_rates"):
            for rate in (0.0, -1e-3, 1001.0, 1e11):
                assert name in refusal(config, name, filled(annotation, rate)), rate
            assert refusal(config, name, filled(annotation, 1000.0)) == ""


@pytest.mark.parametrize("cls", [ImitateConfig, CacheConfig, SweepConfig])
def test_limits_of_actions_are_in_order(cls):
    for limits in ((1.0, -1.0), (0.5, 0.5), (math.nan, math.nan), (-math.inf, math.inf)):
        assert refusal(cls(), "action_bounds", limits).startswith("action_bounds must be"), limits
    assert refusal(cls(), "action_bounds", (-1.0, 1.0)) == ""


def test_values_of_a_gripper_differ_and_its_indices_are_integers():
    for value in ((1.0, 1.0), (math.inf, 1.0)):
        assert "gripper_range must be" in refusal(DatasetConfig(), "gripper_range", value)
    assert refusal(DatasetConfig(), "gripper_range", (100.0, 0.0)) == ""
    assert refusal(DatasetConfig(), "grippers", (0.5,)) == "grippers must be an integer, got 0.5."


def test_factors_of_the_learning_rate_never_turn_it_around():
    sentence = refusal(OptimConfig(), "lr_factors", (("decoder/*", 1.0), ("backbone/*", -1.0)))
    assert sentence == "lr_factors must be at least 0, got -1.0."
    assert refusal(OptimConfig(), "lr_factors", (("backbone/*", 0.0),)) == ""


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


@pytest.mark.parametrize("name", ["object_sizes", "hidden_sizes", "joint_sizes"])
def test_layers_that_would_fill_the_memory_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at most 65536, got 1000000000"):
        NetworkConfig(**{name: (1_000_000_000,)})
