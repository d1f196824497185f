"""Image augmentation."""

import numpy as np
import pytest

from vla_jax.data import augment
from vla_jax.types import Batch, Observation

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), np.uint8)


def make_batch(**images):
    mask = np.ones((2, 3), bool)
    return Batch(Observation(**images), None, mask, np.zeros((2, 3, 1, 7)), mask[..., None])


def test_a_shift_is_padding_with_the_edge_and_cropping():
    class Fixed:
        def integers(self, *_):
            return np.array([2, -1])

    padded = np.pad(IMAGES[0], [(0, 0), (2, 2), (2, 2), (0, 0)], mode="edge")
    expected = padded[:, 0:8, 3:11]
    np.testing.assert_array_equal(augment.random_shift(IMAGES[0], 2, Fixed()), expected)


def test_all_steps_of_a_window_move_alike_and_by_no_more_than_the_limit():
    window = np.repeat(IMAGES[0, :1], 3, axis=0)
    centres = set()
    for seed in range(60):
        shifted = augment.random_shift(window, 1, np.random.default_rng(seed))
        np.testing.assert_array_equal(shifted, np.repeat(shifted[:1], 3, axis=0))
        pixel = (shifted[0] == window[0, 4, 4]).all(-1)
        centres |= {tuple(place) for place in np.argwhere(pixel)}
    assert centres == {(r, c) for r in (3, 4, 5) for c in (3, 4, 5)}


def test_light_is_its_equation():
    class Fixed:
        draws = iter([0.1, 1.2])

        def uniform(self, *_):
            return next(self.draws)

    expected = np.clip(1.2 * (IMAGES / 255 - 0.5) + 0.6, 0, 1) * 255
    changed = augment.random_light(IMAGES, 0.2, 0.3, Fixed())
    assert changed.dtype == np.uint8
    np.testing.assert_allclose(changed, expected, atol=0.5001)


def test_no_change_is_asked_for_and_none_is_made():
    batch = make_batch(image_primary=IMAGES)
    same = augment.apply(batch, augment.AugmentConfig(), np.random.default_rng(0))
    np.testing.assert_array_equal(same.observation.image_primary, IMAGES)


def test_windows_of_a_batch_differ_and_absent_cameras_stay_absent():
    batch = make_batch(image_wrist=np.stack([IMAGES[0]] * 2))
    config = augment.AugmentConfig(shift=3, brightness=0.2, contrast=0.2)
    changed = augment.apply(batch, config, np.random.default_rng(1)).observation
    assert changed.image_primary is None
    assert not np.array_equal(changed.image_wrist[0], changed.image_wrist[1])
    assert changed.image_wrist.shape == IMAGES.shape


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shift", -1, "shift must be at least 0"),
        ("brightness", 1.5, r"brightness must be in \[0, 1\), got 1.5"),
        ("contrast", -0.1, r"contrast must be in \[0, 1\), got -0.1"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        augment.AugmentConfig(**{field: value})
