"""The MuJoCo memory table: the JAX twin's rules, layouts and cues on contact physics."""

import functools

import jax
import numpy as np
import pytest

from train.record import demonstrate
from vla_jax.envs.memory_table import memory_env, memory_rules, memory_state, tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.mujoco_memory import MemoryMujoco, MujocoMemoryConfig
from vla_jax.envs.table import rules

STAY = np.array([0, 0, 0, 0, 0, 0, -1.0])
DOWN = np.array([0, 0, -1.0, 0, 0, 0, -1.0])


@functools.cache
def simulator(name, delay=4):
    return MemoryMujoco(MujocoMemoryConfig(task=name, delay=delay))


@functools.cache
def twin(name, delay=4):
    return memory_env.make(JaxMemoryConfig(task=name, delay=delay))


def field(observation, name):
    return observation["environment_state"][memory_state.STATE_NAMES.index(name)]


def watch(world):
    """Steps until the robot acts; returns the observations."""
    seen = []
    while not world.is_acting:
        seen.append(world.step(STAY).observation)
    return seen


def play(world, choose):
    """Plays an episode that has begun; returns its last step."""
    while True:
        step = world.step(choose(world))
        if step.terminated or step.truncated:
            return step


@pytest.mark.parametrize("name", ["lit", "cups"])
def test_the_same_seed_has_the_same_layout_and_cue_in_both_twins(name):
    world, env = simulator(name), twin(name)
    state, expected = jax.jit(env.reset)(jax.random.key(5))
    got = world.reset(5)
    np.testing.assert_allclose(
        got["environment_state"], expected.environment_state, atol=1e-4, rtol=0
    )
    np.testing.assert_allclose(got["proprio"][:3], expected.proprio[:3], atol=0.005)
    index = int(env.instruction_index(state))
    assert (world.instruction, world.task) == (env.instructions[index], env.tasks[index])
    assert world.max_steps == env.max_steps
    step = jax.jit(env.step)
    for _ in range(8):  # what is shown is the same too
        state, transition = step(state, STAY)
        np.testing.assert_allclose(
            world.step(STAY).observation["environment_state"],
            transition.observation.environment_state,
            atol=1e-4,
            rtol=0,
        )


def test_the_arm_is_held_while_something_is_shown_and_moves_afterwards():
    world = simulator("lit")
    first = world.reset(1)
    assert not world.is_acting
    while not world.is_acting:
        still = world.step(DOWN).observation
        np.testing.assert_array_equal(still["proprio"], first["proprio"])
    moved = world.step(DOWN).observation
    assert moved["proprio"][2] < first["proprio"][2] - 0.005


@pytest.mark.parametrize("name", ["lit", "cups"])
def test_two_cues_give_equal_observations_until_the_robot_touches_something(name):
    world = simulator(name)
    actions = [*[DOWN * 0.3] * 3, STAY]
    episodes = []
    for cue in range(3):
        start = memory_rules.start(world.config, jax.random.key(2), jax.random.key(cue))
        world.begin(start)
        last = watch(world)[-1]
        episodes.append([last, *[world.step(action).observation for action in actions]])
    for other in episodes[1:]:
        for one, two in zip(episodes[0], other, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, two)


def test_blocks_below_cups_are_out_of_reach_and_the_first_cup_that_is_touched_counts():
    world = simulator("cups")
    world.reset(4)
    watch(world)
    step = play(world, lambda world: world.expert())
    assert step.success
    assert not any(field(step.observation, f"{colour}.seen") for colour in rules.COLOURS)
    # the hand stands on a cup of 6 cm, not on the table
    assert step.observation["proprio"][2] > 0.05


def test_the_button_counts_presses():
    world = simulator("blinks")
    world.reset(2)
    assert play(world, lambda world: world.expert()).success
    world.reset(2)
    step = play(world, lambda world: STAY if world.is_acting else DOWN)
    assert (step.success, step.truncated) == (False, True)


def test_recorded_episodes_mask_the_watched_steps():
    world = simulator("lit")
    episode = demonstrate(world, 0, noise=0.0, disturbance=0.0)
    assert episode is not None
    mask = episode.action_mask
    state = memory_rules.start(world.config, *jax.random.split(jax.random.key(0)))
    watched = int(state.cue.shown + state.cue.delay)
    np.testing.assert_array_equal(mask, np.arange(len(mask)) >= watched)


@pytest.fixture
def with_images(request):
    try:
        world = MemoryMujoco(MujocoMemoryConfig(task=request.param, image_size=32, delay=2))
    except RuntimeError as error:
        pytest.skip(f"no OpenGL here: {error}")
    yield world
    world.close()


@pytest.mark.sampled
@pytest.mark.parametrize(
    "with_images", [name for name, task in tasks.TASKS.items() if task.has_delay], indirect=True
)
def test_two_cues_give_equal_pictures_and_the_cue_is_visible_before(with_images):
    config, episodes = with_images.config, []
    for cue in range(4):
        start = memory_rules.start(config, jax.random.key(2), jax.random.key(cue))
        first = with_images.begin(start)
        watched = [first, *watch(with_images)]
        acting = [with_images.step(action).observation for action in [DOWN * 0.3, STAY]]
        episodes.append([watched, [watched[-1], *acting]])
    shown = np.array([[o["image_primary"] for o in watched] for watched, _ in episodes], int)
    # in the dark it is the place of a block, the same in a layout, of which the sentence tells one
    assert (np.abs(shown[:1] - shown[1:]).max() > 20) == (config.task != "dark")
    for _, acting in episodes[1:]:
        for one, other in zip(episodes[0][1], acting, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)
    assert with_images.draw(48).shape == (48, 48, 3)


@pytest.mark.sampled
@pytest.mark.parametrize("with_images", tasks.TASKS, indirect=True)
def test_images_are_those_of_a_new_rendering_at_every_step(with_images):
    world, rng = with_images, np.random.default_rng(0)
    observation = world.reset(3)
    for _ in range(60):
        for camera in ("primary", "wrist"):
            rendered = world._physics.render(camera, world.config.image_size)
            visible = rendered * (not world._is_dark)
            assert np.array_equal(observation[f"image_{camera}"], visible)
        step = world.step(rng.uniform(-1, 1, 7))
        observation = step.observation
        if step.terminated or step.truncated:
            observation = world.reset(4)


@pytest.mark.parametrize("with_images", ["lit"], indirect=True)
def test_an_unchanged_scene_is_not_rendered_again_and_another_plate_is(with_images, monkeypatch):
    world = with_images
    state = memory_rules.start(world.config, jax.random.key(2), jax.random.key(0))
    moved = state._replace(table=state.table._replace(plate=state.table.plate + 0.05))
    first, other = (world.begin(each)["image_primary"] for each in (state, moved))
    assert (first != other).any()
    physics, cameras = world._physics, []
    render = physics.render
    monkeypatch.setattr(physics, "render", lambda *args: cameras.append(args[0]) or render(*args))
    num_watched = len(watch(world))
    assert 0 < len(cameras) < num_watched  # of two cameras, when the block lights up and goes out


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_expert_succeeds_in_98_percent(name):
    world = simulator(name, 16)
    success = []
    for seed in range(50):
        world.reset(seed)
        success.append(play(world, lambda world: world.expert()).success)
    assert np.mean(success) >= 0.98


# Least share of episodes whose success is the same if the actions of one twin's expert are replayed
# in the other, from and to JAX. The exception is tasks in which blocks are carried: there MuJoCo's
# arm has the lag of its servos, one step, without which a held block slips in the fingers. Actions
# of the JAX twin lift a block less than 5 cm in MuJoCo, so that lift_times agrees in no episode in
# that direction, which is left out.
AGREEMENT = {
    **{(name, from_jax): 0.9 for name in tasks.TASKS for from_jax in (True, False)},
    ("put_back", True): 0.5,
    ("put_back", False): 0.5,
    ("lift_times", False): 0.5,
}
del AGREEMENT["lift_times", True]
AFTERWARDS = 6  # further times that the last action is replayed, since an arm may lag


def replay(actions, step, is_over):
    """Applies actions until the episode is over; returns the last step."""
    for action in [*actions, *[actions[-1]] * AFTERWARDS]:
        last = step(action)
        if is_over(last):
            break
    return last


def agreement(name, seeds, from_jax):
    """Returns the share of episodes in which expert and replay have the same success."""
    world, env = simulator(name, 16), twin(name, 16)
    reset, step, expert = jax.jit(env.reset), jax.jit(env.step), jax.jit(env.expert)
    agrees = []
    for seed in seeds:
        begun = reset(jax.random.key(seed))[0]
        world.reset(seed)
        state, actions, first = begun, [], None

        def advance(action):
            nonlocal state
            state, transition = step(state, action)
            return transition

        while first is None or not over(first):
            actions.append(np.asarray(expert(state)) if from_jax else world.expert())
            first = (advance if from_jax else world.step)(actions[-1])
        state = begun
        world.reset(seed)
        second = replay(actions, world.step if from_jax else advance, over)
        agrees.append(bool(first.success) == bool(second.success))
    return np.mean(agrees)


def over(step):
    return bool(step.terminated) or bool(step.truncated)


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(("name", "from_jax"), AGREEMENT)
def test_replayed_actions_succeed_in_both_twins(name, from_jax):
    assert agreement(name, range(20), from_jax) >= AGREEMENT[name, from_jax]


def test_a_replayed_sequence_of_touches_succeeds_in_both_twins():
    assert agreement("touch_times", range(2), True) == 1


@pytest.mark.parametrize("name", ["touch_times", "path"])
def test_the_hand_follows_the_twin_within_5_mm_until_it_touches_something(name):
    world, env = simulator(name), twin(name)
    state, _ = jax.jit(env.reset)(jax.random.key(3))
    world.reset(3)
    step, expert = jax.jit(env.step), jax.jit(env.expert)
    while not int(state.progress.done):
        action = np.asarray(expert(state))
        state, _ = step(state, action)
        got = world.step(action).observation["proprio"][:3]
        np.testing.assert_allclose(got, state.table.tool, atol=0.005)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="unknown memory task 'lid'"):
        MujocoMemoryConfig(task="lid")
