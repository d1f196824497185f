"""Partially observed environments hide the documented features and change nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.ppo import PPOConfig, make_ppo
from vla_jax.envs import cartpole, grid
from vla_jax.envs.cartpole import CartPoleConfig
from vla_jax.envs.discrete_worlds import DiscreteGymnasiumConfig
from vla_jax.envs.grid import GridConfig
from vla_jax.envs.memory_table import discrete_memory
from vla_jax.envs.memory_table.discrete_memory import MemoryChoicesConfig
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_task import INSTRUCTION_STEPS
from vla_jax.envs.partially_observed import partially_observe, show_cue
from vla_jax.envs.table import discrete_table
from vla_jax.envs.table.discrete_table import TableChoicesConfig
from vla_jax.envs.table.jax_env import JaxTableConfig
from vla_jax.rl import actor, learner

T, B = 12, 4
TABLE = TableChoicesConfig(table=JaxTableConfig(image_size=0, max_steps=5))
ENVS = {  # environment, visible features, number of features visible at the first step only
    "cartpole": (cartpole.make(CartPoleConfig(max_steps=5)), [0, 2], 0),
    "grid": (grid.make(GridConfig(num_obstacles=1, max_steps=5)), [0, 1, 3, 4, 5, 7], 0),
    "table": (discrete_table.make(TABLE), list(range(34)), 4),
}
DARK = discrete_memory.make(MemoryChoicesConfig(table=JaxMemoryConfig(task="dark")))


def random(carry, observation, reset, key):
    return carry, jax.random.randint(key, observation.shape[:1], 0, 2)


def unroll(env):
    """Unrolls the same random actions and episodes, some of which end."""
    first = actor.start(env, B, {}, key=jax.random.key(0))
    return actor.unroll(env, random, first, T, key=jax.random.key(1))[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVS)
def test_velocities_are_hidden_and_the_instruction_is_shown_once_per_episode(name):
    env, visible, num_once = ENVS[name]
    partial_env = partially_observe(env)
    full, hidden = jax.jit(lambda: (unroll(env), unroll(partial_env)))()
    expected = np.array(full.observation)[..., visible]
    once = len(visible) - num_once
    expected[..., once:] *= np.asarray(full.reset)[..., None]
    np.testing.assert_array_equal(hidden.observation, expected)
    assert partial_env.observation_shape == (len(visible),)
    assert (env.object_size, partial_env.object_size) == ((4, 3) if name == "grid" else (0, 0))
    same = hidden._replace(observation=full.observation)
    jax.tree.map(np.testing.assert_array_equal, same, full)
    shown = expected[..., once:].sum(axis=-1)  # the instruction is one-hot
    np.testing.assert_array_equal(shown, np.asarray(full.reset) * (num_once > 0))
    assert full.reset.sum() > B  # new episodes within the rollout


@pytest.mark.parametrize(
    ("inner", "visible_steps"), [(ENVS["table"][0], 3), (DARK, INSTRUCTION_STEPS + 2)]
)
def test_the_instruction_is_shown_for_a_number_of_steps_that_is_drawn(inner, visible_steps):
    """Also longer than the environment itself shows it."""
    env, size = partially_observe(inner, visible_steps), len(inner.instruction)

    def step(state, _):
        state, transition = env.step(state, 0)
        return state, transition.observation

    def play(key):
        state, first = env.reset(key)
        later = jax.lax.scan(step, state, length=visible_steps + 1)[1]
        return jnp.concatenate([first[None], later])[:, -size:]

    told = np.asarray(jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(0), 64)))
    number = told.sum(axis=(1, 2))  # the instruction is one-hot
    assert set(number) == set(range(1, visible_steps + 1))
    is_shown = np.arange(visible_steps + 2) < number[:, None]
    np.testing.assert_array_equal(told, told[:, :1] * is_shown[..., None])


def test_training_shows_the_instruction_longer_than_the_test(monkeypatch):
    config = PPOConfig(world=TABLE, partially_observed=True, visible_steps=7)
    played = []
    monkeypatch.setattr(learner.actor, "play", lambda env, *rest, **options: played.append(env))
    monkeypatch.setattr(learner.actor, "episode_metrics", lambda episodes: {})
    make_ppo(config).evaluate({}, jax.random.key(0))
    assert played == [partially_observe(ENVS["table"][0], 1)]  # the same object, since it is cached


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: partially_observe(ENVS["cartpole"][0], 2), "without an instruction, got 2"),
        (lambda: PPOConfig(world=TABLE, visible_steps=2), "without a cue, got 2"),
        (
            lambda: PPOConfig(world=DiscreteGymnasiumConfig(), visible_steps=2),
            "in a Gymnasium environment, got 2",
        ),
    ],
)
def test_visible_steps_without_effect_are_refused(make, message):
    with pytest.raises(ValueError, match=f"visible_steps must be 1 .*{message}"):
        make()


def test_a_cue_is_shown_for_a_number_of_steps_that_is_drawn():
    world = MemoryChoicesConfig(table=JaxMemoryConfig(task="lit", delay=4))
    env = show_cue(discrete_memory.make(world), 12)

    def step(state, _):
        state, transition = env.step(state, 0)
        return state, transition.observation

    def play(key):
        state, first = env.reset(key)
        return jnp.concatenate([first[None], jax.lax.scan(step, state, length=12)[1]])

    seen = np.asarray(jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(0), 32)))
    lit = seen[..., list(env.cue)].sum(axis=-1)
    ends = lit.sum(axis=1) + 1  # first step without light after it was on; it is off at step 0
    np.testing.assert_array_equal(lit, (np.arange(13) >= 1) & (np.arange(13) < ends[:, None]))
    assert set(ends) == {4, *range(5, 13)}  # 3 steps of light, or as many as were drawn


def test_the_same_environment_object_is_returned_so_that_jit_compiles_once():
    env = ENVS["cartpole"][0]
    assert partially_observe(env) is partially_observe(env)


@pytest.mark.parametrize("env", [grid.make(GridConfig(observation="pixels")), "twice"])
def test_an_environment_without_hidden_features_is_refused(env):
    env = partially_observe(ENVS["table"][0]) if env == "twice" else env
    with pytest.raises(ValueError, match="must name features to hide, got none"):
        partially_observe(env)
