"""The transformer trunk with memory tokens, which a segment passes to the next segment.

A step attends to its segment of `segment_size` steps so far and to `num_memory_tokens` vectors,
which are all that remains of earlier segments. Segments start with the episode.

- "persistent": memory is passed from segment to segment over the whole episode.
- "periodic": the memory is cleared every W steps.
- "refresh": the last W steps are recomputed at every step, from the learned first memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn import memory_transformer, rotary_transformer
from vla_jax.nn.memory_transformer import MemoryTransformerConfig, SegmentState
from vla_jax.nn.recurrence import Carry
from vla_jax.policies.decoder_fields import DecoderFields
from vla_jax.policies.gpt_trunk import PROJECTION, init_projection, project
from vla_jax.policies.rotary_gpt_trunk import INFINITE, rotary_config, slide
from vla_jax.policies.trunk import Mode, StepFeatures, Trunk, no_preparation, one_memory
from vla_jax.trees import under
from vla_jax.types import Array, Key, Params


class MemoryGPTState(NamedTuple):
    """The open segment, or the inputs from which mode "refresh" recomputes."""

    inputs: jax.Array | None  # [B, W, H] float32, newest last
    segment: SegmentState | None  # one of the two is None
    age: jax.Array  # [B] int32, steps of this episode so far
    period: jax.Array  # [B] int32, steps after which the memory is cleared


def memory_config(config: DecoderFields) -> MemoryTransformerConfig:
    """Returns the config of the transformer."""
    return MemoryTransformerConfig(
        transformer=rotary_config(config),
        num_memory_tokens=config.num_memory_tokens,
        segment_size=config.segment_size,
        remat=config.remat_chunk > 0,
    )


def _check(config: DecoderFields) -> None:
    memory_config(config)  # raises


def _init(key: Key, config: DecoderFields) -> Params:
    projection_key, transformer_key = jax.random.split(key)
    return {
        "memory_transformer": memory_transformer.init(transformer_key, memory_config(config)),
        **init_projection(projection_key, config),
    }


def _apply(
    params: Params,
    config: DecoderFields,
    pooled: jax.Array,
    *,
    mask: Array | None,
    reset: Array | None,
    carry: Carry | None,
    key: Key | None,
) -> tuple[Carry, jax.Array]:
    return memory_transformer.apply(
        params["memory_transformer"],
        memory_config(config),
        project(params, config, pooled),
        mask=mask,
        reset=reset,
        carry=carry,
        key=key,
    )


def _init_stream(
    config: DecoderFields, batch_size: int, mode: Mode, window_size: int
) -> MemoryGPTState:
    inputs, segment = None, None
    if mode == "refresh":
        inputs = jnp.zeros((batch_size, window_size, config.hidden_size))
    else:
        segment = memory_transformer.init_state(memory_config(config), batch_size)
    period = window_size if mode == "periodic" else INFINITE
    return MemoryGPTState(
        inputs,
        segment,
        age=jnp.zeros(batch_size, jnp.int32),
        period=jnp.full(batch_size, period, jnp.int32),
    )


def _step(
    params: Params, config: DecoderFields, state: MemoryGPTState, pooled: Array, reset: Array
) -> tuple[MemoryGPTState, StepFeatures]:
    trunk, trunk_config = params["memory_transformer"], memory_config(config)
    age, newest = jnp.where(reset, 0, state.age), project(params, config, pooled)
    inputs, segment, position = None, None, age % state.period
    if state.inputs is None:
        assert state.segment is not None
        segment, features = memory_transformer.step(
            trunk, trunk_config, state.segment, newest, position
        )
    else:
        inputs, real = slide(state.inputs, newest, age)
        features = memory_transformer.apply(trunk, trunk_config, inputs, mask=real)[1][:, -1]
    state = MemoryGPTState(inputs, segment, age + 1, state.period)
    return state, StepFeatures(features[:, None], jnp.zeros_like(age), num_previous=position)


MEMORY_GPT = Trunk(
    params_name="memory_transformer",
    has_memory=True,
    modes=("refresh", "periodic", "persistent"),
    check=_check,
    init=_init,
    apply=_apply,
    num_memories=one_memory,
    init_stream=_init_stream,
    step=_step,
    prepare=no_preparation,
    sharding_rules=(PROJECTION, *under("memory_transformer", rotary_transformer.SHARDING)),
    is_transformer=True,
)
