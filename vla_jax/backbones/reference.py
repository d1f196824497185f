"""The forward pass of a vision-language model under the names of the original's inputs.

For parity checks against Hugging Face's models, by anyone with both installed.
"""

from collections.abc import Mapping
from typing import Any

import jax

from vla_jax.backbones import models
from vla_jax.types import Array, Params


def forward(params: Params, config: Any, inputs: Mapping[str, Array]) -> dict[str, jax.Array]:
    """Returns the outputs of the original's forward, computed in float32 on concrete arrays.

    Args:
      params: from `weights.load`.
      config: from `weights.load`.
      inputs: arrays of the original's forward by name: `input_ids [B, T]`, `attention_mask
        [B, T]`, `pixel_values`, and what the model has besides; see `forward` in its module.
        Entries that the model does not use are ignored.

    Returns:
      `last_hidden [B, T, D]` and `logits [B, T, V]`; arbitrary where the attention mask is 0.
    """
    return models.get(config).forward(params, config, inputs)
