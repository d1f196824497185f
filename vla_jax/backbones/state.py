"""Privileged simulator state, proprioception and instruction as tokens, without images."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vla_jax.backbones import word_hashing
from vla_jax.backbones.backbone import Backbone
from vla_jax.backbones.language import Words
from vla_jax.backbones.parts import (
    all_real,
    blank,
    column_present,
    flatten,
    mask_token,
    shape,
)
from vla_jax.config import MAX_SIZE, checked
from vla_jax.types import Array, Key, Observation, Params, Tokens

_MAX_LAYERS = 100  # of the MLP
_MAX_WEIGHTS = 2**26  # of the MLP: 256 MiB of params


@dataclass(frozen=True)
@checked(token_dim=(1, MAX_SIZE), joint_sizes=(1, 2**16))
class StateConfig:
    """Sizes of the state backbone; its tokens are environment state, proprio and instruction.

    With `joint_sizes` the first token is that of all three parts together.
    """

    kind: Literal["state"] = "state"
    state_dim: int = 22  # dimensions of the environment state
    proprio_dim: int = 8  # dimensions P of the proprioception
    token_dim: int = 64  # features D of a token
    vocab_size: int = 2048  # size of the vocabulary; word ids are in [0, vocab_size)
    max_words: int = 12  # words S of an instruction; further words are dropped
    # widths of an MLP over all three parts, which gives the state's token; empty = a linear map of
    # the state alone, with which a decoder relates an instruction to an object more slowly
    joint_sizes: tuple[int, ...] = ()
    dtype: str = "float32"  # dtype of the computation; params are float32

    def __post_init__(self):
        word_hashing.check_sizes(self)
        if len(self.joint_sizes) > _MAX_LAYERS:
            raise ValueError(
                f"joint_sizes must be at most {_MAX_LAYERS} layers, got {len(self.joint_sizes)}."
            )
        num_inputs = self.state_dim + self.proprio_dim + self.token_dim
        widths = (num_inputs, *self.joint_sizes, self.token_dim)
        num_weights = sum(a * b for a, b in itertools.pairwise(widths))
        if self.joint_sizes and num_weights > _MAX_WEIGHTS:
            raise ValueError(
                f"joint_sizes must give at most {_MAX_WEIGHTS} weights, got {num_weights}; use "
                "narrower layers."
            )

    @property
    def num_tokens(self) -> int:
        """N, tokens per step."""
        return 3


def init(key: Key, config: StateConfig) -> Params:
    """Returns random params; `key` is consumed."""
    return dict(State(config).init(key, blank(example(config)))["params"])


def apply(params: Params, config: StateConfig, observation: Observation) -> Tokens:
    """Returns the tokens of each observation.

    Args:
      params: from `init`.
      config: config of the params.
      observation: `environment_state [..., state_dim]`, `proprio [..., P]`, `instruction
        [..., S]`, with any leading axes. The token of a column without any number
        (`column_mask`) is padding.

    Returns:
      Tokens `[..., 3, D]` float32, mask `[..., 3]`. The first token depends on the environment
      state, with `joint_sizes` on all three parts, in which missing numbers are 0; the others
      depend on proprio and on the instruction.

    Raises:
      ValueError: a part is missing or has another size.
    """
    shapes = {
        "environment_state": (config.state_dim,),
        "proprio": (config.proprio_dim,),
        "instruction": (config.max_words,),
    }
    parts, lead = flatten(observation, shapes)
    encoded: Any = State(config).apply({"params": params}, parts)
    tokens = all_real(encoded, lead)
    for index, name in enumerate(("environment_state", "proprio")):
        tokens = mask_token(tokens, index, column_present(observation, name))
    return tokens


class State(nn.Module):
    """Linen module of `init` and `apply`."""

    config: StateConfig

    @nn.compact
    def __call__(self, parts: dict[str, Array]) -> jax.Array:
        """Returns tokens `[B, 3, D]` of the parts of an observation `[B, ...]`."""
        config = self.config
        state = nn.Dense(config.token_dim, dtype=jnp.dtype(config.dtype), name="environment_state")
        proprio = nn.Dense(config.token_dim, dtype=jnp.dtype(config.dtype), name="proprio")
        words = Words(
            config.vocab_size, config.max_words, config.token_dim, config.dtype, name="words"
        )
        tokens = [proprio(parts["proprio"]), words(parts["instruction"])]
        seen = parts["environment_state"]
        if config.joint_sizes:
            seen = jnp.concatenate([seen, parts["proprio"], tokens[1]], axis=-1)
        for layer, size in enumerate(config.joint_sizes):
            joint = nn.Dense(size, dtype=jnp.dtype(config.dtype), name=f"joint_{layer}")
            seen = nn.relu(joint(seen))
        return jnp.stack([state(seen), *tokens], axis=-2)


def example(config: StateConfig) -> Observation:
    """Returns the shapes of the observation of one step."""
    return Observation(
        environment_state=shape(config.state_dim),
        proprio=shape(config.proprio_dim),
        instruction=shape(config.max_words, dtype=jnp.int32),
    )


def _no_images(config: StateConfig) -> None:
    del config


BACKBONE = Backbone(
    config=StateConfig,
    init=init,
    apply=apply,
    tokenize=word_hashing.tokenize_for,
    check_instructions=word_hashing.check_collisions_for,
    image_spec=_no_images,
    example=example,
    sharding_rules=(
        ("*/embedding", PartitionSpec(None, "fsdp")),
        ("*/kernel", PartitionSpec(None, "fsdp")),  # [in, out]; a state has few numbers
    ),
)
