"""Several data sets as one source of batches: each with a weight, and its own statistics.

Robots differ in cameras and in the numbers of their actions and states. A batch of a mixture has
the cameras and numbers of all of them; what a robot lacks is zero and masked: `image_mask` for
cameras, `column_mask` for the numbers of its state, `action_dims` for those of an action.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.data.packing import Packed
from vla_jax.data.windows import Windows
from vla_jax.types import Batch, Observation, get_images, replace_images

NUMBERS = ("proprio", "environment_state")


class Mixed:
    """Windows of several data sets, one after the other: a random-access source for grain.

    `mixed[indices]` is the batch of those windows in the order of the indices. Which index comes
    when is the loader's business: it draws from each part in proportion to its weight.
    """

    def __init__(
        self, parts: Mapping[str, Windows | Packed], weights: Sequence[float] | None = None
    ) -> None:
        """Finds the sizes that fit all parts; reads one window of each.

        Args:
          parts: name -> windows, normalised with the part's own statistics.
          weights: share of each part in the batches, any scale; None = by number of windows.

        Raises:
          ValueError: no parts, weights that are not positive, or parts that cannot be one batch:
            other windows, chunks, tokens of instructions, or sizes of images.
        """
        sizes = tuple(len(part) for part in parts.values())
        if not parts or min(sizes) < 1:
            raise ValueError(
                f"a mixture must have parts with windows, got {list(parts)} with {list(sizes)}."
            )
        weights = tuple(float(weight) for weight in (sizes if weights is None else weights))
        if len(weights) != len(sizes) or not all(np.isfinite(weights)) or min(weights) <= 0:
            raise ValueError(
                f"weights must be {len(sizes)} positive numbers, one for each of {list(parts)}, "
                f"got {list(weights)}."
            )
        self.names = tuple(parts)
        self.parts = tuple(parts.values())
        self.sizes = sizes
        self.weights = weights
        self._offsets = np.cumsum([0, *sizes])
        self._like = _common([part[np.array([0])] for part in self.parts], self.names)
        self.identity = {
            "parts": list(parts),  # in this order, which the indices of windows depend on
            "weights": list(weights),
            **{
                f"{name}: {key}": value
                for name, part in parts.items()
                for key, value in part.identity.items()
            },
        }

    def __len__(self) -> int:
        """Returns the number of windows of all parts."""
        return int(self._offsets[-1])

    def __getitem__(self, index: Any) -> Batch:
        """Returns the windows at an array of indices `[B]` as one batch."""
        indices = np.asarray(index)
        owners = np.searchsorted(self._offsets, indices, side="right") - 1
        batches, places = [], []
        for owner in np.unique(owners):
            inside = np.flatnonzero(owners == owner)
            batch = self.parts[owner][indices[inside] - self._offsets[owner]]
            batches.append(_fit(batch, self._like))
            places.append(inside)
        return _join(batches, np.argsort(np.concatenate(places)))


def _join(batches: Sequence[Any], order: np.ndarray) -> Any:
    """Returns equal records of arrays as one, concatenated along B and then in this order."""
    first = batches[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {name: _join([batch[name] for batch in batches], order) for name in first}
    if isinstance(first, tuple):
        return type(first)(*(_join(parts, order) for parts in zip(*batches, strict=True)))
    return np.concatenate(batches)[order]


def pad_actions(action: Any, size: int) -> np.ndarray:
    """Returns actions `[..., A]` as `[..., size]`: the arm first, zeros, and the gripper last."""
    missing = np.zeros((*action.shape[:-1], size - action.shape[-1]), action.dtype)
    return np.concatenate([action[..., :-1], missing, action[..., -1:]], axis=-1)


def pad_last(values: Any, size: int) -> np.ndarray:
    """Returns `values [..., D]` as `[..., size]` with zeros at the end."""
    missing = np.zeros((*values.shape[:-1], size - values.shape[-1]), values.dtype)
    return np.concatenate([values, missing], axis=-1)


def _common(examples: Sequence[Batch], names: Sequence[str]) -> Batch:
    """Returns a batch of one window of zeros, with the cameras and sizes that fit all examples."""
    first = examples[0]
    cameras: dict[str, np.ndarray] = {}
    for example, name in zip(examples, names, strict=True):
        _check_same(example, first, name, names[0])
        for camera, images in get_images(example.observation).items():
            known = cameras.setdefault(camera, images)
            if known.shape != images.shape:
                raise ValueError(
                    f"images of {camera} must have one size in a mixture, got {known.shape[2:4]} "
                    f"and {images.shape[2:4]} in {name}; give an image size."
                )
    lacking = {
        camera
        for example in examples
        for camera in cameras.keys() - get_images(example.observation).keys()
    }
    lead = first.timestep_mask.shape
    action = _widest([example.action for example in examples])
    numbers = {name: [getattr(e.observation, name) for e in examples] for name in NUMBERS}
    columns = {name: _widest(values) for name, values in numbers.items()}
    unequal = {
        name: np.zeros(column.shape, bool)
        for name, column in columns.items()
        if column is not None and any(np.shape(values) != column.shape for values in numbers[name])
    }
    return first._replace(
        observation=Observation(
            **columns,
            column_mask=unequal or None,
            images=cameras,
            image_mask={camera: np.zeros(lead, bool) for camera in sorted(lacking)} or None,
        ),
        action=action,
        action_dims=np.zeros((*lead, action.shape[-1]), bool),
    )


def _widest(values: Sequence[Any]) -> Any:
    """Returns the array with the largest last axis; None if all are None."""
    present = [value for value in values if value is not None]
    return max(present, key=lambda value: value.shape[-1], default=None)


def fit_observation(observation: Observation, like: Observation) -> Observation:
    """Returns an observation with the cameras and numbers of `like`, masked where it has none.

    Args:
      observation: `[B, W, ...]` of one data set.
      like: arrays or shapes with the last axes of all parts that are expected, any leading axes;
        cameras and columns that it has a mask of have one in the result too, also where nothing is
        missing.
    """
    assert observation.instruction is not None  # windows always have one
    images, lead = get_images(observation), observation.instruction.shape[:-1]
    missing = {
        camera: np.zeros((*lead, *expected.shape[-3:]), np.uint8)
        for camera, expected in get_images(like).items()
        if camera not in images
    }
    numbers, real = {}, {}
    for field in NUMBERS:
        expected, values = getattr(like, field), getattr(observation, field)
        if expected is not None:
            values = np.zeros((*lead, 0), np.float32) if values is None else values
            numbers[field] = pad_last(values, expected.shape[-1])
            if field in (like.column_mask or ()) or values.shape != numbers[field].shape:
                real[field] = pad_last(np.ones(values.shape, bool), expected.shape[-1])
    masks = {
        camera: np.full(lead, camera in images) for camera in (*missing, *(like.image_mask or ()))
    }
    return replace_images(observation, missing)._replace(
        **numbers, image_mask=masks or None, column_mask=real or None
    )


def _fit(batch: Batch, like: Batch) -> Batch:
    """Returns a part's batch with the cameras and sizes of `like`."""
    size = like.action.shape[-1]
    dims = batch.action_dims
    if dims is None:
        dims = np.ones((*batch.timestep_mask.shape, batch.action.shape[-1]), bool)
    return batch._replace(
        observation=fit_observation(batch.observation, like.observation),
        action=pad_actions(batch.action, size),
        action_dims=pad_actions(dims, size),
    )


def _check_same(example: Batch, first: Batch, name: str, first_name: str) -> None:
    """Checks what cannot be padded: windows, chunks, ids of instructions, cached tokens."""
    sizes = [_sizes(first), _sizes(example)]
    for what, value in sizes[0].items():
        if sizes[1][what] != value:
            raise ValueError(
                f"{what} must be the same in all data sets of a mixture, got {value} in "
                f"{first_name} and {sizes[1][what]} in {name}."
            )


def _sizes(batch: Any) -> dict[str, Any]:
    return {
        "window_size": batch.action.shape[1],
        "action_horizon": batch.action.shape[2],
        "ids of an instruction": batch.observation.instruction.shape[-1],
        "cached tokens": None if batch.tokens is None else batch.tokens.tokens.shape[2:],
        "packed": batch.reset is not None,
    }
