"""Chance of the memory tasks: rules that guess, probe, pause or count without remembering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs.memory_table import (
    counting,
    memory_env,
    memory_rules,
    memory_task,
    motions,
    permanence,
    tasks,
)
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.table import rules

NUM = 2_000  # episodes
NAMES = tuple(tasks.TASKS)
COUNTED = ("touch_times", "blinks")


def nothing(state, key):
    del state, key
    return jnp.zeros(())


def play(config, act, begin=nothing, num=NUM):
    """Returns which episodes succeed, `[num]` bool, and what was kept at their ends.

    Args:
      config: of the memory table.
      act: (state, key, kept) -> action, kept.
      begin: (first state, key) -> kept.
      num: episodes.
    """
    env = memory_env.make(config)

    @jax.jit
    @jax.vmap
    def episode(key):
        state, _ = env.reset(key)

        def step(carry, step_key):
            state, kept, alive = carry
            action, kept = act(state, step_key, kept)
            state, transition = env.step(state, action)
            ends = transition.terminated | transition.truncated
            return (state, kept, alive & ~ends), alive & transition.success

        first_key, *keys = jax.random.split(key, 1 + env.max_steps)
        start = (state, begin(state, first_key), jnp.ones((), bool))
        (_, kept, _), success = jax.lax.scan(step, start, jnp.stack(keys))
        return jnp.any(success), kept

    return jax.device_get(episode(jax.random.split(jax.random.key(77), num)))


def rate(*args, **options):
    """Returns the share of episodes of `play` that succeed, in [0, 1]."""
    return float(play(*args, **options)[0].mean())


def width(chance, num=NUM):
    """Returns 3.5 standard deviations of the rate in `num` episodes."""
    return 3.5 * np.sqrt(chance * (1 - chance) / num) + 1 / num


@pytest.mark.sampled
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("timing", "put_back")])
def test_chance_is_the_rate_of_an_expert_that_believes_another_cue(name):
    config = JaxMemoryConfig(task=name, delay=2)
    expert, chance = memory_env.make(config).expert, tasks.chance(config)

    def another_cue(state, key):
        cue = tasks.get(name).draw(config, key)
        return cue._replace(shown=state.cue.shown, delay=state.cue.delay)

    def act(state, key, cue):
        del key
        return expert(state._replace(cue=cue)), cue

    assert abs(rate(config, act, another_cue) - chance) <= width(chance)


def test_chance_of_timing_is_the_rate_of_waiting_at_random():
    config = JaxMemoryConfig(task="timing", delay=16)
    before, tolerated = 16 - 4, 7  # steps
    waits = (before / (before + tolerated)) ** (1 / tolerated)  # the best probability

    def act(state, key, kept):
        is_on = state.table.num_steps >= state.cue.count  # the lamp, which is visible
        opens = ~is_on | jax.random.bernoulli(key, waits)
        return motions.send(config, motions.stay(), opens=opens), kept

    chance = tasks.chance(config)
    assert abs(rate(config, act) - chance) <= width(chance)


def test_a_pause_after_each_press_is_no_better_than_a_guess():
    """Without a rule against it, such a policy would be right for every number of blinks."""
    config = JaxMemoryConfig(task="blinks", delay=2)
    expert = memory_env.make(config).expert

    def act(state, key, pause):
        del key
        always = state._replace(cue=state.cue._replace(count=jnp.int32(9)))
        rests = state.progress.armed & (state.progress.done > 0) & (state.progress.since < pause)
        still = motions.send(config, motions.stay())
        return jnp.where(rests, still, expert(always)), pause

    pauses = np.array([8, counting.STAY_STEPS, 20])
    success, pause = play(config, act, lambda state, key: jax.random.choice(key, pauses))
    chance = tasks.chance(config)
    for each in pauses:
        tried = success[pause == each]
        assert tried.mean() <= chance + width(chance, len(tried))


# put_back ---------------------------------------------------------------------------------------


def free_places(state, places):
    """Returns which places `[n, 2]` may be the first one of the block of the cue, `[n]` bool."""
    others = jnp.arange(rules.NUM_BLOCKS) != state.cue.colour
    away = jnp.linalg.norm(places[:, None] - state.layout.blocks[None], axis=-1)
    from_plate = jnp.linalg.norm(places - state.layout.plate[None], axis=-1)
    nearest = jnp.min(jnp.where(others[None], away, jnp.inf), axis=1)
    return (nearest >= rules.PLATE_SPACING) & (from_plate >= rules.PLATE_SPACING)


def square(num):
    """Returns `num` × `num` places of the square of the layouts, `[n, 2]`."""
    line = np.linspace(-1, 1, num, dtype=np.float32) * rules.LAYOUT_HALF_SIZE
    return jnp.asarray(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2))


def roomiest(state, key):
    """Returns the place `[2]` within reach of the most places that are free."""
    del key
    places = square(33)
    away = jnp.linalg.norm(places[:, None] - places[None], axis=-1)
    covered = (away < permanence.RETURN_DISTANCE) @ free_places(state, places).astype(jnp.float32)
    return places[jnp.argmax(covered)]


def test_a_simple_guess_of_the_place_has_most_of_the_stated_chance_of_put_back_and_no_more():
    """Given the colour; `tests/campaigns/place_chance.py` measures the best guess."""
    config = JaxMemoryConfig(task="put_back", delay=2)
    expert = memory_env.make(config).expert

    def act(state, key, place):
        del key
        blocks = state.layout.blocks.at[state.cue.colour].set(place)
        return expert(state._replace(layout=state.layout._replace(blocks=blocks))), place

    guessed = rate(config, act, roomiest)
    assert 0.6 * permanence.PLACE_CHANCE <= guessed <= permanence.PLACE_CHANCE


def test_a_block_that_is_let_go_at_place_after_place_is_no_better_than_a_guess():
    config = JaxMemoryConfig(task="put_back", delay=2)
    expert, places = memory_env.make(config).expert, square(6)

    def act(state, key, tried):
        """Drags the block from one free place to the next, and opens the fingers there."""
        del key
        table, block = state.table, state.cue.colour
        is_green = permanence._is_time_to_return(config, state)
        order = jnp.argsort(~free_places(state, places), stable=True)
        to = places[order[tried]] - table.tool[:2]
        arrived = table.held[block] & (jnp.linalg.norm(to) < 0.012)
        height = jnp.where(table.held[block], 0.030, 0.018) - table.tool[2]
        drag = motions.send(config, jnp.append(to, height))
        let_go = motions.send(config, motions.stay(), opens=True)
        take = motions.send(config, jnp.append(jnp.zeros(2), height))
        is_around = jnp.linalg.norm(table.blocks[block, :2] - table.tool[:2]) < 0.02
        is_around &= table.tool[2] < 0.045
        held = jnp.where(arrived, let_go, drag)
        probe = jnp.where(is_around, take, expert(state))
        probe = jnp.where(table.held[block], held, probe)
        return jnp.where(is_green, probe, expert(state)), tried + (is_green & arrived)

    guess = permanence.PLACE_CHANCE
    tried = rate(config, act, lambda state, key: jnp.int32(0), num=200)
    assert tried <= guess + width(guess, 200)


# every task ------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_chance_and_an_instruction_for_each_cue_or_is_refused(name):
    accepted = 0
    for axes in [{axis: number} for axis in ("items", "updates") for number in range(9)]:
        try:
            config = JaxMemoryConfig(task=name, **axes)
        except ValueError:
            continue
        accepted += 1
        task = tasks.get(name)
        assert 0 < tasks.chance(config) < 1, axes
        for key in jax.random.split(jax.random.key(1), 3):
            cue = task.draw(config, key)
            index = int(task.instruction(config, cue))
            assert 0 <= index < len(task.instructions(config)), axes
            assert int(cue.shown) >= 0
    assert accepted >= 9


def test_configs_without_anything_to_remember_are_refused():
    for name in ("touch_times", "lift_times", "blinks"):
        with pytest.raises(ValueError, match=f"updates of task '{name}' must be at least 2, or 0"):
            JaxMemoryConfig(task=name, updates=1)


# the first observation and the present one ------------------------------------------------------


@functools.cache
def counted(name):
    """Plays the expert; returns for each step observation, action, and events so far."""
    config = JaxMemoryConfig(task=name, delay=2)
    env = memory_env.make(config)

    @jax.jit
    @jax.vmap
    def episode(key):
        state, first = env.reset(key)

        def step(carry, _):
            state, seen, alive = carry
            action = env.expert(state)
            after, transition = env.step(state, action)
            risen = alive & state.progress.armed & (state.table.tool[2] > memory_task.RISEN)
            ends = transition.terminated | transition.truncated
            row = (seen.environment_state, seen.proprio, action, state.progress.done, risen)
            return (after, transition.observation, alive & ~ends), row

        carry = (state, first, jnp.ones((), bool))
        return state, jax.lax.scan(step, carry, length=env.max_steps)[1]

    return jax.device_get(episode(jax.random.split(jax.random.key(5), 64)))


@pytest.mark.parametrize("name", COUNTED)
def test_first_and_present_observation_do_not_determine_what_the_expert_counts(name):
    """The hand is back where it was, and goes on or stops: only the past tells which."""
    start, (state, proprio, action, done, risen) = counted(name)
    several = np.flatnonzero(start.cue.count >= 2)
    assert len(several) > 16
    for i in several:
        count = int(start.cue.count[i])
        back = [np.flatnonzero(risen[i] & (done[i] == n))[0] for n in (count - 1, count)]
        np.testing.assert_allclose(*state[i, back], atol=2e-3)
        np.testing.assert_allclose(*proprio[i, back], atol=2e-3)
        assert np.abs(np.subtract(*action[i, back])).max() > 0.5


# windows ----------------------------------------------------------------------------------------


def test_windows_that_end_after_the_cue_are_at_chance_and_longer_ones_are_not():
    """No training: an expert that reads the window has what the best policy could have."""
    config = JaxMemoryConfig(task="lit", delay=12)
    expert, (shortest, longest) = memory_env.make(config).expert, tasks.delay_range(config)
    # the second shows the cue at the first acting steps, but no more when the hand arrives
    windows = np.array([shortest, longest + 2, longest + tasks.get("lit").act_steps(config)])

    def begin(state, key):
        del state
        return jax.random.choice(key, windows), jnp.int32(0), jnp.int32(999)

    def act(state, key, kept):
        """Acts on the block that was lit in the last `window` observations, else on the red one."""
        del key
        window, block, age = kept
        lit = memory_rules.display(config, state).lit
        block = jnp.where(jnp.any(lit), jnp.argmax(lit), block).astype(jnp.int32)
        age = jnp.where(jnp.any(lit), 0, age + 1)
        cue = state.cue._replace(colour=jnp.where(age < window, block, 0))
        return expert(state._replace(cue=cue)), (window, block, age)

    success, (window, *_) = play(config, act, begin)
    short, middle, long = (success[window == each] for each in windows)
    chance = tasks.chance(config)
    assert abs(short.mean() - chance) <= width(chance, len(short))
    assert chance < middle.mean() < 0.9
    assert long.mean() >= 0.98
