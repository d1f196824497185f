"""The policies that the memory suite compares: decoders in a streaming mode, and baselines."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from vla_jax.acting.agent import AgentConfig
from vla_jax.backbones.state import StateConfig
from vla_jax.data.normalize import NormalizeConfig
from vla_jax.envs.demonstrations import WANDER_STEPS
from vla_jax.envs.memory_table.memory_task import INSTRUCTION_STEPS
from vla_jax.policies import policy, trunks
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.trunk import Mode
from vla_jax.types import Array, Env, Key, Observation, Transition

# K: chunks that begin during the delay reach into the acting part, so that the gradient reaches the
# cue over fewer steps. The first action of each chunk is executed.
ACTION_HORIZON = 6
_TOKEN_DIM = 64  # features D of the three tokens of a step
# With one layer of the head, which block an instruction names is learned much more slowly.
HEAD_LAYERS = 3
_HEAD_FACTOR = 2  # width of the head's layers, as a multiple of H
_MAX_WORDS = 14  # of the longest instruction
WINDOW = 8  # steps of the baseline with a short window


class Variant(NamedTuple):
    """One policy of the suite."""

    kind: str  # trunk of the decoder
    mode: Mode = "persistent"
    window_size: int = 0  # steps of its memory; 0 = the whole episode
    # whether the policy also sees the first observation and the instruction at every step
    sees_first: bool = False


def variants() -> dict[str, Variant]:
    """Returns every policy by name: all trunks that can remember, and three baselines."""
    remembering = [name for name in trunks.names() if trunks.get(name).has_memory]
    whole = {
        name: Variant(name, "persistent" if "persistent" in trunks.get(name).modes else "refresh")
        for name in remembering
    }
    return {
        "fc": Variant("fc", "refresh"),
        "first_and_now": Variant("fc", "refresh", sees_first=True),
        "lstm_window": Variant("lstm", "refresh", window_size=WINDOW),
        **whole,
    }


def make_agent_config(
    variant: Variant, env: Env, state_dim: int, hidden_size: int, joint_sizes: tuple[int, ...]
) -> AgentConfig:
    """Returns the agent of a policy for an environment, without params.

    Args:
      variant: of `variants`.
      env: its longest episode bounds the window of policies that remember whole episodes.
      state_dim: numbers of the environment state.
      hidden_size: H.
      joint_sizes: widths of the MLP over state, proprio and instruction; empty = a linear map.
    """
    backbone = StateConfig(
        state_dim=state_dim,
        token_dim=_TOKEN_DIM,
        vocab_size=512,
        max_words=_MAX_WORDS,
        joint_sizes=joint_sizes,
    )
    window_size = variant.window_size or env.max_steps
    decoder = DecoderConfig(
        kind=variant.kind,
        window_size=window_size,
        action_horizon=ACTION_HORIZON,
        hidden_size=hidden_size,
        num_layers=1,
        num_heads=4,
        pooling="none",
        head_sizes=(_HEAD_FACTOR * hidden_size,) * HEAD_LAYERS,
        # Gates that remember from 2 steps to the whole window; without them "lit" is not learned.
        gate_span=window_size,
    )
    return AgentConfig(
        policy=policy.connect(backbone, decoder),
        normalize=NormalizeConfig(),
        mode=variant.mode,
        instruction_steps=-1 if variant.sees_first else INSTRUCTION_STEPS,
    )


def settings() -> dict[str, Any]:
    """Returns what results depend on beside the options of a script, as JSON has it."""
    return {
        "action_horizon": ACTION_HORIZON,
        "token_dim": _TOKEN_DIM,
        "head_layers": HEAD_LAYERS,
        "head_factor": _HEAD_FACTOR,
        "instruction_steps": INSTRUCTION_STEPS,
        "wander_steps": WANDER_STEPS,
        "max_words": _MAX_WORDS,
    }


def with_first_observation(env: Env) -> Env:
    """Returns an environment whose `environment_state` is followed by that of the first step."""

    def join(first: Array, observation: Observation) -> Observation:
        both = jnp.concatenate([jnp.asarray(observation.environment_state), first])
        return observation._replace(environment_state=both)

    def reset(key: Key) -> tuple[tuple[object, Array], Observation]:
        state, observation = env.reset(key)
        first = jnp.asarray(observation.environment_state)
        return (state, first), join(first, observation)

    def step(state: tuple[object, Array], action: Array) -> tuple[object, Transition]:
        inner, transition = env.step(state[0], action)
        observation = join(state[1], transition.observation)
        return (inner, state[1]), transition._replace(observation=observation)

    of_inner = {
        name: (lambda state, function=function: function(state[0]))
        for name in ("instruction_index", "expert", "is_acting", "recall")
        if (function := getattr(env, name)) is not None
    }
    return env._replace(reset=reset, step=step, **of_inner)
