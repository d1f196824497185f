"""Conversion of robots' actions to ours, gripper last and +1 open, and back."""

import numpy as np
import pytest

from vla_jax.actions.action_layout import (
    RANGES,
    ActionLayout,
    from_robot,
    make_layout,
    to_robot,
)


def convention(dim, name):
    """Returns the layout of actions whose last number is a gripper of a named convention."""
    only_open = name == "open_one_else_closed"
    return make_layout(dim, (-1,), RANGES[name], only_open=only_open)


@pytest.mark.parametrize(
    ("gripper", "values", "expected"),
    [
        ("open_positive", [-1, 0.5, 1], [-1, 0.5, 1]),
        ("closed_positive", [-1, 0.5, 1], [1, -0.5, -1]),
        ("open_one_closed_zero", [0, 0.75, 1], [-1, 0.5, 1]),
        ("closed_one_open_zero", [0, 0.75, 1], [1, -0.5, -1]),
        ("open_one_else_closed", [0, 0.99, 1], [-1, -1, 1]),
        ("open_one_else_closed", [-1, 0, 1], [-1, -1, 1]),
    ],
)
def test_a_declared_gripper_convention_is_converted_to_plus_one_open(gripper, values, expected):
    action = np.stack([np.array([5, 6, 7]), np.array(values)], axis=1).astype(np.float32)
    converted = from_robot(action, convention(action.shape[1], gripper))
    np.testing.assert_array_equal(converted, np.stack([[5, 6, 7], expected], axis=1))


@pytest.mark.parametrize(
    ("gripper", "values"),
    [
        ("open_positive", [0, 1]),
        ("closed_positive", [0.0, 0.08]),
        ("open_one_closed_zero", [-1, 1]),
        ("closed_one_open_zero", [0, 2]),
    ],
)
def test_gripper_values_outside_the_declared_convention_are_refused(gripper, values):
    action = np.array(values, np.float32)[:, None]
    with pytest.raises(ValueError, match=r"gripper declared as .* closed and .* open must lie in"):
        from_robot(action, convention(action.shape[1], gripper))


def test_calvin_is_relabelled_as_in_robovlms():
    calvin = np.array([-1, 1, 1, -1], np.float32)
    ours = from_robot(calvin[:, None], ActionLayout(1, (0,)))[:, 0]
    np.testing.assert_array_equal((ours + 1) / 2, (calvin + 1) // 2)  # their labels are 0 and 1


def test_the_arm_and_the_dtype_are_preserved():
    action = np.array([[0.3, 0], [0.7, 1]], np.float32)
    converted = from_robot(action, convention(2, "open_one_else_closed"))
    np.testing.assert_array_equal(converted[:, 0], action[:, 0])
    assert converted.dtype == np.float32


@pytest.mark.parametrize("grippers", [(), (0,), (2,), (-1,), (1, 3)])
def test_actions_come_back_in_the_order_and_range_of_the_robot(grippers):
    layout = make_layout(4, grippers, (100.0, 0.0))
    action = np.random.default_rng(0).uniform(0, 100, (5, 4)).astype(np.float32)
    ours = from_robot(action, layout)
    assert ours.shape == (5, layout.size)
    assert layout.missing == (() if len(grippers) == 1 else (4,))
    np.testing.assert_array_equal(ours[:, list(layout.missing)], 0)
    for index in layout.grippers:
        place = -1 if len(grippers) == 1 else index
        np.testing.assert_allclose(ours[:, place], 1 - action[:, index] / 50, atol=1e-5)
    np.testing.assert_allclose(to_robot(ours, layout), action, atol=1e-4)


def test_wrong_layouts_are_refused():
    with pytest.raises(ValueError, match="different indices below 7"):
        make_layout(7, (7,), (-1, 1))
    with pytest.raises(ValueError, match="different indices below 7"):
        make_layout(7, (6, -1), (-1, 1))
    with pytest.raises(ValueError, match="finite and different"):
        make_layout(7, (6,), (1.0, 1.0))
    with pytest.raises(ValueError, match="must have 7 numbers, got 6"):
        from_robot(np.zeros((2, 6)), ActionLayout())


def test_every_convention_maps_open_to_plus_one():
    for name, (closed, opened) in RANGES.items():
        action = np.array([[closed], [opened]], np.float32)
        converted = from_robot(action, convention(1, name))
        np.testing.assert_array_equal(converted[:, 0], [-1, 1])


def test_a_gripper_that_uses_little_of_a_wide_range_is_refused():
    action = np.array([[0.0], [1.0]], np.float32)
    with pytest.raises(ValueError, match=r"must lie in .* and use more than 5 %"):
        from_robot(action, make_layout(1, (0,), (0.0, 100.0)))
