"""Actions, observations, images and success flags of every kind that Gymnasium allows."""

import warnings
from typing import ClassVar

import numpy as np
import pytest

from vla_jax.acting.rollout import Controller, run_simulators
from vla_jax.envs import gymnasium as adapter
from vla_jax.envs import gymnasium_values

gym = pytest.importorskip("gymnasium")
Box = gym.spaces.Box
RED = np.array([200, 10, 0], np.uint8)


class Strict(gym.Env):
    """An environment that insists on its action space."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    render_mode = "rgb_array"

    def __init__(self, space=None, image=None, observation=0.0):
        self.action_space = Box(-1, 1, (1,), np.float32) if space is None else space
        self.observation_space = Box(-np.inf, np.inf, (1,), np.float64)
        self.image, self.observation, self.sent = image, observation, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([self.observation]), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is outside {self.action_space}"
        self.sent.append(action)
        return np.array([self.observation]), 0.0, False, False, {"success": len(self.sent) == 2}

    def render(self):
        return self.image


def boxes():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64, np.float16):
        for _ in range(60):
            low, high = np.sort(rng.uniform(-3, 3, 2)).astype(dtype)
            yield Box(low, high, (2,), dtype)
    for dtype in (np.int8, np.uint8, np.int16, np.int32, np.uint32):
        info = np.iinfo(dtype)
        yield Box(info.min, info.max, (2, 1), dtype)
        yield Box(1, 6, (1,), dtype)
    yield Box(-(2**53), 2**53, (1,), np.int64)
    yield Box(0, 2**40, (), np.uint64)
    yield Box(-1e30, 1e30, (1,), np.float32)


def test_every_action_of_every_box_is_inside_and_full_scale_is_the_bound():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gymnasium's own, about precision
        spaces = list(boxes())
    for box in spaces:
        world = adapter.make(Strict(box), max_steps=99)
        world.reset(0)
        for value, expected in ((-1.0, box.low), (1.0, box.high), (2.0, box.high), (0.3, None)):
            world.step(np.full(world.action_dim, value))
            sent = world._env.unwrapped.sent[-1]
            assert sent.dtype == box.dtype
            if expected is not None:
                np.testing.assert_array_equal(sent, expected)


def test_whole_numbers_are_rounded():
    world = adapter.make(Strict(Box(0, 10, (1,), np.int32)), max_steps=9)
    world.reset(0)
    for value, expected in ((0.0, 5), (0.39, 7), (0.41, 7), (-0.95, 0)):
        world.step(np.array([value]))
        assert world._env.unwrapped.sent[-1].tolist() == [expected]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Box(-1.7e308, 1.7e308, (1,), np.float64), "must have finite bounds"),
        (Box(-1, np.inf, (1,), np.float32), "must have finite bounds"),
        (Box(0, 2**60, (1,), np.int64), r"integers up to 2\^53"),
        (Box(0, 1, (0,), np.float32), "at least 1 number"),
        (gym.spaces.MultiBinary(3), "must be a Box"),
        (gym.spaces.Tuple([Box(-1, 1)]), "must be a Box"),
    ],
)
def test_action_spaces_that_cannot_be_reached_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        adapter.make(Strict(space), max_steps=5)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.broadcast_to(RED, (4, 4, 3)), RED),
        (np.broadcast_to(np.append(RED, np.uint8(255)), (4, 4, 4)), RED),
        (np.full((4, 4), 100, np.uint8), [100] * 3),
        (np.full((4, 4, 1), 100, np.uint8), [100] * 3),
    ],
)
def test_images_of_every_kind_are_exact(image, expected):
    world = adapter.make(Strict(image=image), image_size=4, max_steps=5)
    observed = world.reset(0)["image_primary"]
    np.testing.assert_array_equal(observed, np.broadcast_to(expected, (4, 4, 3)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "must return uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"got ndarray uint8 \[4, 4, 2\]"),
        (np.zeros((4, 4, 3), np.float32), "got ndarray float32"),
        (np.zeros((4, 4, 3), np.int64), "got ndarray int64"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"\[2, 4, 4, 3\]"),
        (np.full((4, 4, 4), 128, np.uint8), "must return opaque images, got alpha values"),
    ],
)
def test_images_of_other_kinds_are_refused_when_the_world_is_made(image, message):
    with pytest.raises(ValueError, match=message):
        adapter.make(Strict(image=image), image_size=4, max_steps=5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_observations_that_are_not_finite_in_float32_are_refused(value):
    with pytest.raises(ValueError, match="finite numbers in float32, got"):
        adapter.make(Strict(observation=value), max_steps=5).reset(0)


@pytest.mark.parametrize("flag", [0.5, np.nan, "yes", [True, False]])
def test_a_success_flag_that_is_neither_true_nor_false_is_refused(flag):
    with pytest.raises(ValueError, match="must be True or False"):
        gymnasium_values.is_success({"success": flag}, 0.0)
    assert gymnasium_values.is_success({"success": np.array([1.0])}, 0.0)
    assert not gymnasium_values.is_success({"is_success": None}, 0.0)


@pytest.mark.parametrize("fps", [0, -1, np.nan, "fast", None])
def test_a_rate_that_is_no_rate_is_refused(fps):
    env = Strict()
    env.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
    with pytest.raises(ValueError, match="render_fps"):
        adapter.make(env, max_steps=5)


@pytest.mark.parametrize(("rule", "expected"), [("once", True), ("at_end", False)])
def test_success_in_mid_episode_counts_by_the_rule(rule, expected):
    act = Controller(lambda size: None, lambda state, views, reset: (state, np.ones((1, 1))))
    made = []

    def make():
        made.append(adapter.make(Strict(), max_steps=4, success_rule=rule))
        return made[-1]

    (played,) = run_simulators(act, make, [0], num_simulators=1)
    assert played.outcome.success is expected
