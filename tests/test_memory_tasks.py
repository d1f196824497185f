import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs.memory_table import (
    memory_env,
    memory_rules,
    memory_state,
    memory_task,
    motions,
    permanence,
    procedures,
    scenery,
    tasks,
)
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_task import INSTRUCTION_STEPS
from vla_jax.envs.table import rules

NUM = 64  # episodes
NAMES = tuple(tasks.TASKS)
WITH_DELAY = tuple(name for name, task in tasks.TASKS.items() if task.has_delay)
HELD = tuple(name for name in NAMES if name != "timing")  # tasks with a shown part


@functools.cache
def play(name, by_expert, same_layout=False, **axes):
    """Plays episodes in one program, by the expert or hovering."""
    config = JaxMemoryConfig(task=name, delay=6, **axes)
    env = memory_env.make(config)
    layout_keys = jax.random.split(jax.random.key(3), NUM)
    layout_keys = layout_keys[jnp.zeros(NUM, jnp.int32)] if same_layout else layout_keys
    cue_keys = jax.random.split(jax.random.key(4), NUM)

    @jax.jit
    @jax.vmap
    def episode(layout_key, cue_key):
        state, observation = memory_env.start(config, layout_key, cue_key)

        def step(carry, _):
            state, observation, alive = carry
            action = env.expert(state) if by_expert else jnp.zeros(7).at[2].set(0.2)
            acts = env.is_acting(state)
            after, transition = env.step(state, action)
            ends = transition.terminated | transition.truncated
            seen = (observation.environment_state, observation.proprio, acts, alive)
            return (after, transition.observation, alive & ~ends), (
                seen,
                alive & transition.success,
            )

        start = (state, observation, jnp.ones((), bool))
        (end, _, _), (seen, success) = jax.lax.scan(step, start, length=env.max_steps)
        return seen, jnp.any(success), state, end

    return jax.device_get(episode(layout_keys, cue_keys))


@pytest.mark.sampled
@pytest.mark.parametrize("name", NAMES)
def test_the_expert_succeeds(name):
    _, success, *_ = play(name, True)
    assert success.mean() >= 0.98


@pytest.mark.sampled
@pytest.mark.parametrize("name", WITH_DELAY)
def test_after_the_cue_has_gone_observations_of_two_cues_are_equal(name):
    (state, proprio, acts, _), _, start, _ = play(name, False, same_layout=True)
    first = acts.argmax(axis=1)
    cues = np.concatenate([np.reshape(leaf, (NUM, -1)) for leaf in start.cue], axis=1)
    assert len(np.unique(cues, axis=0)) > 1
    assert np.all(start.cue.delay == start.cue.delay[0])
    # the hand hovers, so that nothing is touched; a window as long as the delay sees no cue either
    shortest, delay = acts.sum(axis=1).min(), start.cue.delay[0]
    for part in (state, proprio):
        unseen = np.stack([part[i, at - delay : at + shortest] for i, at in enumerate(first)])
        assert np.all(unseen == unseen[:1])
    shown = state[:, : first.min()]
    sentences = start.table.instruction
    assert np.any(shown != shown[:1]) or np.any(sentences != sentences[0])


def recalls(name):
    """Returns observations and recall `[NUM, T, ...]` of a hovering hand, with one layout."""
    config = JaxMemoryConfig(task=name, delay=6)
    env = memory_env.make(config)
    keys = jax.random.split(jax.random.key(4), NUM)
    _, sentences = np.unique(np.array(env.instructions), return_inverse=True)

    @jax.jit
    @jax.vmap
    def episode(cue_key):
        state, observation = memory_env.start(config, jax.random.key(3), cue_key)

        def step(carry, _):
            state, observation = carry
            after, transition = env.step(state, jnp.zeros(7).at[2].set(0.2))
            numbers, choices = env.recall(state)
            sentence = jnp.asarray(sentences)[env.instruction_index(state)]
            seen = jnp.concatenate([observation.environment_state, observation.proprio])
            return (after, transition.observation), (
                jnp.append(seen, sentence),
                jnp.concatenate([numbers, *choices]),
            )

        return jax.lax.scan(step, (state, observation), length=env.max_steps)[1]

    return jax.device_get(episode(keys))


@pytest.mark.parametrize("name", NAMES)
def test_recall_asks_for_nothing_before_it_is_shown(name):
    """Episodes that have looked the same so far have the same recall."""
    seen, recall = recalls(name)
    same = np.zeros(NUM, np.int64)  # episodes with one number have looked the same so far
    for now, labels in zip(np.swapaxes(seen, 0, 1), np.swapaxes(recall, 0, 1), strict=True):
        now = np.concatenate([same[:, None], now], axis=1)
        _, first, same = np.unique(now, axis=0, return_index=True, return_inverse=True)
        np.testing.assert_allclose(labels, labels[first[same]], atol=1e-5)
    assert same.max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_recall_tells_what_the_expert_does(name):
    """Two cues whose experts act differently in one situation are told apart by their recall."""
    config = JaxMemoryConfig(task=name, delay=6)
    env = memory_env.make(config)
    layout_keys = jnp.broadcast_to(jax.random.key(3), NUM)
    states, _ = jax.vmap(functools.partial(memory_env.start, config))(
        layout_keys, jax.random.split(jax.random.key(4), NUM)
    )
    # all act then, and the lamp of "timing" is on
    steps = jnp.maximum(states.cue.shown + states.cue.delay, 13)
    states = states._replace(table=states.table._replace(num_steps=steps))
    action = np.asarray(jax.vmap(env.expert)(states)).round(4)
    numbers, choices = jax.vmap(env.recall)(states)
    assert np.all(np.abs(numbers) < 8)
    for choice in choices:
        np.testing.assert_array_equal(np.sort(choice), np.eye(choice.shape[1])[[-1] * NUM])
    recall, by_recall = np.concatenate([numbers, *choices], axis=1).round(4), {}
    for number, row in enumerate(recall):
        same_action = by_recall.setdefault(row.tobytes(), action[number])
        np.testing.assert_array_equal(action[number], same_action)
    assert len(by_recall) > 1
    assert len(np.unique(action, axis=0)) > 1 or name == "blinks"  # every count begins alike


@pytest.mark.parametrize("name", HELD)
def test_nothing_changes_during_the_delay_and_the_arm_is_held_still(name):
    (state, proprio, acts, _), _, start, _ = play(name, True)
    for i in range(NUM):
        shown, acting = int(start.cue.shown[i]), int(acts[i].argmax())
        assert acting == shown + start.cue.delay[i]
        assert acting >= INSTRUCTION_STEPS
        assert np.all(state[i, shown : acting + 1] == state[i, shown])
        assert np.all(proprio[i, : acting + 1] == proprio[i, 0])


def test_the_delay_is_drawn_around_its_mean():
    assert tasks.delay_range(JaxMemoryConfig(delay=16)) == (12, 20)
    delays = play("lit", True)[2].cue.delay
    assert set(delays) == {5, 6, 7}


def test_first_and_present_observation_do_not_determine_the_cup():
    (state, *_), _, start, _ = play("cups_swapped", False, same_layout=True, updates=3)
    config = JaxMemoryConfig(task="cups_swapped", delay=6, updates=3)
    place = jax.vmap(functools.partial(permanence.place_of_target, config))(start)
    first = [row.tobytes() for row in state[:, 0]]
    answers = {}
    for key, colour, where in zip(first, start.cue.colour, np.asarray(place), strict=True):
        answers.setdefault((key, int(colour)), set()).add(int(where))
    assert any(len(places) > 1 for places in answers.values())


def test_swaps_move_the_target_as_written_out_by_hand():
    state = play("cups_swapped", False, same_layout=True, updates=3)[2]
    config = JaxMemoryConfig(task="cups_swapped", delay=6, updates=3)
    place = jax.vmap(functools.partial(permanence.place_of_target, config))(state)
    for i in range(NUM):
        cups = {place: place for place in range(4)}  # place -> cup, named by its first place
        for one, other in state.cue.swaps[i][: state.cue.count[i]]:
            cups[int(one)], cups[int(other)] = cups[int(other)], cups[int(one)]
        first = int(state.cue.places[i][state.cue.colour[i]])
        assert cups[int(place[i])] == first


def test_cups_that_change_places_pass_no_other_cup_nor_each_other():
    config = JaxMemoryConfig(task="cups_swapped", delay=2)

    @jax.jit
    @jax.vmap
    def cups(key):
        start = memory_rules.start(config, *jax.random.split(key))

        def at(step):
            table = start.table._replace(num_steps=step)
            display = memory_rules.display(config, start._replace(table=table))
            return scenery.cylinders(display, has_dots=False).centre[3:6], display.cups_up[:3]

        return jax.vmap(at)(jnp.arange(4, tasks.get("cups_swapped").max_shown(config)))

    centre, up = jax.device_get(cups(jax.random.split(jax.random.key(0), NUM)))
    assert set(up.sum(axis=-1).ravel()) == {0, 2}
    for one, other in itertools.combinations(range(3), 2):
        apart = np.abs(centre[:, :, one] - centre[:, :, other])
        beside = np.linalg.norm(apart[..., :2], axis=-1) > 2 * motions.CUP_RADIUS
        assert np.all(beside | (apart[..., 2] > motions.CUP_HEIGHT))


@pytest.mark.parametrize("name", ["cups", "cups_swapped"])
def test_the_state_has_cups_from_left_to_right_and_says_which_are_in_the_air(name):
    state = play(name, False)[0][0]
    names = list(memory_state.STATE_NAMES)
    x, up = (
        state[..., [names.index(f"cup_{cup}.{part}") for cup in range(3)]] for part in ("x", "up")
    )
    is_down = state[..., names.index("cups.down")] > 0
    rest = is_down & ~np.any(up, axis=-1)
    assert np.any(rest)
    assert np.all(np.diff(x[rest], axis=-1) > 0)
    moves = (np.diff(x, axis=1) != 0) & is_down[:, :-1, None]
    assert np.any(moves) == (name == "cups_swapped")
    assert np.all((up[:, 1:] + up[:, :-1] > 0) == moves)


def test_in_the_dark_the_state_shows_the_hand_alone():
    state, _, acts, _ = play("dark", False)[0]
    names = np.array(memory_state.STATE_NAMES)
    assert set(names[np.any(state[acts] != 0, axis=0)]) == {"dark"}
    assert {"plate.x", "red.x"} <= set(names[np.any(state[:, 0] != 0, axis=0)])


def test_the_first_22_numbers_are_those_of_the_table():
    assert memory_state.STATE_NAMES[: rules.STATE_SIZE] == rules.STATE_NAMES
    assert len(memory_state.STATE_NAMES) == 52


def test_actions_have_no_effect_while_the_robot_watches():
    config = JaxMemoryConfig(task="lit", delay=6)
    state, _ = memory_env.start(config, jax.random.key(0), jax.random.key(1))
    step = jax.jit(memory_env.make(config).step)
    moved, transition = step(state, jnp.ones(7))
    assert np.array_equal(moved.table.tool, state.table.tool)
    assert not transition.terminated


def test_paths_visit_neighbouring_dots_once():
    paths = procedures.paths(4)
    assert len({tuple(path) for path in paths}) == len(paths)
    for path in paths:
        assert len(set(path)) == 4
        for one, other in itertools.pairwise(path):
            assert (
                max(abs(a - b) for a, b in zip(divmod(one, 3), divmod(other, 3), strict=True)) == 1
            )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"task": "light"}, "unknown memory task 'light'"),
        ({"task": "kth", "items": 5}, "items of task 'kth' must be at most 4"),
        ({"task": "sequence", "items": 1}, "items of task 'sequence' must be at least 2"),
        ({"delay": -1}, "delay"),
    ],
)
def test_configs_without_meaning_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        JaxMemoryConfig(**fields)


def test_a_contact_counts_again_after_the_hand_has_risen():
    state = play("lit", False)[2]
    one = jax.tree.map(lambda leaf: leaf[0], state)
    touched = jnp.array([True, False, False, False])
    begins, which, progress = memory_task.new_contact(one, touched)
    assert begins
    assert which == 0
    again, _, _ = memory_task.new_contact(one._replace(progress=progress), touched)
    assert not again
    other, which, _ = memory_task.new_contact(one._replace(progress=progress), touched[::-1])
    assert other
    assert which == 3
