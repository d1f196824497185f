"""No picture at all: the simulator's state, the robot's own and the instruction as tokens."""

from dataclasses import dataclass
from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from vla_jax.backbones.language import Words
from vla_jax.types import Key, Observation, Params


@dataclass(frozen=True)
class StateConfig:
    """Sizes; the tokens are state, proprio, language."""

    kind: Literal["state"] = "state"
    state_dim: int = 22  # E, numbers of the environment's state
    proprio_dim: int = 8  # P, numbers of the robot's own state
    token_dim: int = 64  # D, features of a token
    vocab_size: int = 2048  # word ids lie in [0, vocab_size)
    max_words: int = 12  # S, words of an instruction
    dtype: str = "float32"  # of the computation; params are float32

    @property
    def num_tokens(self) -> int:
        """N, tokens per step."""
        return 3


def init(key: Key, config: StateConfig) -> Params:
    """Random params; `key` is consumed."""
    blank = Observation(
        proprio=jnp.zeros((1, config.proprio_dim)),
        environment_state=jnp.zeros((1, config.state_dim)),
        instruction=jnp.zeros((1, config.max_words), jnp.int32),
    )
    return State(config).init(key, blank)["params"]


def apply(params: Params, config: StateConfig, observation: Observation) -> jax.Array:
    """Tokens of each observation.

    Args:
      params: from `init`.
      config: the same.
      observation: `environment_state [..., E]`, `proprio [..., P]`, `instruction [..., S]`, with
        any leading axes.

    Returns:
      Tokens `[..., 3, D]` float32.

    Raises:
      ValueError: a part is missing.
    """
    for name in ("environment_state", "proprio", "instruction"):
        if getattr(observation, name) is None:
            raise ValueError(f"observation.{name} is missing; the state backbone needs it.")
    chex.assert_axis_dimension(observation.environment_state, -1, config.state_dim)
    chex.assert_axis_dimension(observation.proprio, -1, config.proprio_dim)
    lead = observation.proprio.shape[:-1]
    flat = Observation(
        proprio=observation.proprio.reshape(-1, config.proprio_dim),
        environment_state=observation.environment_state.reshape(-1, config.state_dim),
        instruction=observation.instruction.reshape(-1, observation.instruction.shape[-1]),
    )
    tokens = State(config).apply({"params": params}, flat)
    return tokens.astype(jnp.float32).reshape(*lead, 3, config.token_dim)


class State(nn.Module):
    """Linen module behind `init` and `apply`."""

    config: StateConfig

    @nn.compact
    def __call__(self, observation: Observation) -> jax.Array:
        """Tokens `[B, 3, D]` of observations `[B, ...]`."""
        config = self.config
        state = nn.Dense(config.token_dim, dtype=jnp.dtype(config.dtype), name="environment_state")
        proprio = nn.Dense(config.token_dim, dtype=jnp.dtype(config.dtype), name="proprio")
        words = Words(
            config.vocab_size, config.max_words, config.token_dim, config.dtype, name="words"
        )
        return jnp.stack(
            [
                state(observation.environment_state),
                proprio(observation.proprio),
                words(observation.instruction),
            ],
            axis=-2,
        )
