"""Gymnasium environments as simulators, with images and errors."""

import sys

import gymnasium as gym
import numpy as np
import pytest

from vla_jax.envs import gymnasium as adapter


class Slider(gym.Env):
    """A bead that is pushed along a wire; it has images, and reports success in `info`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, render_mode="rgb_array", high=4.0):
        self.render_mode = render_mode
        self.action_space = gym.spaces.Box(
            np.array([[0.0, -1.0]], np.float32), np.array([[high, 1.0]], np.float32)
        )
        self.observation_space = gym.spaces.Dict(
            {
                "place": gym.spaces.Box(-100.0, 100.0, (2,), np.float64),
                "side": gym.spaces.Discrete(3),
            }
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(0, 1, 2)
        return {"place": self.place, "side": 1}, {}

    def step(self, action):
        self.sent = action
        self.place = self.place + action[0]
        if self.place[0] > 50:
            raise RuntimeError("the wire broke")
        done = bool(self.place[0] > 10)
        info = {"is_success": done, "seen": 7}
        return {"place": self.place, "side": 2}, 1.5, done, False, info

    def render(self):
        frame = np.zeros((40, 60, 3), np.uint8)
        frame[:20, :, 0], frame[20:, :, 2] = 200, 100
        return frame


class Broken(Slider):
    """An environment whose rendering needs a missing package."""

    def render(self):
        raise gym.error.DependencyNotInstalled("pygame is not installed")


def slider(**options):
    return adapter.make(Slider(), max_steps=5, **options)


def test_an_episode_of_pendulum_runs_to_its_end():
    world = adapter.make("Pendulum-v1", instruction="swing up")
    assert (world.instruction, world.task, world.max_steps) == ("swing up", "Pendulum-v1", 200)
    assert world.control_hz == 30
    observation = world.reset(3)
    assert observation["proprio"].shape == (3,)
    assert observation["proprio"].dtype == np.float32
    assert "image_primary" not in observation
    steps = [world.step(np.zeros(1)) for _ in range(199)]
    with pytest.warns(UserWarning, match="Pendulum-v1 has no success flag .* counts as failed"):
        steps.append(world.step(np.zeros(1)))
    assert [step.truncated for step in steps] == [False] * 199 + [True]
    assert not any(step.terminated or step.success for step in steps)
    world.close()


def test_pendulum_equals_the_environment_without_adapter():
    world, bare = adapter.make("Pendulum-v1"), gym.make("Pendulum-v1")
    start, _ = bare.reset(seed=5)
    np.testing.assert_allclose(world.reset(5)["proprio"], start, rtol=1e-6)
    for share in (-1.0, 0.25, 1.0):
        expected, reward, *_ = bare.step(np.array([2 * share], np.float32))
        step = world.step(np.array([share]))
        np.testing.assert_allclose(step.observation["proprio"], expected, rtol=1e-6)
        assert step.reward == pytest.approx(float(reward))


def test_same_seed_gives_the_same_episode():
    world = slider()
    first, other, again = (world.reset(seed)["proprio"] for seed in (1, 2, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize(
    ("action", "sent"),
    [([-1, -1], [0, -1]), ([0, 0], [2, 0]), ([1, 1], [4, 1]), ([9, -9], [4, -1])],
)
def test_actions_are_mapped_to_the_bounds_and_the_shape_of_the_box(action, sent):
    env = Slider()
    world = adapter.make(env, max_steps=5)
    world.reset(0)
    world.step(np.array(action))
    np.testing.assert_allclose(env.sent, [sent])
    assert env.sent.dtype == np.float32


def test_dict_observations_are_flattened_in_the_order_of_their_keys():
    world = slider()
    assert world.reset(0)["proprio"].shape == (5,)
    step = world.step(np.array([-1.0, 0.0]))
    np.testing.assert_allclose(step.observation["proprio"][2:], [0, 0, 1])


def test_images_are_resized_to_a_square():
    world = slider(image_size=8)
    image = world.reset(0)["image_primary"]
    assert image.shape == (8, 8, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image[1, 4], [200, 0, 0])
    np.testing.assert_array_equal(image[6, 4], [0, 0, 100])


def test_draw_renders_at_any_size_or_grey_without_rendering():
    drawing, blind = slider(), adapter.make(Slider(render_mode=None), max_steps=5)
    drawing.reset(0)
    np.testing.assert_array_equal(drawing.draw(16)[[2, 13], 8], [[200, 0, 0], [0, 0, 100]])
    with pytest.warns(
        UserWarning, match="videos of Slider are grey, as it is made without rendering"
    ):
        assert np.all(blind.draw(16) == 128)


def test_success_comes_from_info_or_a_function_of_the_caller():
    def succeeded(info, reward):
        return info["seen"] == 7 and reward == 1.5

    default, custom = slider(), slider(success=succeeded)
    for world in (default, custom):
        world.reset(0)
    push = np.array([1.0, 0.0])
    steps = [(default.step(push), custom.step(push)) for _ in range(3)]
    assert [a.success for a, _ in steps] == [False, False, True]
    assert [a.terminated for a, _ in steps] == [False, False, True]
    assert all(b.success for _, b in steps)
    assert adapter.is_success({"success": 1.0}, 0.0)
    assert not adapter.is_success({}, 1.0)


def test_an_episode_is_truncated_at_the_lower_limit():
    world = slider()
    world.reset(0)
    still = np.array([-1.0, 0.0])
    assert [world.step(still).truncated for _ in range(5)] == [False] * 4 + [True]
    assert adapter.make("Pendulum-v1", max_steps=300).max_steps == 200


def test_exceptions_of_the_environment_reach_the_caller():
    env = Slider(high=100.0)
    world = adapter.make(env, max_steps=5)
    world.reset(0)
    with pytest.raises(RuntimeError, match="the wire broke"):
        world.step(np.array([1.0, 0.0]))


def test_an_unknown_id_raises_one_sentence_with_the_most_similar_one():
    with pytest.raises(ValueError, match=r"'Pendulm-v1' is not registered.*Pendulum"):
        adapter.make("Pendulm-v1")


def test_discrete_actions_are_refused():
    with pytest.raises(ValueError, match=r"action_space of CartPole-v1 must be a Box.*Wrapper"):
        adapter.make("CartPole-v1")


def test_actions_without_bounds_are_refused():
    with pytest.raises(ValueError, match="action_space of Slider must have finite bounds"):
        adapter.make(Slider(high=np.inf), max_steps=5)


def test_observations_of_unknown_size_are_refused():
    env = Slider()
    env.observation_space = gym.spaces.Sequence(gym.spaces.Discrete(2))
    with pytest.raises(ValueError, match="observation_space of Slider must be of fixed size"):
        adapter.make(env, max_steps=5)


@pytest.mark.parametrize("max_steps", [None, 0])
def test_an_environment_without_time_limit_needs_max_steps(max_steps):
    with pytest.raises(ValueError, match=f"max_steps of Slider must be >= 1, got {max_steps}"):
        adapter.make(Slider(), max_steps=max_steps)


def test_an_environment_without_a_rate_gets_a_warning_with_the_remedy():
    env = Slider()
    env.metadata = {"render_modes": ["rgb_array"]}
    with pytest.warns(UserWarning, match=r"Slider has no metadata\['render_fps'\]: .* 10 frames"):
        assert adapter.make(env, max_steps=5).control_hz == 10


@pytest.mark.parametrize("action", [[0.0], [0.0, np.nan]])
def test_an_action_of_another_size_or_not_finite_is_refused(action):
    world = slider()
    world.reset(0)
    with pytest.raises(ValueError, match="action of Slider must be 2 finite numbers, got"):
        world.step(np.array(action))


def test_images_that_cannot_be_rendered_are_refused_at_construction():
    with pytest.raises(ValueError, match=r"render_mode of Slider must be 'rgb_array'.*got None"):
        adapter.make(Slider(render_mode=None), max_steps=5, image_size=8)
    with pytest.raises(ImportError, match=r"rendering Broken needs a package .* missing: pygame"):
        adapter.make(Broken(), max_steps=5, image_size=8)


def test_a_missing_package_of_the_environment_is_named():
    gym.register("Lacking-v0", entry_point="a_package_that_is_missing:World")
    with pytest.raises(ImportError, match=r"Lacking-v0 needs a package .*a_package_that_is_miss"):
        adapter.make("Lacking-v0")
    del gym.registry["Lacking-v0"]


def test_missing_gymnasium_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install 'vla-jax\[gym\]'"):
        adapter.make("Pendulum-v1")
