"""The memoryless trunk: an MLP applied to each step, the baseline without memory.

Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), `FCDecoder`.
"""

import jax
import jax.numpy as jnp

from vla_jax.nn import layers
from vla_jax.nn.recurrence import Carry
from vla_jax.policies.decoder_fields import DecoderFields, pooled_size
from vla_jax.policies.trunk import Mode, StepFeatures, Trunk, no_preparation, one_memory
from vla_jax.trees import under
from vla_jax.types import Array, Key, Params


def _check(config: DecoderFields) -> None:
    if config.dropout != 0.0:
        raise ValueError(
            "dropout must be 0 for a decoder of kind 'fc', which has no dropout, got "
            f"{config.dropout}."
        )


def _init(key: Key, config: DecoderFields) -> Params:
    size = pooled_size(config)
    return {"mlp": layers.init_mlp(key, (size, max(size // 2, 1), config.hidden_size))}


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
    del reset, carry, key  # no memory, no dropout
    features = layers.apply_mlp(params["mlp"], pooled, dtype=config.dtype)
    return {}, features if mask is None else jnp.where(mask[..., None], features, 0.0)


def _init_stream(config: DecoderFields, batch_size: int, mode: Mode, window_size: int) -> tuple:
    del config, batch_size, mode, window_size
    return ()


def _step(
    params: Params, config: DecoderFields, state: tuple, pooled: Array, reset: Array
) -> tuple[tuple, StepFeatures]:
    features = layers.apply_mlp(params["mlp"], pooled, dtype=config.dtype)
    zeros = jnp.zeros(reset.shape, jnp.int32)
    return state, StepFeatures(features[:, None], acting=zeros, num_previous=zeros)


FC = Trunk(
    params_name="mlp",
    has_memory=False,
    modes=("refresh", "periodic", "persistent"),
    check=_check,
    init=_init,
    apply=_apply,
    num_memories=one_memory,
    init_stream=_init_stream,
    step=_step,
    prepare=no_preparation,
    sharding_rules=under("mlp", layers.MLP_SHARDING),
)
