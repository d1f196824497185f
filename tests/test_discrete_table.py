"""The table with discrete actions: rules equal to `table_jax`, observations, reward shaping."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs.table import discrete_table, jax_env, rules
from vla_jax.envs.table.discrete_table import CHOICES, TableChoicesConfig
from vla_jax.envs.table.jax_env import JaxTableConfig

GAMMA, WEIGHT, T, B = 0.9, 3.0, 24, 32
CONFIG = TableChoicesConfig(
    tasks=("touch", "lift"),
    shaping=WEIGHT,
    shaping_gamma=GAMMA,
    table=JaxTableConfig(image_size=0, max_steps=T),
)
WORLD = discrete_table.make(CONFIG)
PLAIN = discrete_table.make(TableChoicesConfig(tasks=("touch", "lift"), table=CONFIG.table))
reset, step = jax.jit(jax.vmap(WORLD.reset)), jax.jit(jax.vmap(WORLD.step))
plain_step = jax.jit(jax.vmap(PLAIN.step))
env_step = jax.jit(jax.vmap(jax_env.make(CONFIG.table).step))


def choose(name):
    return jnp.full(B, CHOICES.index(name))


def step_once(name):
    """States before and after one action."""
    before, _ = reset(jax.random.split(jax.random.key(0), B))
    after, _ = step(before, choose(name))
    return jax.device_get((before.table, after.table))


@pytest.fixture(scope="module")
def episodes():
    """States, actions and transitions `[T]` of random actions, without resets."""
    key, random = jax.random.key(1), np.random.default_rng(0)
    state, _ = reset(jax.random.split(key, B))
    walked = []
    for _ in range(T):
        choice = jnp.asarray(random.integers(len(CHOICES), size=B))
        after, transition = step(state, choice)
        walked.append((state, choice, after, transition))
        state = after
    return walked


@pytest.mark.sampled
@pytest.mark.parametrize("name", CHOICES[1:7])
def test_an_action_is_one_step_along_its_axis(name):
    before, after = step_once(name)
    expected = np.zeros(3, np.float32)
    expected["xyz".index(name[1])] = float(f"{name[0]}1") * CONFIG.table.step_size
    free = np.abs(np.asarray(before.tool)[:, :2]).max(axis=1) < 0.1
    assert free.all()
    inside = np.minimum(before.tool + expected, rules.WORKSPACE_HIGH)
    np.testing.assert_allclose(after.tool, inside, atol=1e-6)
    np.testing.assert_array_equal(after.turns, before.turns)


def test_turning_changes_the_yaw_and_staying_only_the_time():
    before, after = step_once("-yaw")
    np.testing.assert_allclose(after.turns[:, 2], -CONFIG.table.turn_size, atol=1e-6)
    before, after = step_once("stay")
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-6), before, after._replace(num_steps=0)
    )


def test_the_gripper_keeps_its_last_command():
    state, _ = reset(jax.random.split(jax.random.key(0), B))
    for name, opening in [("close", 0.4), ("stay", 0), ("+z", 0), ("open", 0.6), ("stay", 1)]:
        state, _ = step(state, choose(name))
        np.testing.assert_allclose(state.table.opening, opening, atol=1e-6)


def test_the_rules_equal_those_of_the_continuous_table(episodes):
    ended = 0
    for state, choice, after, transition in episodes:
        arm = np.zeros((B, 7), np.float32)
        for i, name in enumerate(np.array(CHOICES)[np.asarray(choice)]):
            axis = {"x": 0, "y": 1, "z": 2, "yaw": 5}.get(name[1:])
            if axis is not None:
                arm[i, axis] = 1 if name[0] == "+" else -1
            arm[i, 6] = 1 if name == "open" or (state.opens[i] and name != "close") else -1
        expected, expected_transition = env_step(state.table, arm)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), after.table, expected)
        for field in ("terminated", "truncated", "success"):
            np.testing.assert_array_equal(
                getattr(transition, field), getattr(expected_transition, field)
            )
        ended += int(expected_transition.terminated.sum())
    assert ended > 0
    assert transition.truncated.any()


def test_the_reward_without_shaping_is_success(episodes):
    for state, choice, _, shaped in episodes:
        _, transition = plain_step(state, choice)
        np.testing.assert_array_equal(transition.reward, shaped.success)


def test_the_shaping_of_an_episode_sums_to_its_first_potential(episodes):
    """Σ γᵗ (γ Φ(sₜ₊₁) − Φ(sₜ)) = γᵀ Φ(s_T) − Φ(s₀), with Φ = 0 after a termination."""

    def distance(state):
        target = np.asarray(state.instruction) % rules.NUM_BLOCKS
        asked = np.asarray(state.blocks)[np.arange(B), target]
        return np.linalg.norm(np.asarray(state.tool) - asked, axis=-1)

    goes_on = np.ones(B, bool)
    total, left = np.zeros(B), np.zeros(B)
    for t, (_, _, after, transition) in enumerate(episodes):
        shaping = np.asarray(transition.reward) - np.asarray(transition.success)
        total += np.where(goes_on, GAMMA**t * shaping, 0)
        goes_on &= ~np.asarray(transition.terminated)
        left = np.where(goes_on, -(GAMMA ** (t + 1)) * distance(after.table), 0)
    first = distance(episodes[0][0].table)
    np.testing.assert_allclose(total, WEIGHT * (left + first), atol=1e-5)
    assert 0 < goes_on.sum() < B  # some terminate, some do not


def test_observations_are_relative_to_the_tool():
    state, seen = reset(jax.random.split(jax.random.key(2), B))
    now, seen = jax.device_get(state.table), np.asarray(seen)
    assert seen.shape[1:] == WORLD.observation_shape == (22 + 8 + 8,)
    blocks = seen[:, :20].reshape(B, 4, 5)
    np.testing.assert_allclose(blocks[..., :3] / 10 + now.tool[:, None], now.blocks, atol=1e-6)
    np.testing.assert_allclose(blocks[..., 3], np.sin(2 * now.yaws), atol=1e-6)
    np.testing.assert_allclose(seen[:, 20:22] / 10 + now.tool[:, :2], now.plate, atol=1e-6)
    np.testing.assert_allclose(seen[:, 22:25] / 10, now.tool, atol=1e-6)
    np.testing.assert_array_equal(seen[:, 29], now.opening)
    np.testing.assert_array_equal(seen[:, WORLD.instruction].argmax(axis=1), now.instruction)
    assert (seen[:, WORLD.instruction].sum(axis=1) == 1).all()


def test_only_the_selected_tasks_occur():
    keys = [jax.random.split(jax.random.key(seed), B) for seed in range(5)]
    asked = {i for key in keys for i in np.asarray(reset(key)[0].table.instruction).tolist()}
    assert {rules.INSTRUCTIONS[i].task for i in asked} == {"touch", "lift"}
    assert len(asked) == len(WORLD.instruction) == 8


def test_moving_straight_to_the_block_succeeds():
    """Scripted: moves above the block with closed gripper, then down."""
    world = discrete_table.make(TableChoicesConfig())
    state, seen = jax.jit(jax.vmap(world.reset))(jax.random.split(jax.random.key(3), B))
    step, succeeded, over = jax.jit(jax.vmap(world.step)), np.zeros(B, bool), np.zeros(B, bool)
    for t in range(40):
        asked = np.asarray(seen)[:, world.instruction].argmax(axis=1)
        x, y, _ = np.asarray(seen)[:, :20].reshape(B, 4, 5)[np.arange(B), asked, :3].T
        along_x = np.abs(x) > np.abs(y)
        side = np.where(along_x, np.where(x > 0, 1, 2), np.where(y > 0, 3, 4))
        far = np.maximum(np.abs(x), np.abs(y)) > 0.16
        choice = np.where(t == 0, CHOICES.index("close"), np.where(far, side, CHOICES.index("-z")))
        state, transition = step(state, jnp.asarray(choice))
        seen = transition.observation
        succeeded |= np.asarray(transition.success) & ~over
        over |= np.asarray(transition.terminated)
    assert succeeded.mean() > 0.8


@pytest.mark.slow
def test_the_image_shows_the_table():
    state, _ = jax.jit(WORLD.reset)(jax.random.key(0))
    picture = np.asarray(jax.jit(WORLD.draw)(state))
    assert (picture.shape, picture.dtype) == ((96, 96, 3), np.uint8)
    assert picture.std() > 10


def test_a_wrong_action_raises_one_sentence():
    with pytest.raises(ValueError, match=r"one integer in 0 … 10 .* got float32\[\]"):
        WORLD.step(None, jnp.float32(1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ("tuch",)}, "unknown name 'tuch' in tasks; .* Did you mean 'touch'"),
        ({"tasks": ()}, "tasks must hold at least one of"),
        ({"shaping": -1.0}, r"shaping must be >= 0 and shaping_gamma in \[0, 1\], got -1.0"),
        ({"table": JaxTableConfig()}, "image_size must be 0, got 64"),
    ],
)
def test_a_wrong_config_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TableChoicesConfig(**wrong)
