"""The JAX table: expert, layouts, contacts, tasks and images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs.demonstrations import collect
from vla_jax.envs.table import jax_env, quasi_static, renderer, rules

BLIND = jax_env.JaxTableConfig(image_size=0)
SEEING = jax_env.JaxTableConfig(image_size=16, max_steps=6)
UPRIGHT = jax_env.JaxTableConfig(image_size=0, rotated_share=0.0)
OPEN, CLOSED = 1.0, -1.0


@functools.cache
def demonstrations(config=BLIND, num_episodes=512, noise=0.25):
    return collect(jax_env.make(config), jax.random.key(1), num_episodes, noise=noise)


def world(instruction, *, tool=(0.0, 0.0, 0.15), yaw=0.0, target_yaw=0.0, target=(0.0, 0.0)):
    """A table with upright tool and the first block at `target`, other objects far away."""
    env = jax_env.make(UPRIGHT)
    state, _ = env.reset(jax.random.key(0))
    far = jnp.array([[0.15, 0.15], [0.15, -0.15], [-0.15, 0.15]])
    places = jnp.concatenate([jnp.array([target]), far])
    return env, state._replace(
        tool=jnp.array(tool),
        turns=jnp.array([0.0, 0.0, yaw]),
        blocks=state.blocks.at[:, :2].set(places),
        yaws=jnp.array([target_yaw, 0.0, 0.0, 0.0]),
        plate=jnp.array([-0.15, -0.15]),
        instruction=jnp.array(env.instructions.index(instruction), jnp.int32),
    )


def play(env, state, actions):
    """The state after some actions `(move in metres, gripper)`, and the last transition."""
    step = jax.jit(env.step)
    for (dx, dy, dz), grip in actions:
        action = jnp.array([dx / 0.03, dy / 0.03, dz / 0.03, 0, 0, 0, grip])
        state, transition = step(state, action)
    return state, transition


@jax.jit
def layouts(share, keys):
    return jax.vmap(functools.partial(quasi_static.sample_layout, share))(keys)


STAY, DOWN, UP = (0.0, 0.0, 0.0), (0.0, 0.0, -0.03), (0.0, 0.0, 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("task", rules.TASKS)
def test_expert_succeeds_in_98_percent_under_noise(task):
    env, demos = jax_env.make(BLIND), demonstrations()
    asked = np.array(env.tasks)[np.array(demos.instruction[:, 0])] == task
    assert asked.sum() > 100
    assert np.array(demos.success)[asked].mean() >= 0.98


@pytest.mark.parametrize(
    ("task", "low", "high"), [("touch", 5, 10), ("lift", 9, 18), ("place", 17, 32)]
)
def test_mean_episode_lengths_are_in_the_expected_range(task, low, high):
    env, demos = jax_env.make(BLIND), demonstrations()
    asked = np.array(env.tasks)[np.array(demos.instruction[:, 0])] == task
    assert low <= np.array(demos.length)[asked].mean() <= high


@pytest.mark.slow
def test_an_expert_that_does_not_turn_fails_in_most_rotated_layouts():
    env = jax_env.make(BLIND)
    stiff = env._replace(expert=lambda state: env.expert(state).at[5].set(0))
    demos = collect(stiff, jax.random.key(1), 512)
    rotated = np.array(demos.observation.environment_state[:, 0, 3]) != 0
    grasps = np.array(env.tasks)[np.array(demos.instruction[:, 0])] != "touch"
    success = np.array(demos.success)
    assert (rotated & grasps).sum() > 100
    assert success[rotated & grasps].mean() < 0.45
    assert success[~rotated & grasps].mean() > 0.9
    assert success[~grasps].mean() >= 0.98


def test_blocks_and_the_plate_keep_a_minimum_distance():
    keys = jax.random.split(jax.random.key(3), 2000)
    plate, blocks, _ = layouts(0.5, keys)
    points = np.concatenate([np.array(plate)[:, None], np.array(blocks)], axis=1)
    distance = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1) + np.eye(5)
    assert np.abs(points).max() <= rules.LAYOUT_HALF_SIZE
    # the best of some candidates is taken if none is far enough, rarely in thousands of layouts
    assert (distance[:, 0].min(axis=1) > rules.PLATE_SPACING).mean() > 0.998
    assert (distance[:, 1:, 1:].min(axis=(1, 2)) > rules.LAYOUT_SPACING).mean() > 0.998


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rotated_share_is_the_share_of_rotated_layouts(share):
    keys = jax.random.split(jax.random.key(4), 2000)
    _, _, yaws = layouts(share, keys)
    turned = np.array(yaws != 0)
    assert np.all(turned.all(axis=1) == turned.any(axis=1))
    assert abs(turned.all(axis=1).mean() - share) < 0.05
    assert np.abs(yaws).max() <= rules.MAX_YAW


@pytest.mark.slow
def test_the_same_key_gives_the_same_episode_and_every_instruction_occurs(key):
    env = jax_env.make(BLIND)
    first, again = jax.jit(env.reset)(key), jax.jit(env.reset)(key)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    states, _ = jax.jit(jax.vmap(env.reset))(jax.random.split(key, 300))
    assert set(np.array(jax.vmap(env.instruction_index)(states))) == set(range(12))
    assert env.instructions[8] == "put the red block on the plate"
    assert env.tasks[::4] == rules.TASKS


@pytest.mark.slow
def test_jit_and_vmap_change_nothing(key):
    env = jax_env.make(BLIND)
    actions = jax.random.uniform(key, (3, 7), minval=-1)
    states, _ = jax.jit(jax.vmap(env.reset))(jax.random.split(key, 3))
    together = jax.jit(jax.vmap(env.step))(states, actions)
    for i, step in enumerate([env.step, jax.jit(env.step), jax.jit(env.step)]):
        alone = step(jax.tree.map(lambda x, i=i: x[i], states), actions[i])
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a, b[i], atol=1e-6), alone, together
        )


@pytest.mark.slow
def test_observation_is_the_state_in_metres_and_radians():
    env, state = world("touch the red block", tool=(0.1, -0.05, 0.2), yaw=0.3, target_yaw=0.5)
    state, transition = play(env, state, [(STAY, OPEN)])
    blocks = transition.observation.environment_state[:20].reshape(4, 5)
    np.testing.assert_allclose(blocks[0], [0, 0, 0.02, np.sin(1.0), np.cos(1.0)], atol=1e-6)
    np.testing.assert_allclose(blocks[3], [-0.15, 0.15, 0.02, 0, 1], atol=1e-6)
    np.testing.assert_allclose(
        transition.observation.environment_state[20:], [-0.15, -0.15], atol=1e-6
    )
    expected = [0.1, -0.05, 0.2, np.sin(0.3), np.cos(0.3), 0, 0, 1]
    np.testing.assert_allclose(transition.observation.proprio, expected, atol=1e-6)
    assert transition.observation.environment_state.shape == (rules.STATE_SIZE,)
    assert transition.observation.proprio.shape == (rules.PROPRIO_SIZE,)
    assert transition.observation.image_primary is None


def test_each_action_dimension_moves_the_axis_of_its_name():
    env, state = world("lift the red block")
    _, transition = env.step(state, jnp.array([0.5, -0.5, 1.0, 0.25, -0.25, 0.5, CLOSED]))
    x, y, z, sin, cos, roll, pitch, opening = np.array(transition.observation.proprio)
    np.testing.assert_allclose([x, y, z], [0.015, -0.015, 0.18], atol=1e-6)
    np.testing.assert_allclose([np.arctan2(sin, cos), roll, pitch], [0.1, 0.05, -0.05], atol=1e-6)
    assert opening < 1


def test_actions_are_clipped_and_the_tool_stays_in_the_workspace():
    env, state = world("lift the red block", tool=(0.2, 0.0, 0.24))
    far, step = jnp.full(7, 100.0), jax.jit(env.step)
    once, _ = step(state, far)
    np.testing.assert_allclose(once.tool, [0.22, 0.03, 0.25], atol=1e-6)
    for _ in range(12):
        state, _ = step(state, far)
    np.testing.assert_allclose(state.tool, rules.WORKSPACE_HIGH, atol=1e-6)
    np.testing.assert_allclose(
        state.turns, [rules.MAX_TILT, rules.MAX_TILT, rules.MAX_TOOL_YAW], atol=1e-6
    )


@pytest.mark.parametrize(("asked", "success"), [("red", True), ("blue", False)])
def test_the_first_touch_ends_the_touch_task(asked, success):
    env, state = world(f"touch the {asked} block", tool=(0.0, 0.0, 0.10))
    state, transition = play(env, state, [(STAY, CLOSED), (STAY, CLOSED)])
    assert not transition.terminated
    _, transition = play(env, state, [(DOWN, CLOSED)] * 3)
    assert transition.terminated
    assert not transition.truncated
    assert bool(transition.success) is success
    assert float(transition.reward) == float(success)


@pytest.mark.parametrize(("asked", "success"), [("red", True), ("green", False)])
def test_lifting_any_block_ends_the_lift_task(asked, success):
    env, state = world(f"lift the {asked} block", tool=(0.0, 0.0, 0.02))
    state, transition = play(env, state, [(STAY, CLOSED), (UP, CLOSED)])
    assert not transition.terminated  # 3 cm are not enough
    _, transition = play(env, state, [(UP, CLOSED)])
    assert transition.terminated
    assert bool(transition.success) is success


@pytest.mark.parametrize(("asked", "success"), [("red", True), ("yellow", False)])
def test_releasing_any_block_on_the_plate_ends_the_place_task(asked, success):
    env, state = world(f"put the {asked} block on the plate", tool=(0.0, 0.0, 0.02))
    state = state._replace(plate=jnp.array([0.0, -0.12]))
    side = (0.0, -0.03, 0.0)
    carry = [(STAY, CLOSED), (UP, CLOSED), *[(side, CLOSED)] * 4, (DOWN, CLOSED)]
    state, transition = play(env, state, carry)
    assert not transition.terminated  # on the plate, but still held
    np.testing.assert_allclose(state.blocks[0], [0, -0.12, 0.028], atol=1e-5)
    _, transition = play(env, state, [(STAY, OPEN)])
    assert transition.terminated
    assert bool(transition.success) is success


def test_a_block_released_beside_the_plate_falls_and_ends_nothing():
    env, state = world("put the red block on the plate", tool=(0.0, 0.0, 0.02))
    lifted, _ = play(env, state, [(STAY, CLOSED), (UP, CLOSED), (UP, CLOSED)])
    assert float(lifted.blocks[0, 2]) == pytest.approx(0.08)
    state, transition = play(env, lifted, [(STAY, OPEN)])
    np.testing.assert_allclose(state.blocks[0], [0, 0, 0.02], atol=1e-6)
    assert not transition.terminated


def test_a_block_released_above_another_one_rests_on_it():
    env, state = world("lift the green block", tool=(0.0, 0.0, 0.02))
    state, _ = play(env, state, [(STAY, CLOSED), (UP, CLOSED), (UP, CLOSED)])
    blocks = state.blocks.at[1, :2].set(0.0)
    state, _ = play(env, state._replace(blocks=blocks), [(STAY, OPEN)])
    assert float(state.blocks[0, 2]) == pytest.approx(0.06)


def closes_on(**kwargs):
    env, state = world("put the red block on the plate", **kwargs)
    state, _ = play(env, state, [(STAY, CLOSED)])
    return bool(state.held[0]), float(state.opening)


# 7 cm·|sin θ| + 3.5 cm·|cos θ| < 6.5 cm holds up to θ = 27.7°
@pytest.mark.parametrize(
    ("case", "grasps"),
    [
        ({}, True),
        ({"yaw": 0.45, "target_yaw": 0.45}, True),
        ({"target_yaw": np.radians(25.0)}, True),
        ({"target_yaw": np.radians(30.0)}, False),
        ({"target_yaw": np.radians(-30.0)}, False),
        ({"target": (0.02, 0.01)}, True),
        ({"target": (0.03, 0.0)}, False),
        ({"tool": (0.0, 0.0, 0.05)}, False),
    ],
)
def test_the_fingers_grasp_a_block_between_and_along_them(case, grasps):
    held, opening = closes_on(**({"tool": (0.0, 0.0, 0.018)} | case))
    assert held is grasps
    if held:
        turn = case.get("target_yaw", 0.0) - case.get("yaw", 0.0)
        width = 0.07 * abs(np.sin(turn)) + 0.035 * abs(np.cos(turn))
        assert opening == pytest.approx(width / rules.MAX_OPENING)


def test_closing_further_aligns_the_block_with_the_fingers():
    env, state = world("lift the red block", tool=(0.0, 0.0, 0.018), target_yaw=0.4)
    state, _ = play(env, state, [(STAY, CLOSED), (STAY, CLOSED)])
    assert float(state.yaws[0]) == 0
    assert float(state.opening) == pytest.approx(0.035 / rules.MAX_OPENING)


def test_a_tilted_gripper_grasps_nothing():
    env, state = world("lift the red block", tool=(0.0, 0.0, 0.018))
    state, _ = play(env, state._replace(turns=jnp.array([0.3, 0.0, 0.0])), [(STAY, CLOSED)])
    assert not bool(state.held[0])


def test_a_held_block_moves_and_turns_with_the_gripper():
    env, state = world("lift the red block", tool=(0.01, 0.005, 0.018))
    state, _ = play(env, state, [(STAY, CLOSED)])
    state, _ = env.step(state, jnp.array([1.0, 0, 0, 0, 0, 1.0, CLOSED]))
    assert float(state.yaws[0]) == pytest.approx(0.2)
    expected = np.array([0.04, 0.005]) - 0.01 * np.array([np.cos(0.2), np.sin(0.2)])
    np.testing.assert_allclose(state.blocks[0, :2], expected, atol=1e-6)


def test_fingers_that_descend_on_a_block_stop_at_its_top():
    env, state = world("lift the green block", tool=(0.0, 0.035, 0.10))
    state, _ = play(env, state, [(DOWN, OPEN)] * 4)
    assert float(state.tool[2]) == pytest.approx(0.04 + 0.009)
    np.testing.assert_allclose(state.blocks[0], [0, 0, 0.02], atol=1e-6)


def test_a_finger_pushes_a_block_along():
    env, state = world("lift the green block", tool=(0.0, -0.08, 0.02))
    state, transition = play(env, state, [(STAY, CLOSED), *[((0.0, 0.02, 0.0), CLOSED)] * 4])
    assert float(state.blocks[0, 1]) > 0.01
    assert float(state.blocks[0, 0]) == 0
    assert not transition.terminated


@pytest.mark.slow
def test_episodes_are_truncated_at_max_steps_and_not_earlier():
    env = jax_env.make(SEEING)
    state, _ = env.reset(jax.random.key(0))
    step = jax.jit(env.step)
    truncated = []
    for _ in range(SEEING.max_steps):
        state, transition = step(state, jnp.zeros(7))
        truncated.append(bool(transition.truncated))
    assert truncated == [False] * (SEEING.max_steps - 1) + [True]


@pytest.mark.slow
def test_demonstrations_record_observations_and_clean_actions_of_the_expert():
    env, demos = jax_env.make(SEEING), demonstrations(SEEING, 2, 0.25)
    shapes = jax.tree.map(jnp.shape, demos.observation)
    assert shapes.image_primary == shapes.image_wrist == (2, 6, 16, 16, 3)
    assert shapes.proprio == (2, 6, 8)
    assert demos.observation.image_primary.dtype == jnp.uint8
    assert demos.action.shape == (2, 6, 7)
    assert np.abs(demos.action).max() <= 1
    clean = demonstrations(BLIND, 512, 0.0)
    length = int(clean.length[0])
    moved = np.diff(np.array(clean.observation.proprio[0, :length, :2]), axis=0)
    np.testing.assert_allclose(moved, 0.03 * clean.action[0, : length - 1, :2], atol=1e-5)
    assert env.instructions[int(demos.instruction[0, 0])]


@pytest.fixture(scope="module")
def picture():
    """Renders one table: a red block in the middle, the gripper high up behind it."""

    @functools.partial(jax.jit, static_argnames="size")
    def paint(tool, turns, opening, blocks, size=32):
        return renderer.render(
            jnp.array(tool),
            jnp.array(turns),
            jnp.array(opening),
            jnp.array(blocks),
            jnp.zeros(4),
            jnp.array([0.1, 0.1]),
            image_size=size,
        )

    return paint


BLOCKS = [[0.0, 0.0, 0.02], [0.1, -0.1, 0.02], [-0.1, -0.1, 0.02], [-0.1, 0.1, 0.02]]
HIGH = (-0.1, 0.0, 0.25)


def red(image):
    r, g, b = np.moveaxis(np.array(image, np.int32), -1, 0)
    return (r > 2 * g) & (r > 2 * b)


def test_a_block_is_drawn_where_the_camera_projects_it(picture):
    image, _ = picture(HIGH, (0.0, 0.0, 0.0), 1.0, BLOCKS)
    rows, columns = np.nonzero(red(image))
    # pinhole camera in NumPy: at (0.42, 0, 0.50), looking along (-0.62, 0, -0.785), 38° field of
    # view
    offset = np.array([0.0, 0.0, 0.02]) - np.array([0.42, 0.0, 0.50])
    forward, up = np.array([-0.62, 0, -0.785]), np.array([-0.785, 0, 0.62])
    focal = 16 / np.tan(np.radians(19))
    row = 15.5 - focal * (offset @ up) / (offset @ forward)
    assert abs(rows.mean() - row) < 1
    assert abs(columns.mean() - 15.5) < 1


def test_a_block_that_moves_left_on_the_table_moves_right_in_the_primary_image(picture):
    moved = [[0.0, 0.05, 0.02], *BLOCKS[1:]]
    before, _ = picture(HIGH, (0.0, 0.0, 0.0), 1.0, BLOCKS)
    after, _ = picture(HIGH, (0.0, 0.0, 0.0), 1.0, moved)
    assert np.nonzero(red(after))[1].mean() > np.nonzero(red(before))[1].mean() + 2


def test_the_wrist_camera_moves_and_turns_with_the_gripper(picture):
    def wrist(tool, turns):
        return red(picture(tool, turns, 1.0, BLOCKS)[1])

    above = wrist((0.0, 0.0, 0.12), (0.0, 0.0, 0.0))
    left = wrist((0.0, 0.03, 0.12), (0.0, 0.0, 0.0))
    turned = wrist((0.0, 0.0, 0.12), (0.0, 0.0, 0.5))
    assert above.sum() > 20
    assert abs(np.nonzero(above)[1].mean() - 15.5) < 1
    assert np.nonzero(left)[1].mean() > 18  # right in the image is right on the table
    assert (above != turned).sum() > 10
    assert (above != wrist((0.0, 0.0, 0.12), (0.2, 0.0, 0.0))).sum() > 10


def test_near_objects_occlude_far_ones(picture):
    seen, _ = picture(HIGH, (0.0, 0.0, 0.0), 1.0, BLOCKS)
    hidden, _ = picture((0.06, 0.0, 0.06), (0.0, 0.0, 1.57), 1.0, BLOCKS)
    assert red(hidden).sum() < 0.5 * red(seen).sum()


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("image_size", -1, "image_size must be at least 0, got -1"),
        ("step_size", 0.0, "step_size and turn_size must be > 0 .* got 0.0 and 0.2"),
        ("rotated_share", 1.5, r"rotated_share must be in \[0, 1\], got 1.5"),
        ("max_steps", 0, "max_steps must be >= 1, got 0"),
    ],
)
def test_a_wrong_config_is_refused(field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        jax_env.JaxTableConfig(**{field: value})


def test_an_action_of_another_size_is_refused(key):
    env = jax_env.make(BLIND)
    state, _ = env.reset(key)
    with pytest.raises(ValueError, match=r"action must be 7 numbers .*got shape \(6,\)"):
        env.step(state, jnp.zeros(6))
