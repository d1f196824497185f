"""Image augmentation inside `jit`: the counterpart of `data.image_augment` on the device."""

import jax
import jax.numpy as jnp

from vla_jax.data.image_augment import GRAIN, AugmentConfig, Change
from vla_jax.types import Array, Key, Observation, get_images, replace_images


def apply(key: Key, observation: Observation, config: AugmentConfig) -> Observation:
    """Returns the observation with augmented images: one change per window and camera.

    Args:
      key: consumed.
      observation: windows with images `[B, W, h, w, 3]` uint8, or None.
      config: ranges of the changes.

    Returns:
      An observation of the same shapes and dtypes.
    """
    if config == AugmentConfig():
        return observation
    cameras = get_images(observation)
    names = ["image_primary", "image_wrist", *sorted(observation.images or ())]
    changed = {
        name: _change_each(camera_key, cameras[name], config)
        for name, camera_key in zip(names, jax.random.split(key, len(names)), strict=True)
        if name in cameras
    }
    return replace_images(observation, changed)


def draw(key: Key, config: AugmentConfig) -> Change:
    """Returns a random change within the ranges of `config`, of scalars `[]`; consumes `key`."""
    shift_key, light_key = jax.random.split(key)
    down, right = jax.random.randint(shift_key, (2,), -config.shift, config.shift + 1)
    ranges = jnp.array([config.brightness, config.contrast])
    light = jnp.rint(jax.random.uniform(light_key, (2,), minval=-1.0) * ranges * GRAIN) / GRAIN
    return Change(down, right, light[0], 1 + light[1])


def change(images: Array, by: Change) -> jax.Array:
    """Returns images `[W, h, w, 3]` uint8, changed as by `data.image_augment.change`.

    Args:
      images: images of one window and camera.
      by: change of scalars `[]`.
    """
    h, w = images.shape[1:3]
    rows = jnp.clip(jnp.arange(h) - by.down, 0, h - 1)
    columns = jnp.clip(jnp.arange(w) - by.right, 0, w - 1)
    moved = jnp.take(jnp.take(images, rows, axis=1), columns, axis=2)
    levels = by.contrast * (moved.astype(jnp.float32) - 127.5) + (127.5 + 255 * by.brightness)
    return jnp.rint(jnp.clip(levels, 0, 255)).astype(jnp.uint8)


def _change_each(key: Key, images: Array, config: AugmentConfig) -> jax.Array:
    """Changes windows `[B, W, h, w, 3]`, each by its own random change."""
    changes = jax.vmap(draw, (0, None))(jax.random.split(key, len(images)), config)
    return jax.vmap(change)(images, changes)
