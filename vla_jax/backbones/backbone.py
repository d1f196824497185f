"""The contract of a backbone: a step's images and instruction in, tokens out."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from vla_jax.types import Key, Observation, Params, ShardingRules, Tokens


class BackboneConfig(Protocol):
    """Fields that the config of every backbone has."""

    @property
    def kind(self) -> str:
        """Name of the backbone."""
        ...

    @property
    def num_tokens(self) -> int:
        """N, tokens per step."""
        ...

    @property
    def token_dim(self) -> int:
        """D, features of a token."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, token ids of instructions lie in [0, V)."""
        ...


class ImageSpec(NamedTuple):
    """The images that a backbone was made for; it normalises them itself."""

    height: int  # pixels
    width: int  # pixels
    cameras: tuple[str, ...]  # fields of Observation
    resampling: str  # "area", "bilinear" or "bicubic", where an image has another size
    mean: tuple[float, float, float]  # of RGB values in [0, 1], subtracted
    std: tuple[float, float, float]  # of RGB values in [0, 1], divided by


class Backbone(NamedTuple):
    """A family member."""

    config: type  # dataclass of its config, with a field `kind`
    init: Callable[[Key, Any], Params]
    # (params, config, observation [..., parts]) -> tokens [..., N, D], mask [..., N]
    apply: Callable[[Params, Any, Observation], Tokens]
    tokenize: Callable[[Any, str], np.ndarray]  # (config, instruction) -> ids [S] int32
    check_instructions: Callable[[Any, Iterable[str]], None]  # raises where two become the same
    image_spec: Callable[[Any], ImageSpec | None]  # None = the backbone sees no images
    sharding_rules: ShardingRules = ()  # globs of its params' paths; replicated by default
