"""One simulator interface for every kind of world; a JAX world as a simulator is the same world."""

import jax
import numpy as np
import pytest

from vla_jax.envs import worlds
from vla_jax.envs.simulate import EnvSimulator
from vla_jax.envs.table import jax_env

TABLE = jax_env.JaxTableConfig(image_size=8, max_steps=4)


@pytest.fixture(scope="module")
def simulator():
    return worlds.make_simulator(TABLE)


def expected_parts(observation):
    return {name: part for name, part in observation._asdict().items() if part is not None}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, part in expected.items():
        np.testing.assert_allclose(got[name], part, atol=1e-6, err_msg=name)
        assert got[name].dtype == part.dtype


@pytest.mark.slow
def test_a_simulator_of_an_env_equals_the_env(simulator):
    env = jax_env.make(TABLE)
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    state, observation = reset(jax.random.key(5))
    assert_same(simulator.reset(5), expected_parts(observation))
    index = int(env.instruction_index(state))
    assert (simulator.instruction, simulator.task) == (env.instructions[index], env.tasks[index])
    assert (simulator.max_steps, simulator.control_hz) == (4, 10.0)
    for _ in range(TABLE.max_steps):
        action = simulator.expert()
        np.testing.assert_allclose(action, jax.jit(env.expert)(state), atol=1e-6)
        state, transition = step(state, action)
        got = simulator.step(action)
        assert_same(got.observation, expected_parts(transition.observation))
        flags = (got.reward, got.terminated, got.truncated, got.success)
        assert flags == (
            float(transition.reward),
            bool(transition.terminated),
            bool(transition.truncated),
            bool(transition.success),
        )
        assert [type(flag) for flag in flags] == [float, bool, bool, bool]
    assert got.truncated


def test_the_expert_accepts_another_target_colour(simulator):
    simulator.reset(0)
    asked = simulator.instruction
    colours = [simulator.expert(target=colour) for colour in range(4)]
    own = simulator.expert()
    assert sum(np.array_equal(action, own) for action in colours) == 1
    assert simulator.instruction == asked


def test_draw_enlarges_the_primary_image(simulator):
    image = simulator.reset(0)["image_primary"]
    drawn = simulator.draw(24)
    assert drawn.shape == (24, 24, 3)
    np.testing.assert_array_equal(drawn[1::3, 1::3], image)
    simulator.close()


def test_a_world_without_images_draws_grey():
    blind = EnvSimulator(jax_env.make(jax_env.JaxTableConfig(image_size=0)))
    blind.reset(0)
    assert np.all(blind.draw(5) == 128)


@pytest.mark.parametrize("kind", worlds.WORLDS)
def test_every_kind_of_world_can_be_stepped(kind):
    options = {} if kind == "gymnasium" else {"image_size": 0}
    config = worlds.WORLDS[kind].config(**options)
    assert config.kind == kind
    world = worlds.make_simulator(config)
    first, again = world.reset(3), world.reset(3)
    assert_same(again, first)
    size = 1 if kind == "gymnasium" else 7
    step = world.step(np.zeros(size))
    assert step.observation.keys() == first.keys()
    assert world.max_steps > 1
    world.close()
