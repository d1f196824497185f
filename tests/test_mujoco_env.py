"""The MuJoCo table: tasks, success of the expert, observations, cameras, and a missing OpenGL."""

import functools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from train.record import demonstrate
from vla_jax.envs.table import mujoco_env, rules
from vla_jax.envs.table.mujoco_env import MujocoTableConfig, TableMujoco

BLIND = MujocoTableConfig(image_size=0)
ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def state_only(rotated_share=0.5):
    return TableMujoco(MujocoTableConfig(image_size=0, rotated_share=rotated_share))


@pytest.fixture(scope="module")
def with_images():
    try:
        simulator = TableMujoco(MujocoTableConfig(image_size=64))
    except RuntimeError as error:
        pytest.skip(f"no OpenGL here: {error}")
    yield simulator
    simulator.close()


def reset_to(simulator, instruction):
    """Resets to the first layout that asks for `instruction`."""
    return next(
        (seed, observation)
        for seed in range(500)
        if (observation := simulator.reset(seed)) and simulator.instruction == instruction
    )


def test_the_same_seed_gives_the_same_episode():
    def play(simulator):
        seen = [simulator.reset(11)]
        for action in np.random.default_rng(0).uniform(-1, 1, (10, 7)):
            seen.append(simulator.step(action).observation)
        return simulator.instruction, seen

    (sentence, first), (again, second) = play(state_only()), play(state_only())
    elsewhere, third = play(TableMujoco(BLIND))
    assert sentence == again == elsewhere
    for one, other, another in zip(first, second, third, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            np.testing.assert_array_equal(one[name], another[name])
    assert not np.array_equal(first[0]["proprio"], state_only().reset(12)["proprio"])


def test_every_instruction_occurs():
    asked = set()
    for seed in range(120):
        state_only().reset(seed)
        asked.add((state_only().instruction, state_only().task))
    assert asked == {(i.text, i.task) for i in rules.INSTRUCTIONS}


@pytest.mark.slow
def test_the_expert_succeeds_under_noise_in_97_percent():
    done = [
        demonstrate(state_only(), seed, noise=0.25, disturbance=0.0) is not None
        for seed in range(60, 180)
    ]
    assert np.mean(done) >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("rotated_share", "low", "high"), [(0.0, 0.9, 1.0), (1.0, 0.0, 0.3)])
def test_an_expert_that_does_not_turn_fails_in_rotated_layouts(
    rotated_share, low, high, monkeypatch
):
    simulator = state_only(rotated_share)
    turning = simulator.expert
    monkeypatch.setattr(simulator, "expert", lambda: turning() * [1, 1, 1, 1, 1, 0, 1])
    done = [
        demonstrate(simulator, seed, noise=0.0, disturbance=0.0) is not None
        for seed in range(40)
        if simulator.reset(seed) and simulator.task != "touch"
    ]
    assert len(done) > 20
    assert low <= np.mean(done) <= high


@pytest.mark.parametrize("task", rules.TASKS)
def test_the_wrong_block_ends_the_episode_without_success(task):
    reset_to(state_only(), rules.SENTENCES[task].format("red"))
    for _ in range(state_only().max_steps):
        step = state_only().step(state_only().expert(target=2))
        if step.terminated or step.truncated:
            break
    assert step.terminated
    assert (step.success, step.truncated, step.reward) == (False, False, 0.0)


@pytest.mark.parametrize("task", rules.TASKS)
def test_the_right_block_ends_the_episode_with_success(task):
    reset_to(state_only(), rules.SENTENCES[task].format("blue"))
    for _ in range(state_only().max_steps):
        step = state_only().step(state_only().expert())
        if step.terminated or step.truncated:
            break
    assert (step.terminated, step.success, step.reward) == (True, True, 1.0)
    assert [type(part) for part in step[1:]] == [float, bool, bool, bool]


def test_the_episode_is_truncated_at_max_steps_and_not_before():
    simulator = TableMujoco(MujocoTableConfig(image_size=0, max_steps=3))
    simulator.reset(0)
    stay = np.array([0, 0, 0, 0, 0, 0, 1.0])
    assert [simulator.step(stay).truncated for _ in range(3)] == [False, False, True]


def test_observations_have_the_names_sizes_and_units_of_the_table():
    seed, observation = reset_to(state_only(), "lift the green block")
    assert observation.keys() == {"proprio", "environment_state"}
    assert observation["proprio"].shape == (len(rules.PROPRIO_NAMES),)
    assert observation["environment_state"].shape == (len(rules.STATE_NAMES),)
    assert {part.dtype for part in observation.values()} == {np.dtype(np.float32)}
    state = dict(zip(rules.STATE_NAMES, observation["environment_state"], strict=True))
    proprio = dict(zip(rules.PROPRIO_NAMES, observation["proprio"], strict=True))
    # the expected layout, drawn from the same random stream
    rng = np.random.default_rng(seed)
    rng.integers(12)
    plate, blocks, yaws = mujoco_env.sample_layout(rng, BLIND.rotated_share)
    for (x, y), yaw, colour in zip(blocks, yaws, rules.COLOURS, strict=True):
        got = [state[f"{colour}.{n}"] for n in ("x", "y", "z", "sin_2yaw", "cos_2yaw")]
        expected = [x, y, rules.BLOCK_HALF_SIZE[2], np.sin(2 * yaw), np.cos(2 * yaw)]
        np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose([state["plate.x"], state["plate.y"]], plate, atol=1e-6)
    tool = [*rng.uniform(-0.06, 0.06, 2), rng.uniform(0.16, 0.20)]
    np.testing.assert_allclose([proprio[n] for n in "xyz"], tool, atol=0.005)
    rest = [proprio[n] for n in ("sin_yaw", "cos_yaw", "roll", "pitch", "opening")]
    np.testing.assert_allclose(rest, [0, 1, 0, 0, 1], atol=0.03)


@pytest.mark.parametrize("dim", range(6))
def test_each_action_dimension_moves_the_coordinate_of_its_name(dim):
    before = state_only().reset(1)["proprio"]
    action = np.zeros(7)
    action[dim], action[6] = -1.0, 1.0
    for _ in range(2):
        after = state_only().step(action).observation["proprio"]

    def pose(p):
        return np.array([*p[:3], p[5], p[6], np.arctan2(p[3], p[4])])

    moved = (pose(after) - pose(before)) / ([0.03] * 3 + [0.2] * 3)
    assert moved[dim] < -0.8
    assert np.abs(np.delete(moved, dim)).max() < 0.4


@pytest.mark.parametrize(
    ("action", "got"),
    [(np.zeros(6), r"\[0\.0, 0\.0"), (np.full(7, np.nan), r"\[nan"), (np.zeros((1, 7)), r"\[\[")],
)
def test_an_invalid_action_is_refused(action, got):
    state_only().reset(0)
    with pytest.raises(ValueError, match=rf"^action must be 7 finite numbers .*got {got}"):
        state_only().step(action)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("image_size", -1, "image_size must be at least 0, got -1"),
        ("step_size", 0.0, "step_size and turn_size must be > 0 .* got 0.0 and 0.2"),
        ("rotated_share", 1.5, r"rotated_share must be in \[0, 1\], got 1.5"),
        ("max_steps", 0, "max_steps must be >= 1, got 0"),
    ],
)
def test_config_refuses_invalid_values(field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        MujocoTableConfig(**{field: value})


RGB = {"red": (0, 1, 2), "green": (1, 0, 2), "blue": (2, 0, 1)}  # dominant channel, the others


@pytest.mark.parametrize("camera", ["image_primary", "image_wrist"])
def test_the_cameras_see_the_blocks(with_images, camera):
    counts = dict.fromkeys(RGB, 0)
    for seed in range(8):
        image = with_images.reset(seed)[camera]
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        pixels = image.astype(np.int32)
        for colour, (lead, *others) in RGB.items():
            own = pixels[..., lead]
            counts[colour] += np.sum(np.all(own[..., None] > 1.5 * pixels[..., others], axis=-1))
    least = 20 * 8 if camera == "image_primary" else 1
    assert min(counts.values()) > least, counts


def test_a_block_further_left_on_the_table_is_further_right_in_the_primary_image(with_images):
    places, columns = [], []
    for seed in range(12):
        observation = with_images.reset(seed)
        red, green, blue = np.moveaxis(observation["image_primary"].astype(np.int32), -1, 0)
        found = np.nonzero((red > 2 * green) & (red > 2 * blue))[1]
        if len(found) > 10:
            places.append(observation["environment_state"][1])
            columns.append(found.mean())
    assert len(places) > 6
    assert np.corrcoef(places, columns)[0, 1] > 0.97


def test_rendering_is_deterministic_and_draw_returns_an_image_of_the_requested_size(with_images):
    first = with_images.reset(4)
    drawn = with_images.draw(96)
    assert drawn.shape == (96, 96, 3)
    assert drawn.dtype == np.uint8
    again = with_images.reset(4)
    for camera in ("image_primary", "image_wrist"):
        np.testing.assert_array_equal(first[camera], again[camera])


@pytest.mark.parametrize("backend", ["osmesa", "nonsense"])
def test_a_missing_opengl_raises_one_sentence_with_remedies(backend):
    code = (
        "from vla_jax.envs.table.mujoco_env import TableMujoco\n"
        "try:\n    TableMujoco()\n"
        "except RuntimeError as error:\n    print(error)\n"
        "else:\n    print('drew')"
    )
    environment = {**os.environ, "MUJOCO_GL": backend, "JAX_PLATFORMS": "cpu"}
    environment["PYOPENGL_PLATFORM"] = "egl"  # mujoco 3.3 refuses OSMesa by an ImportError then
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if backend == "osmesa" and done.stdout == "drew\n":
        pytest.skip("OSMesa is installed here, so nothing is missing")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"mujoco found no OpenGL to draw with (MUJOCO_GL={backend}: ")
    for word in ("apt-get install libegl1 libopengl0 libgl1-mesa-dri", "--world table_jax"):
        assert word in done.stdout
    assert done.stdout.count("\n") == 1
