"""Image augmentation in the loader (NumPy) and on the device (JAX): the same laws hold for both."""

from functools import partial

import jax
import numpy as np
import pytest

from vla_jax.data import image_augment
from vla_jax.data.image_augment import AugmentConfig, Change
from vla_jax.training import device_augment as on_device
from vla_jax.types import Batch, Observation

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
ALL_LEVELS = np.arange(3 * 256, dtype=np.uint8).reshape(4, 8, 8, 3)
WIDE = AugmentConfig(shift=3, brightness=0.2, contrast=0.2)
EITHER = pytest.mark.parametrize("change", [image_augment.change, jax.jit(on_device.change)])


def make_batch(**images):
    mask = np.ones((2, 3), bool)
    return Batch(Observation(**images), None, mask, np.zeros((2, 3, 1, 7)), mask[..., None])


def host(config, seed, **images):
    """Returns the observation after augmentation in the loader."""
    return image_augment.apply(
        make_batch(**images), config, np.random.default_rng(seed)
    ).observation


_device = jax.jit(on_device.apply, static_argnums=2)


def device(config, seed, **images):
    """Returns the observation after augmentation on the device."""
    return jax.device_get(_device(jax.random.key(seed), Observation(**images), config))


APPLY = pytest.mark.parametrize("apply", [host, device])


@EITHER
def test_a_shift_is_edge_padding_and_cropping(change):
    padded = np.pad(IMAGES[0], [(0, 0), (2, 2), (2, 2), (0, 0)], mode="edge")
    shifted = change(IMAGES[0], Change(2, -1, 0.0, 1.0))
    np.testing.assert_array_equal(shifted, padded[:, 0:8, 3:11])


@EITHER
def test_brightness_and_contrast_follow_their_equation(change):
    expected = np.clip(1.2 * (ALL_LEVELS / 255 - 0.5) + 0.6, 0, 1) * 255
    changed = change(ALL_LEVELS, Change(0, 0, 0.1, 1.2))
    assert changed.dtype == np.uint8
    np.testing.assert_allclose(changed, expected, atol=0.5001)


def test_the_same_draw_gives_bit_identical_images_in_numpy_and_jax():
    draws = [
        Change(*(field[0] for field in image_augment.draw(WIDE, np.random.default_rng(seed), 1)))
        for seed in range(100)
    ]
    by = Change(*np.array(draws, np.float32).T)
    by = by._replace(down=by.down.astype(int), right=by.right.astype(int))
    changed = jax.jit(jax.vmap(on_device.change, (None, 0)))(ALL_LEVELS, by)
    expected = [image_augment.change(ALL_LEVELS, draw) for draw in draws]
    np.testing.assert_array_equal(changed, np.stack(expected))


def test_draws_cover_their_ranges_in_numpy_and_jax():
    rng = np.random.default_rng(0)
    of_host = image_augment.draw(WIDE, rng, 400)
    keys = jax.random.split(jax.random.key(0), 400)
    of_device = jax.jit(jax.vmap(partial(on_device.draw, config=WIDE)))(keys)
    for by in (of_host, of_device):
        for pixels in (by.down, by.right):
            assert set(np.asarray(pixels, int).tolist()) == set(range(-3, 4))
        for light, middle in ((by.brightness, 0.0), (by.contrast, 1.0)):
            assert np.all(np.abs(light - middle) <= 0.2 + 1 / image_augment.GRAIN)
            assert np.ptp(light) > 0.38
            assert abs(np.mean(light) - middle) < 0.03
            steps = np.asarray(light, np.float64) * image_augment.GRAIN
            np.testing.assert_array_equal(steps, np.rint(steps))


@APPLY
def test_all_steps_of_a_window_are_shifted_equally_and_within_the_limit(apply):
    windows = np.repeat(IMAGES[:, :1], 3, axis=1)
    centres = set()
    for seed in range(40):
        moved = apply(AugmentConfig(shift=1), seed, image_primary=windows).image_primary
        for window, shifted in zip(windows, moved, strict=True):
            np.testing.assert_array_equal(shifted, np.repeat(shifted[:1], 3, axis=0))
            pixel = (shifted[0] == window[0, 4, 4]).all(-1)
            centres |= {tuple(place) for place in np.argwhere(pixel)}
    assert centres == {(r, c) for r in (3, 4, 5) for c in (3, 4, 5)}


@APPLY
def test_the_default_config_changes_nothing(apply):
    same = apply(AugmentConfig(), 0, image_primary=IMAGES)
    np.testing.assert_array_equal(same.image_primary, IMAGES)


@EITHER
def test_zero_ranges_draw_the_identity(change):
    no_change = AugmentConfig()
    drawn = on_device.draw(jax.random.key(3), no_change)
    assert drawn == image_augment.draw(no_change, np.random.default_rng(3), 1) == (0, 0, 0, 1)
    np.testing.assert_array_equal(change(ALL_LEVELS, drawn), ALL_LEVELS)


@APPLY
def test_windows_and_cameras_get_different_changes_and_absent_cameras_stay_absent(apply):
    alike = np.stack([IMAGES[0]] * 2)
    changed = apply(WIDE, 1, image_wrist=alike)
    assert changed.image_primary is None
    assert not np.array_equal(changed.image_wrist[0], changed.image_wrist[1])
    assert changed.image_wrist.shape == IMAGES.shape
    assert changed.image_wrist.dtype == np.uint8
    both = apply(WIDE, 1, image_primary=alike, image_wrist=alike)
    assert not np.array_equal(both.image_primary, both.image_wrist)


def test_on_the_device_the_key_determines_the_images():
    one, again, other = (device(WIDE, seed, image_primary=IMAGES) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.image_primary, again.image_primary)
    assert not np.array_equal(one.image_primary, other.image_primary)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shift", -1, "shift must be at least 0"),
        ("brightness", 1.5, r"brightness must be in \[0, 1\), got 1.5"),
        ("contrast", -0.1, r"contrast must be in \[0, 1\), got -0.1"),
    ],
)
def test_a_range_out_of_bounds_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**{field: value})
