"""Inputs of a vision-language model from an observation: sequence, images, proprioception."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.backbones.parts import camera_mask, column_present, flatten, shape
from vla_jax.backbones.resizing import resize_on_device
from vla_jax.types import Array, Observation, get_part, make_observation, replace_images


class Inputs(NamedTuple):
    """The parts of an observation with their leading axes flattened into `B`."""

    ids: Array  # [B, S] int32, from `tokenize`
    images: jax.Array  # [B, C, h, w, 3] uint8
    proprio: Array | None  # [B, P]; None if the options have no `proprio_dim`
    present: jax.Array | None  # [B] bool, False where there is no proprio; None = everywhere
    real: jax.Array | None  # [B, C] bool, False where a camera has no image; None = all have one
    lead: tuple[int, ...]  # the leading axes


def example(config: Any) -> Observation:
    """Returns the shapes of the observation of one step."""
    dtypes = {"instruction": jnp.int32, "proprio": jnp.float32}
    parts = {
        name: shape(*sizes, dtype=dtypes.get(name, jnp.uint8))
        for name, sizes in _part_shapes(config).items()
    }
    return make_observation(parts, instruction=parts.pop("instruction"))


def read_inputs(config: Any, observation: Observation) -> Inputs:
    """Returns the inputs of a model; images of another size are resized if the options say so.

    Raises:
      ValueError: a part is missing or has another size.
    """
    options = config.options
    if options.resize == "device":
        observation = replace_images(
            observation,
            {
                name: resize_on_device(image, config.image_shape, config.images.resampling)
                for name in options.cameras
                if (image := get_part(observation, name)) is not None
                and image.shape[-3:-1] != config.image_shape
            },
        )
    parts, lead = flatten(observation, _part_shapes(config))
    return Inputs(
        ids=jnp.asarray(parts["instruction"]),
        images=jnp.stack([jnp.asarray(parts[name]) for name in options.cameras], axis=1),
        proprio=parts.get("proprio"),
        present=column_present(observation, "proprio"),
        real=camera_mask(observation, options.cameras),
        lead=lead,
    )


def _part_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Returns the last axes of the parts of an observation that the backbone needs."""
    options = config.options
    proprio = {"proprio": (options.proprio_dim,)} if options.proprio_dim else {}
    images = dict.fromkeys(options.cameras, (*config.image_shape, 3))
    return {**images, "instruction": (config.sequence_length,), **proprio}
