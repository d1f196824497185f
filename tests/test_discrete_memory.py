"""The memory table with discrete actions: rules of `memory_env`, observations, shaping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs.memory_table import discrete_memory, memory_env, tasks
from vla_jax.envs.memory_table.discrete_memory import MOVES, MemoryChoicesConfig
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_task import INSTRUCTION_STEPS
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


@pytest.mark.sampled
@pytest.mark.parametrize("task", [name for name, task in tasks.TASKS.items() if task.has_delay])
def test_the_cue_is_gone_when_the_robot_acts(task):
    """Cues with one layout: equal observations from the first acting step until a contact."""
    config = MemoryChoicesConfig(table=JaxMemoryConfig(task=task, delay=4))
    env = discrete_memory.make(config)
    num_steps = tasks.get(task).max_shown(config.table) + 8

    @jax.jit
    @jax.vmap
    def play(cue):
        memory, _ = memory_env.start(config.table, jax.random.key(3), cue)

        def step(state, _):
            acts = memory_env.is_acting(state.memory)
            state, transition = env.step(state, jnp.int32(0))
            return state, (transition.observation, acts)

        state = discrete_memory.MemoryChoicesState(memory, jnp.ones((), bool))
        return jax.lax.scan(step, state, length=num_steps)[1]

    seen, acts = jax.device_get(play(jax.random.split(jax.random.key(4), B)))
    last_watched = acts[0].argmax() - 1  # its transition is the first observation to act on
    assert acts[0, last_watched + 1]
    assert np.any(seen[:, :last_watched] != seen[:1, :last_watched])
    acting = seen[:, last_watched:]
    np.testing.assert_array_equal(acting, np.broadcast_to(acting[:1], acting.shape))


@pytest.mark.parametrize(("task", "num_sentences"), [("lit", 1), ("blinks", 1), ("dark", 4)])
def test_the_sentence_is_told_once_unless_there_is_only_one(task, num_sentences):
    env = discrete_memory.make(MemoryChoicesConfig(table=JaxMemoryConfig(task=task)))
    assert len(env.instruction) == num_sentences
    step = jax.jit(env.step)
    state, observation = jax.jit(env.reset)(jax.random.key(1))
    told = []
    for _ in range(INSTRUCTION_STEPS + 2):
        told.append(float(observation[np.array(env.instruction)].sum()))
        state, transition = step(state, jnp.int32(0))
        observation = transition.observation
    assert told == [1.0] * INSTRUCTION_STEPS + [float(num_sentences == 1)] * 2


def test_blocks_are_relative_to_the_tool():
    state, observation = ENV.reset(jax.random.key(0))
    table = state.memory.table
    assert observation.shape == ENV.observation_shape == (52 + 8 + 1,)
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
