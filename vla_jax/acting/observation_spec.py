"""Names, shapes and dtypes of the raw observation that an agent takes."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vla_jax.acting.agent import AgentConfig, read_instruction
from vla_jax.backbones import registry
from vla_jax.data.normalize import NormStats
from vla_jax.types import get_images

COLUMNS = ("proprio", "environment_state")


def observation_spec(
    config: AgentConfig, norm_stats: Mapping[str, NormStats]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns name -> shape and dtype of the parts of one robot's observation.

    Columns have the size of the training data of this robot, before they are widened to the
    policy's; parts that it lacks (`missing_parts`) are left out. The instruction is ids `[S]`.

    Args:
      config: of the agent.
      norm_stats: as for `make_agent`.

    Raises:
      ValueError: the backbone does not say what it needs.
    """
    backbone = config.policy.backbone
    example = registry.get(backbone).example
    if example is None:
        raise ValueError(
            f"backbone '{backbone.kind}' must have the function `example`, which gives the shapes "
            "of its observation, got None; add it to its Backbone."
        )
    needed = example(backbone)
    parts = {name: _without_axes(image) for name, image in get_images(needed).items()}
    for name in COLUMNS:
        if getattr(needed, name) is not None:
            stats = norm_stats.get(name)
            size = getattr(needed, name).shape[-1] if stats is None else len(stats.mean)
            parts[name] = jax.ShapeDtypeStruct((size,), jnp.float32)
    if config.tool_frame is not None and "proprio" not in parts:
        stats = norm_stats.get("proprio")
        size = 1 + max(config.tool_frame.orientation) if stats is None else len(stats.mean)
        parts["proprio"] = jax.ShapeDtypeStruct((size,), jnp.float32)
    parts = {name: part for name, part in parts.items() if name not in config.missing_parts}
    if needed.instruction is not None:
        ids = read_instruction(config, "")
        parts["instruction"] = jax.ShapeDtypeStruct(ids.shape, jnp.int32)
    return parts


def _without_axes(image: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(image.shape[-3:], image.dtype)
