"""Conversion of gripper conventions to ours: +1 open, -1 closed."""

import numpy as np
import pytest

from vla_jax.actions.gripper import gripper_to_open_positive


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
    converted = gripper_to_open_positive(action, gripper)
    np.testing.assert_array_equal(converted, np.stack([[5, 6, 7], expected], axis=1))


@pytest.mark.parametrize(
    ("gripper", "values"),
    [
        ("open_positive", [0, 1]),
        ("closed_positive", [0.0, 0.08]),
        ("open_one_closed_zero", [-1, 1]),
        ("closed_one_open_zero", [0, 2]),
        ("open_one_else_closed", [0, 2]),
    ],
)
def test_gripper_values_outside_the_declared_convention_are_refused(gripper, values):
    action = np.array(values, np.float32)[:, None]
    with pytest.raises(
        ValueError, match=f"gripper declared as '{gripper}' must (lie in|have both)"
    ):
        gripper_to_open_positive(action, gripper)


def test_an_unknown_gripper_convention_is_refused():
    with pytest.raises(ValueError, match=r"gripper must be one of .*got 'open'"):
        gripper_to_open_positive(np.ones((2, 2)), "open")


def test_calvin_is_relabelled_as_in_robovlms():
    calvin = np.array([-1, 1, 1, -1], np.float32)
    ours = gripper_to_open_positive(calvin[:, None], "open_positive")[:, 0]
    np.testing.assert_array_equal((ours + 1) / 2, (calvin + 1) // 2)  # their labels are 0 and 1


def test_the_arm_and_the_dtype_are_preserved():
    action = np.array([[0.3, 0], [0.7, 1]], np.float32)
    converted = gripper_to_open_positive(action, "open_one_else_closed")
    np.testing.assert_array_equal(converted[:, 0], action[:, 0])
    assert converted.dtype == np.float32
