"""Selection and validation of the parts of an observation that a backbone needs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.types import Array, Observation, Tokens, get_part


def flatten(
    observation: Observation, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Array], tuple[int, ...]]:
    """Returns the parts with their leading axes flattened into one, and those leading axes.

    Numbers that the robot lacks (`column_mask`) are 0: a linear map of the column is that of the
    numbers which there are.

    Args:
      observation: any leading axes, the same for every part that is needed.
      shapes: name of each part that is needed -> its last axes.

    Returns:
      Name -> `[B, …]`, and the leading axes, whose product is `B`.

    Raises:
      ValueError: a part is missing, has another shape, or an image is not uint8.
    """
    parts = {name: get_part(observation, name) for name in shapes}
    for name, part in parts.items():
        if part is None:
            raise ValueError(
                f"observation.{name} is missing; this backbone needs {', '.join(shapes)}."
            )
    first, last_axes = next(iter(shapes.items()))
    lead = parts[first].shape[: -len(last_axes)]
    for name, shape in shapes.items():
        part = parts[name]
        if part.shape != (*lead, *shape):
            expected = ", ".join(map(str, (*lead, *shape)))
            raise ValueError(
                f"{name} must be [{expected}], got {list(part.shape)}; check the sizes in the "
                "backbone's config, and that all parts have the same leading axes."
            )
        if name.startswith("image_") and part.dtype != jnp.uint8:
            raise ValueError(f"{name} must be uint8 in 0 … 255, got {part.dtype}; convert it.")
        parts[name] = _zero_missing(part, observation, name).reshape(-1, *shape)
    return parts, lead


def _zero_missing(part: Array, observation: Observation, name: str) -> Array:
    """Returns a part with 0 for the numbers that the robot lacks."""
    mask = (observation.column_mask or {}).get(name)
    if mask is None:
        return part
    if mask.shape != part.shape:
        raise ValueError(
            f"column_mask of {name} must be {list(part.shape)} as its values, got "
            f"{list(mask.shape)}; give one bool for every number."
        )
    return jnp.where(mask, part, 0.0)


def column_present(observation: Observation, name: str) -> jax.Array | None:
    """Returns where the robot has any number of a column, `[B]` bool; None if it has all.

    Args:
      observation: any leading axes, whose product is B.
      name: `proprio` or `environment_state`.
    """
    mask = (observation.column_mask or {}).get(name)
    return None if mask is None else jnp.any(jnp.asarray(mask), axis=-1).reshape(-1)


def camera_mask(observation: Observation, cameras: Sequence[str]) -> jax.Array | None:
    """Returns which cameras have an image, `[B, C]` bool; None if all have.

    Args:
      observation: any leading axes, whose product is B.
      cameras: C names.
    """
    masks = observation.image_mask or {}
    if not masks.keys() & set(cameras):
        return None
    like = next(iter(masks.values()))
    real = [jnp.asarray(masks.get(name, jnp.ones(like.shape, bool))) for name in cameras]
    return jnp.stack(real, axis=-1).reshape(-1, len(cameras))


def shape(*sizes: int, dtype: Any = jnp.float32) -> Any:
    """Returns a `jax.ShapeDtypeStruct` that stands for a part of an observation."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def blank(example: Observation) -> dict[str, Array]:
    """Returns a batch of one observation of zeros, to initialise a Linen module.

    Args:
      example: shapes of one step's observation.

    Returns:
      Name -> `[1, ...]`; without the parts that are None.
    """
    parts = example._asdict().items()
    return {
        name: jnp.zeros((1, *part.shape), part.dtype) for name, part in parts if part is not None
    }


def all_real(tokens: Array, lead: Sequence[int]) -> Tokens:
    """Returns tokens without padding.

    Args:
      tokens: `[B, N, D]`.
      lead: leading axes, whose product is B.

    Returns:
      Tokens `[*lead, N, D]` float32, mask `[*lead, N]` all True.
    """
    tokens = jnp.asarray(tokens, jnp.float32).reshape(*lead, *tokens.shape[1:])
    return Tokens(tokens, jnp.ones(tokens.shape[:-1], bool))


def mask_token(tokens: Tokens, index: int, present: Array | None) -> Tokens:
    """Returns tokens of which one is padding, and 0, where its column is missing.

    Args:
      tokens: `[..., N, D]` and mask `[..., N]`.
      index: of the token of the column.
      present: `[B]` from `column_present`; None = everywhere.
    """
    if present is None:
        return tokens
    lead = tokens.mask.shape[:-1]
    mask = jnp.asarray(tokens.mask).at[..., index].set(jnp.asarray(present).reshape(lead))
    return Tokens(jnp.where(mask[..., None], tokens.tokens, 0.0), mask)
