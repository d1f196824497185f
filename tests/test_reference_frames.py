"""Conversions between the world frame and the tool frame agree with SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla_jax.actions import reference_frames, rotations
from vla_jax.actions.reference_frames import ToolFrame

N = 200
FRAMES = {
    "rotation": ToolFrame(),
    "rotation_scaled": ToolFrame(radians=0.05),
    "euler_difference": ToolFrame(delta="euler_difference"),
    "euler_difference_scaled": ToolFrame(delta="euler_difference", radians=0.05),
}
each_frame = pytest.mark.parametrize("name", FRAMES)


@pytest.fixture(scope="module")
def euler():
    """Orientations `[N, 3]`, including rolls near ±π as in CALVIN."""
    random = np.random.default_rng(0)
    angles = random.uniform([-np.pi, -1.4, -np.pi], [np.pi, 1.4, np.pi], (N, 3))
    angles[: N // 4, 0] = np.pi * np.sign(angles[: N // 4, 0]) - 0.01 * angles[: N // 4, 2]
    return angles.astype(np.float32)


@pytest.fixture(scope="module")
def action():
    """Actions `[N, 7]`, rotations of up to 0.3 units."""
    random = np.random.default_rng(1)
    return random.uniform(-0.3, 0.3, (N, 7)).astype(np.float32)


def by_scipy(action, euler, frame):
    """Returns actions in the tool frame, float64."""
    tool = Rotation.from_euler("xyz", euler)
    turn = action[:, 3:6] * frame.radians
    if frame.delta == "rotation":
        moved = Rotation.from_euler("xyz", turn) * tool
    else:
        moved = Rotation.from_euler("xyz", euler + turn)
    seen = (tool.inv() * moved).as_euler("xyz") / frame.radians
    return np.concatenate([tool.inv().apply(action[:, :3]), seen, action[:, 6:]], axis=1)


def test_matrices_equal_scipy_and_convert_back_to_the_angles(euler):
    matrix = rotations.euler_to_matrix(euler)
    np.testing.assert_allclose(matrix, Rotation.from_euler("xyz", euler).as_matrix(), atol=1e-6)
    np.testing.assert_allclose(rotations.matrix_to_euler(matrix), wrap(euler), atol=1e-5)


def wrap(angle):
    return (angle + np.pi) % (2 * np.pi) - np.pi


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_at_the_pole_the_angles_describe_the_same_rotation(dtype):
    pole = np.array([[0.3, np.pi / 2, 0.5], [0.3, -np.pi / 2, 0.5]], dtype)
    matrix = rotations.euler_to_matrix(pole)
    again = rotations.euler_to_matrix(rotations.matrix_to_euler(matrix))
    np.testing.assert_allclose(again, matrix, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-9, 0.0])
def test_rotation_vectors_equal_scipy_down_to_the_identity(euler, scale):
    angles = euler * np.float32(scale)
    expected = Rotation.from_euler("xyz", angles).as_rotvec()
    found = rotations.euler_to_rotation_vector(angles)
    turned = Rotation.from_rotvec(found) * Rotation.from_rotvec(expected).inv()  # π equals -π
    assert turned.magnitude().max() < 2e-6
    assert np.linalg.norm(found, axis=1).max() <= np.pi + 1e-6
    np.testing.assert_allclose(found[N // 2 :], expected[N // 2 :], atol=2e-6)


@each_frame
def test_to_tool_frame_equals_scipy(name, action, euler):
    found = reference_frames.to_tool_frame(action, euler, FRAMES[name])
    unit = FRAMES[name].radians
    expected = by_scipy(action.astype(np.float64), euler.astype(np.float64), FRAMES[name])
    np.testing.assert_allclose(found[:, 3:6] * unit, expected[:, 3:6] * unit, atol=2e-6)
    np.testing.assert_allclose(found[:, :3], expected[:, :3], atol=1e-6)
    np.testing.assert_array_equal(found[:, 6], action[:, 6])


@each_frame
def test_to_world_frame_inverts_to_tool_frame(name, action, euler):
    there = reference_frames.to_tool_frame(action, euler, FRAMES[name])
    back = reference_frames.to_world_frame(there, euler, FRAMES[name])
    unit = np.array([1, 1, 1, *[FRAMES[name].radians] * 3, 1])
    # A pitch beyond ±π/2 is represented by other angles.
    kept = (np.abs(euler[:, 1] + action[:, 4]) < 1.5) | ("rotation" in name)
    np.testing.assert_allclose((back * unit)[kept], (action * unit)[kept], atol=1e-5)
    assert kept.mean() > 0.9


@each_frame
def test_with_zero_orientation_both_frames_are_equal(name, action):
    found = reference_frames.to_tool_frame(action, np.zeros((N, 3), np.float32), FRAMES[name])
    np.testing.assert_allclose(found, action, atol=2e-5)


def test_the_two_kinds_of_rotation_delta_differ(action, euler):
    one, other = (
        reference_frames.to_tool_frame(action, euler, FRAMES[n]) for n in list(FRAMES)[::2]
    )
    np.testing.assert_array_equal(one[:, :3], other[:, :3])
    assert np.abs(one[:, 3:6] - other[:, 3:6]).mean() > 0.05


@pytest.mark.slow
@each_frame
def test_numpy_jit_and_vmap_agree_and_stay_float32(name, action, euler):
    for turn in (reference_frames.to_tool_frame, reference_frames.to_world_frame):
        plain = turn(action, euler, FRAMES[name])
        for other in (jax.jit(turn, static_argnums=2), jax.vmap(turn, (0, 0, None))):
            fast = other(jnp.asarray(action), jnp.asarray(euler), FRAMES[name])
            np.testing.assert_allclose(fast, plain, atol=5e-6 / FRAMES[name].radians)
            assert fast.dtype == plain.dtype == np.float32


def test_the_orientation_is_read_from_the_configured_columns():
    proprio = np.arange(8.0)
    frame = ToolFrame(orientation=(5, 3, 7))
    np.testing.assert_array_equal(reference_frames.read_orientation(proprio, frame), [5, 3, 7])


@pytest.mark.parametrize(("proprio", "got"), [(None, "none"), (np.zeros((2, 5)), "5 columns")])
def test_a_missing_orientation_is_refused(proprio, got):
    with pytest.raises(ValueError, match=rf"columns \(3, 4, 5\), got {got}"):
        reference_frames.read_orientation(proprio, ToolFrame())


def test_an_arm_without_rotations_is_refused():
    with pytest.raises(ValueError, match="three positions and three rotations, got 4 numbers"):
        reference_frames.to_tool_frame(np.zeros((1, 4)), np.zeros((1, 3)), ToolFrame())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"delta": "euler"}, "unknown delta 'euler'; .* Did you mean 'euler_difference'"),
        ({"orientation": (-1, 4, 5)}, "orientation must be column indices of 0 or more, got"),
        ({"radians": 0.0}, "radians must be at least 1e-12, got 0.0"),
    ],
)
def test_a_wrong_frame_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        ToolFrame(**fields)
