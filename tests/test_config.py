"""A config survives a round trip through JSON; every mistake in a file is one clear sentence."""

import dataclasses
import json
from typing import Literal

import pytest

from vla_jax import config


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    kind: Literal["patch"] = "patch"
    patch_size: int = 8
    widths: tuple[int, ...] = (64, 128)


@dataclasses.dataclass(frozen=True)
class StateConfig:
    kind: Literal["state"] = "state"
    hidden_size: int = 64

    def __post_init__(self):
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size must be positive, got {self.hidden_size}.")


@dataclasses.dataclass(frozen=True)
class MainConfig:
    name: str
    backbone: PatchConfig | StateConfig = PatchConfig()
    head: StateConfig | None = None
    cell: Literal["lstm", "gru"] = "lstm"
    dropout: float = 0.1
    decay: float | None = None
    remat: bool = False
    factors: tuple[tuple[str, float], ...] = ()
    image_size: tuple[int, int] = (64, 64)
    steps: int | Literal["all"] = "all"


@dataclasses.dataclass(frozen=True)
class ListConfig:
    sizes: list[int] = dataclasses.field(default_factory=lambda: [1])


CONFIGS = {
    "defaults": MainConfig("a"),
    "other member of the union": MainConfig("b", backbone=StateConfig(hidden_size=3)),
    "optional parts": MainConfig("c", head=StateConfig(), decay=0.99, remat=True),
    "number of a union": MainConfig("e", steps=3),
    "nested tuples": MainConfig("d", factors=(("a/*", 0.1), ("b", 2.0)), image_size=(32, 48)),
}


@pytest.mark.parametrize("original", CONFIGS.values(), ids=CONFIGS)
def test_a_config_survives_a_round_trip_through_a_file(original, tmp_path):
    path = tmp_path / "run" / "config.json"
    config.save(original, path)
    assert config.load(MainConfig, path) == original
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]


def test_missing_fields_have_their_defaults_and_integers_become_floats():
    read = config.from_dict(MainConfig, {"name": "a", "dropout": 1})
    assert read == MainConfig("a", dropout=1.0)
    assert type(read.dropout) is float


SLIPS = {
    "unknown field": ({"name": "a", "dropuot": 0.1}, "no field 'dropuot'.*Did you mean 'dropout'"),
    "unknown nested field": ({"name": "a", "head": {"hiden_size": 1}}, "MainConfig.head has no"),
    "unknown kind": ({"name": "a", "backbone": {"kind": "patsh"}}, "Did you mean 'patch'"),
    "kind of a wrong type": ({"name": "a", "backbone": {"kind": ["patch"]}}, "backbone.kind is"),
    "no kind": ({"name": "a", "backbone": {"patch_size": 8}}, "backbone.kind is None"),
    "missing field": ({}, "MainConfig.name is missing; add it"),
    "unknown literal": ({"name": "a", "cell": "grru"}, "cell is 'grru'.*Did you mean 'gru'"),
    "text for a number": ({"name": "a", "dropout": "0.1"}, "dropout must be float, got '0.1'"),
    "bool for a number": ({"name": "a", "dropout": True}, "dropout must be float, got True"),
    "number for a bool": ({"name": "a", "remat": 1}, "remat must be bool, got 1"),
    "null for a number": ({"name": "a", "dropout": None}, "dropout must be float, got None"),
    "text for an optional": ({"name": "a", "decay": "x"}, "decay must be float, got 'x'"),
    "number for a union": ({"name": "a", "steps": 0.5}, "steps must be int or Literal.*, got 0.5"),
    "number for a part": (
        {"name": "a", "head": 3},
        "head must be a dict of StateConfig's fields, got 3",
    ),
    "list for a config": ([], r"must hold a JSON object, got list"),
    "no list": ({"name": "a", "factors": 3}, "factors must be a list, got 3"),
    "wrong item": ({"name": "a", "factors": [["a", "b"]]}, r"factors\[0\]\[1\] must be float"),
    "wrong length": ({"name": "a", "image_size": [1]}, "image_size must have 2 items, got 1"),
    "out of range": ({"name": "a", "head": {"hidden_size": 0}}, "hidden_size must be positive"),
}


@pytest.mark.parametrize(("data", "sentence"), SLIPS.values(), ids=SLIPS)
def test_a_mistake_in_a_file_raises_one_sentence_with_the_file_and_the_path(
    data, sentence, tmp_path
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=sentence) as raised:
        config.load(MainConfig, path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nix\.json is missing: expected a MainConfig"):
        config.load(MainConfig, tmp_path / "nix.json")


@pytest.mark.parametrize("content", [b'{"name": "a"', b"\xff"], ids=["cut off", "not text"])
def test_a_file_that_is_not_json_is_reported(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="is not valid JSON"):
        config.load(MainConfig, tmp_path / "config.json")


def test_a_value_of_an_unsupported_type_is_reported():
    with pytest.raises(TypeError, match=r"ListConfig.sizes must be a number.*got \[1\] \(list\)"):
        config.to_dict(ListConfig())


def test_the_most_similar_name_is_suggested():
    sentence = config.did_you_mean("lstmm", ("gru", "lstm"))
    assert sentence == "choose from gru, lstm. Did you mean 'lstm'?"


@dataclasses.dataclass(frozen=True)
class RenamedConfig:
    num_units: int = 8

    upgrade = config.renamed({"units": "num_units"})


def test_a_class_reads_files_of_an_earlier_version():
    assert config.from_dict(RenamedConfig, {"units": 3}) == RenamedConfig(3)
    assert config.from_dict(RenamedConfig, {"num_units": 4}) == RenamedConfig(4)
    with pytest.raises(ValueError, match="no field 'unit'"):
        config.from_dict(RenamedConfig, {"unit": 3})
    with pytest.raises(ValueError, match="must be a dict of RenamedConfig's fields, got 3"):
        config.from_dict(RenamedConfig, 3)
