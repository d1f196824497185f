"""The forward pass of a vision-language model under the names of the original's inputs.

For parity checks against Hugging Face's models, by anyone with both installed.
"""

import dataclasses
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

    Raises:
      ValueError: `input_ids` are missing, or do not fit the images.
    """
    options = dataclasses.replace(config.options, dtype="float32", remat="none")
    config = dataclasses.replace(config, options=options)
    if not {"input_ids", "inputs_embeds"} & inputs.keys():
        raise ValueError(
            f"inputs must have input_ids, got {', '.join(sorted(inputs)) or 'nothing'}; give the "
            "arrays of the original's forward by name."
        )
    with jax.default_matmul_precision("highest"):
        return models.get(config).forward(params, config, inputs)
