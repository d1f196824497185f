"""Conversion of a data set's actions to the tool frame."""

import numpy as np
import pytest

from vla_jax.actions import reference_frames
from vla_jax.actions.reference_frames import ToolFrame
from vla_jax.data import dataset
from vla_jax.data.tool_frame import in_tool_frame


def draw(proprio_dim=7):
    random = np.random.default_rng(0)
    episodes = [
        dataset.Episode(
            {"proprio": random.uniform(-1, 1, (length, proprio_dim))},
            random.uniform(-0.2, 0.2, (length, 7)),
            "go",
        )
        for length in (3, 5)
    ]
    return dataset.from_episodes(episodes, fps=10)


def test_every_action_is_rotated_by_the_orientation_of_its_step():
    data, frame = draw(), ToolFrame(delta="euler_difference", radians=0.1)
    turned = in_tool_frame(data, frame)
    for row in range(8):
        orientation = data.columns["proprio"][row, 3:6]
        expected = reference_frames.to_tool_frame(data.columns["action"][row], orientation, frame)
        np.testing.assert_allclose(turned.columns["action"][row], expected, atol=1e-6)
    np.testing.assert_array_equal(turned.columns["proprio"], data.columns["proprio"])
    assert turned.columns["action"].dtype == np.float32


def test_the_frame_is_part_of_the_fingerprint():
    data = draw()
    frames = (ToolFrame(), ToolFrame(radians=0.05))
    names = {data.fingerprint, *(in_tool_frame(data, frame).fingerprint for frame in frames)}
    assert len(names) == 3


def test_data_without_an_orientation_are_refused():
    with pytest.raises(ValueError, match=r"proprio must hold the tool's orientation .* 5 columns"):
        in_tool_frame(draw(proprio_dim=5), ToolFrame())
