"""Params that a policy adds to those of a vision-language model."""

from typing import Any

import jax
import jax.numpy as jnp

from vla_jax import trees
from vla_jax.nn import lora
from vla_jax.nn.layers import init_dense
from vla_jax.types import Key, Params

_ADDED = ("action_token", "proprio")  # params that the policy adds to the model


def complete(key: Key, params: Params, config: Any) -> Params:
    """Returns params with what the options add: low-rank factors, learned tokens, proprioception.

    Args:
      key: consumed.
      params: of the model alone.
      config: its config.
    """
    options = config.options
    lora_key, added_key = jax.random.split(key)
    dtype = jnp.dtype(options.param_dtype)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    params = lora.add(lora_key, params, options.lora)
    return params | _added(added_key, config)


def adopt(key: Key, params: Params, config: Any) -> Params:
    """Returns the params of an earlier run, with other learned tokens and proprioception if needed.

    Args:
      key: consumed, for what the earlier run did not have.
      params: of a run with the same model.
      config: of the model, whose options may be others than the run's.
    """
    lora_key, added_key = jax.random.split(key)
    model = {name: value for name, value in params.items() if name not in _ADDED}
    is_adapted = any(path.endswith("/lora_a") for path in trees.leaf_paths(model))
    if config.options.lora.rank and not is_adapted:
        model = lora.add(lora_key, model, config.options.lora)
    fresh = _added(added_key, config)
    return model | {name: params.get(name, value) for name, value in fresh.items()}


def _added(key: Key, config: Any) -> Params:
    """Returns the params that the policy adds to the model."""
    options = config.options
    added = {}
    if options.num_learned:
        added["action_token"] = jnp.zeros((options.num_learned, config.token_dim))
    if options.proprio_dim:
        added["proprio"] = init_dense(key, options.proprio_dim, config.token_dim)
    return added
