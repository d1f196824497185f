"""The memory table with discrete actions: rules of `memory_env`, observations, shaping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs.memory_table import discrete_memory, memory_env, tasks
from vla_jax.envs.memory_table.discrete_memory import MOVES, MemoryChoicesConfig
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.table import rules

GAMMA, WEIGHT, B = 0.9, 3.0, 16
CONFIG = MemoryChoicesConfig(
    shaping=WEIGHT, shaping_gamma=GAMMA, table=JaxMemoryConfig(task="lit", delay=4)
)
ENV = discrete_memory.make(CONFIG)
MEMORY = memory_env.make(CONFIG.table)
step, memory_step = (jax.jit(jax.vmap(env.step)) for env in (ENV, MEMORY))


@pytest.fixture(scope="module")
def episodes():
    """States, actions and transitions of random actions, without resets."""
    keys, random = jax.random.split(jax.random.key(0), B), np.random.default_rng(0)
    state, _ = jax.jit(jax.vmap(ENV.reset))(keys)
    played = []
    for _ in range(ENV.max_steps):
        choice = jnp.asarray(random.integers(len(MOVES), size=B))
        after, transition = step(state, choice)
        played.append((state, choice, after, transition))
        state = after
    return played


def test_the_rules_equal_those_of_the_continuous_memory_table(episodes):
    acted = 0
    for state, choice, after, transition in episodes:
        arm = np.zeros((B, 7), np.float32)
        arm[:, 6] = 1
        for i, name in enumerate(np.array(MOVES)[np.asarray(choice)]):
            if name != "stay":
                arm[i, "xyz".index(name[1])] = 1 if name[0] == "+" else -1
        expected, expected_transition = memory_step(state.memory, arm)
        jax.tree.map(np.testing.assert_array_equal, after.memory, expected)
        for field in ("terminated", "truncated", "success"):
            np.testing.assert_array_equal(
                getattr(transition, field), getattr(expected_transition, field)
            )
        acted += int((after.memory.table.tool != state.memory.table.tool).any(axis=1).sum())
    assert acted > 10 * B
    assert transition.truncated.any()


def test_the_shaping_is_the_change_of_a_potential(episodes):
    for state, _, after, transition in episodes:
        distances = []
        for each in (state.memory, after.memory):
            target = np.asarray(each.table.blocks)[np.arange(B), np.asarray(each.cue.colour)]
            distances.append(np.linalg.norm(np.asarray(each.table.tool) - target, axis=-1))
        now, later = distances
        later = np.where(transition.terminated, 0, later)
        expected = transition.success + WEIGHT * (now - GAMMA * later)
        np.testing.assert_allclose(transition.reward, expected, atol=1e-5)


def test_the_cue_is_gone_when_the_robot_acts():
    """Two cues with one layout: equal observations from the first acting step until a contact."""
    layout, cues = jax.random.key(3), jax.random.split(jax.random.key(4), 2)
    start = jax.jit(lambda cue: memory_env.start(CONFIG.table, layout, cue)[0])
    states = [discrete_memory.MemoryChoicesState(start(cue), jnp.ones((), bool)) for cue in cues]
    assert states[0].memory.cue.colour != states[1].memory.cue.colour
    one_step, shown = jax.jit(ENV.step), 0
    for _ in range(10):
        acts = bool(memory_env.is_acting(states[0].memory))
        stepped = [one_step(state, jnp.int32(0)) for state in states]
        states, seen = [each[0] for each in stepped], [each[1].observation for each in stepped]
        shown += int((seen[0] != seen[1]).any())
        if acts:
            np.testing.assert_array_equal(*seen)
    assert acts
    assert shown == 3


def test_blocks_are_relative_to_the_tool():
    state, observation = ENV.reset(jax.random.key(0))
    table = state.memory.table
    assert observation.shape == ENV.observation_shape == (48 + 8 + 1,)
    expected = (np.asarray(table.blocks) - np.asarray(table.tool)) / 0.1
    blocks = np.asarray(observation[: rules.STATE_SIZE - 2]).reshape(4, 5)
    np.testing.assert_allclose(blocks[:, :3], expected, atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_has_discrete_actions(task):
    config = MemoryChoicesConfig(table=JaxMemoryConfig(task=task))
    env = discrete_memory.make(config)

    def play(key):
        state, first = env.reset(key)
        _, transition = env.step(state, jnp.int32(env.num_actions - 1))
        return first, transition

    first, transition = jax.jit(play)(jax.random.key(0))
    assert first.shape == transition.observation.shape == env.observation_shape
    assert np.isfinite(transition.observation).all()
    assert ("close" in discrete_memory.choices(config)) == tasks.get(task).uses_gripper


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match="shaping must be 0 for task 'sequence', got 1"):
        MemoryChoicesConfig(shaping=1.0, table=JaxMemoryConfig(task="sequence"))
    with pytest.raises(ValueError, match="shaping must be >= 0 and shaping_gamma in"):
        MemoryChoicesConfig(shaping_gamma=2.0)
    with pytest.raises(ValueError, match="image_size must be 0, got 8"):
        MemoryChoicesConfig(table=JaxMemoryConfig(image_size=8))
    state, _ = ENV.reset(jax.random.key(0))
    with pytest.raises(ValueError, match=r"action must be one integer in 0 … 6 .*got float32"):
        ENV.step(state, jnp.zeros(()))


def test_the_drawn_image_shows_the_lamp_and_the_lit_block():
    """Two cues of one layout differ in what is shown, then not any more."""
    config = JaxMemoryConfig(task="blinks", delay=2)
    env = discrete_memory.make(MemoryChoicesConfig(table=config))
    state = env.reset(jax.random.key(0))[0]
    step, draw = jax.jit(env.step), jax.jit(env.draw)
    images = []
    for _ in range(5):
        images.append(np.asarray(draw(state)))
        state, _ = step(state, 0)
    assert any(np.any(image != images[0]) for image in images[1:])  # the hand is held still
