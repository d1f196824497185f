"""Interface of a backbone: images and instruction of a step in, tokens out."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from vla_jax.files import Path
from vla_jax.types import Array, Key, Observation, Params, Resampling, ShardingRules, Tokens


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
        """V; token ids of instructions are in [0, V)."""
        ...


Globs = tuple[str, ...]


class ImageSpec(NamedTuple):
    """Images that a backbone expects; it normalises them itself."""

    height: int  # pixels
    width: int  # pixels
    cameras: tuple[str, ...]  # fields of Observation
    resampling: Resampling  # method of resizing images of another size
    mean: tuple[float, float, float]  # of RGB values in [0, 1], subtracted
    std: tuple[float, float, float]  # of RGB values in [0, 1], divided by
    any_size: bool = False  # images of other sizes are accepted, and resized on the device


class History(NamedTuple):
    """Encoding of steps whose tokens depend on the earlier steps of a window."""

    # (params, config, observation [...]) -> the part that depends on one step, a tree [...]
    embed: Callable[[Params, Any, Observation], Any]
    # (params, config, tree [B, W, ...], bool [B, W, W]) -> tokens [B, W, N, D]; entry [b, w, v] is
    # True where step w may depend on step v
    attend: Callable[[Params, Any, Any, Array], Tokens]


def no_history(config: Any) -> History | None:
    """Returns None, each step is encoded alone: the default `Backbone.history`."""
    del config


def no_files(config: Any) -> Mapping[str, Path]:
    """Returns an empty dict: the default `Backbone.files`."""
    del config
    return {}


def same_config(config: Any, folder: Path) -> Any:
    """Returns the config unchanged: the default `Backbone.with_files`."""
    del folder
    return config


def own_config(config: Any, loaded: Any) -> Any:
    """Returns the config unchanged: the default `Backbone.start_from`."""
    del loaded
    return config


def same_params(key: Key, params: Params, config: Any) -> Params:
    """Returns the params unchanged: the default `Backbone.adopt`."""
    del key, config
    return params


class Backbone(NamedTuple):
    """Member of the family of backbones."""

    config: type  # dataclass of its config, with a field `kind`
    init: Callable[[Key, Any], Params]
    # (params, config, observation [...]) -> tokens [..., N, D], mask [..., N]
    apply: Callable[[Params, Any, Observation], Tokens]
    # (config, instruction) -> ids [S] int32; those of "" stand for a masked instruction
    tokenize: Callable[[Any, str], np.ndarray]
    check_instructions: Callable[[Any, Iterable[str]], None]  # raises if two give the same ids
    image_spec: Callable[[Any], ImageSpec | None]  # None = uses no images
    sharding_rules: ShardingRules = ()  # by globs of param paths; () = replicated
    # config -> shapes of the observation of one step, for estimates of memory; None = not known
    example: Callable[[Any], Observation] | None = None
    # config -> name in a run folder -> path of each file that the backbone reads when it is used
    files: Callable[[Any], Mapping[str, Path]] = no_files
    # (config, folder) -> config that reads these files, by the names above, from a folder
    with_files: Callable[[Any, Path], Any] = same_config
    # config -> path globs of params that are not trained, and of exceptions that are
    frozen: Callable[[Any], tuple[Globs, Globs]] = lambda config: ((), ())
    # (config, config of the params to start from) -> config with those sizes
    start_from: Callable[[Any, Any], Any] = own_config
    # (key, params of an earlier run, config) -> params with what the config adds or leaves out
    adopt: Callable[[Key, Params, Any], Params] = same_params
    # config -> True if its tokens say nothing before some of its params have been trained
    needs_training: Callable[[Any], bool] = lambda config: False
    # config -> functions with which tokens depend on earlier steps; None = `apply` to each step
    history: Callable[[Any], History | None] = no_history
