"""Chains on the JAX table: rules, expert, when each instruction is given, and their measure."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from rich.console import Console

from train import chains as chain_script
from train.chains import ChainsConfig
from train.memory_cloning import _age
from train.memory_grid import CloningConfig
from vla_jax.envs.demonstrations import collect
from vla_jax.envs.table import chain_env, rules
from vla_jax.envs.table.chain_env import ChainConfig
from vla_jax.envs.table.jax_env import JaxTableConfig
from vla_jax.runs import Run

TOUCH, LIFT, PLACE = (task * rules.NUM_BLOCKS for task in range(3))  # of the red block
RED, GREEN, BLUE, YELLOW = range(rules.NUM_BLOCKS)
SHORT = ChainConfig(table=JaxTableConfig(image_size=0, max_steps=8))


@functools.cache
def env_of(all_at_start):
    return chain_env.make(ChainConfig(all_at_start=all_at_start))


@functools.cache
def play_expert(all_at_start, num_chains=200):
    """Returns states and transitions `[T, B, ...]` of the expert, each state before its step."""
    env = env_of(all_at_start)

    def step(state, _):
        after, transition = jax.vmap(lambda s: env.step(s, env.expert(s)))(state)
        given = jax.vmap(env.instruction_index)(state)
        return after, (state, transition._replace(observation=None), given)

    def play(keys):
        return jax.lax.scan(step, jax.vmap(env.reset)(keys)[0], length=100)[1]

    played = jax.device_get(jax.jit(play)(jax.random.split(jax.random.key(4), num_chains)))
    ended = np.cumsum(played[1].terminated, axis=0) - played[1].terminated > 0
    return played, ~ended


@pytest.mark.parametrize("all_at_start", [False, True])
def test_the_expert_does_98_percent_of_the_chains(all_at_start):
    (_, transition, _), runs = play_expert(all_at_start)
    assert np.mean(np.any(transition.success & runs, axis=0)) >= 0.98
    done = np.sum(transition.reward * runs, axis=0)
    assert done.max() == 5
    np.testing.assert_array_equal(done == 5, np.any(transition.success & runs, axis=0))


@pytest.mark.parametrize("all_at_start", [False, True])
def test_only_possible_instructions_are_drawn(all_at_start):
    (state, transition, _), runs = play_expert(all_at_start)
    for i in range(runs.shape[1]):
        end = np.flatnonzero(runs[:, i])[-1]
        order = state.order[end, i]
        assert np.all(order[1:] != order[:-1])
        assert np.sum(order >= PLACE) <= 1
    np.testing.assert_array_equal(
        chain_env.possible(jnp.int32(TOUCH + GREEN), jnp.ones((), bool)),
        [True, False, True, True, *[True] * 4, *[False] * 4],
    )
    assert np.all(chain_env.possible(jnp.int32(-1), jnp.zeros((), bool)))
    assert np.any(transition.success)


def test_the_next_instruction_is_given_when_the_last_one_is_done():
    (_, transition, given), runs = play_expert(False)
    changes = given[1:] != given[:-1]
    done = (transition.reward > 0) & ~transition.terminated & runs
    np.testing.assert_array_equal(changes[runs[1:]], done[:-1][runs[1:]])


def test_all_at_start_gives_exactly_the_five_sentences_of_the_chain_in_the_first_five_steps():
    (state, _, given), runs = play_expert(True)
    np.testing.assert_array_equal(given[:5], state.order[0].T)
    age = _age(given.T)  # the agent shows an instruction at age 0 only
    assert np.all(np.sum((age == 0).T & runs, axis=0) == 5)
    np.testing.assert_array_equal((age == 0).T[:5], np.ones((5, runs.shape[1]), bool))


def test_a_policy_that_does_nothing_ends_after_the_steps_of_one_instruction():
    env = chain_env.make(SHORT)
    state, _ = env.reset(jax.random.key(0))
    step = jax.jit(env.step)
    for t in range(SHORT.table.max_steps):
        state, transition = step(state, jnp.array([0, 0, 0, 0, 0, 0, 1.0]))
        assert transition.reward == 0
        assert bool(transition.terminated) == (t == SHORT.table.max_steps - 1)
    assert not transition.success


def hand_made(instruction, block, *, held=False, height=None, config=SHORT):
    """Returns a state whose hand is above, or holds, a block; blocks in a row, plate far away."""
    state, _ = chain_env.make(config).reset(jax.random.key(1))
    half = rules.BLOCK_HALF_SIZE[2]
    blocks = np.array([[0.1, y, half] for y in (-0.15, -0.05, 0.05, 0.15)], np.float32)
    blocks[block, 2] = half if height is None else height
    tool = np.array([*blocks[block, :2], blocks[block, 2] + (0 if held else 0.05)], np.float32)
    table = state.table._replace(
        tool=jnp.array(tool),
        blocks=jnp.array(blocks),
        yaws=jnp.zeros(4),
        plate=jnp.array([-0.12, 0.0]),
        held=jnp.arange(4) == (block if held else -1),
        opening=jnp.float32(0.54 if held else 0.0),
        instruction=jnp.int32(instruction),
    )
    return state._replace(table=table, order=state.order.at[0].set(instruction))


DOWN = jnp.array([0, 0, -1.0, 0, 0, 0, -1.0])
UP = -DOWN * jnp.array([1, 1, 1, 1, 1, 1, -1.0])


def step_until(state, action, steps, config=SHORT):
    step = jax.jit(chain_env.make(config).step)
    rewards = []
    for _ in range(steps):
        state, transition = step(state, action)
        rewards.append(float(transition.reward))
        if transition.terminated:
            break
    return state, transition, rewards


def test_a_touch_counts_once_and_a_wrong_block_ends_the_chain():
    state, transition, rewards = step_until(hand_made(TOUCH + BLUE, BLUE), DOWN, 2)
    assert sum(rewards) == 1
    assert not transition.terminated
    assert state.done == 1
    _, transition, rewards = step_until(hand_made(TOUCH + BLUE, GREEN), DOWN, 2)
    assert sum(rewards) == 0
    assert transition.terminated


def test_a_block_that_the_hand_touches_already_does_not_count_for_the_next_instruction():
    state, _, _ = step_until(hand_made(TOUCH + BLUE, BLUE), DOWN, 2)
    # still on the blue block: neither the wrong block of the next touch, nor again the right one
    for instruction in (TOUCH + RED, TOUCH + BLUE):
        again = state._replace(
            table=state.table._replace(instruction=jnp.int32(instruction)),
            stale=jnp.arange(4) == BLUE,
        )
        again, transition, rewards = step_until(again, DOWN, 2)
        assert not transition.terminated
        assert sum(rewards) == 0
    # it counts after the hand has left it
    left, _, _ = step_until(again, UP, 2)
    _, _, rewards = step_until(left, DOWN, 3)
    assert sum(rewards) == 1


def test_a_wrong_block_that_is_let_go_over_the_plate_is_not_placed_there():
    state = hand_made(PLACE + RED, BLUE, held=True, height=0.1)
    plate = state.table.blocks[BLUE, :2]
    state = state._replace(table=state.table._replace(plate=plate), stale=jnp.arange(4) == BLUE)
    _, transition, rewards = step_until(state, jnp.array([0, 0, 0, 0, 0, 0, 1.0]), 2)
    assert not transition.terminated
    assert sum(rewards) == 0


def test_the_expert_turns_the_other_way_where_the_hand_cannot_turn_further():
    state = hand_made(LIFT + BLUE, BLUE)
    table = state.table._replace(
        turns=jnp.array([0.0, 0.0, 1.0]), yaws=jnp.full(4, -1.0), tool=jnp.array([0, 0, 0.15])
    )
    env = chain_env.make(SHORT)
    assert env.expert(state._replace(table=table))[5] < 0
    near = table._replace(yaws=jnp.full(4, 0.9))
    assert -0.6 < env.expert(state._replace(table=near))[5] < 0


def test_average_length_is_the_sum_of_the_rates_as_calvin_reports_it():
    done = np.array([[0, 1, 5, 5], [2, 2, 2, 2]])
    rates = chain_script.in_a_row(done, 5)
    np.testing.assert_allclose(rates, [[0.75, 0.5, 0.5, 0.5, 0.5], [1, 1, 0, 0, 0]])
    np.testing.assert_allclose(rates.sum(axis=1), done.mean(axis=1))


def test_the_table_is_whole_in_a_terminal_of_80_columns():
    rates, average = [[0.962, 0.93, 0.9, 0.87, 0.005]] * 2, [4.43, 4.57]
    score = chain_script.ChainScore("lstm_periodic", False, rates, average, 1.0, {})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(chain_script.table([score]))
    (row,) = [line for line in console.export_text().splitlines() if "lstm" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:2] == ["lstm_periodic", "96 %"]
    assert cells[-1] == "4.50 [4.43, 4.57]"


def test_demonstrations_tell_the_instruction_of_each_step():
    env = env_of(False)
    demonstrations = collect(env, jax.random.key(2), 4, noise=0.0)
    now, length = np.asarray(demonstrations.instruction), np.asarray(demonstrations.length)
    for row, end in zip(now, length, strict=True):
        assert np.sum(np.diff(row[:end]) != 0) == 4
    np.testing.assert_array_equal(_age(np.array([[3, 3, 5, 5, 5, 3]])), [[0, 1, 0, 1, 2, 0]])


@pytest.mark.slow
def test_policies_are_trained_and_tested_and_earlier_results_are_kept(tmp_path, capsys):
    config = ChainsConfig(
        policies=("fc", "lstm_refresh", "lstm_periodic"), num_chains=4,
        cloning=CloningConfig(num_seeds=2, num_demonstrations=16, num_updates=1, batch_size=2,
                              hidden_size=8, recall_weight=0.0),
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    run_dir = chain_script.chain_suite(config)
    lines = [*map(json.loads, (run_dir / chain_script.RESULTS).read_text().splitlines())]
    assert [line["policy"] for line in lines] == list(config.policies)
    shown = capsys.readouterr().err
    assert "lstm_refresh 1/1 updates  seeds: 2" in shown
    assert "lstm_periodic 1/1" not in shown  # it shares the training
    for line in lines:
        assert np.shape(line["in_a_row"]) == (2, 5)
        np.testing.assert_allclose(np.sum(line["in_a_row"], axis=1), line["average"])
    chain_script.chain_suite(config)
    assert len((run_dir / chain_script.RESULTS).read_text().splitlines()) == 3


def test_an_earlier_score_is_not_that_of_a_run_that_was_trained_further(tmp_path, monkeypatch):
    first = Run(tmp_path, tiny_run.AGENT, tiny_run.norm_stats(), tiny_run.params(), None, 1)
    config = ChainsConfig(run="runs/mine", num_chains=2, run_dir=str(tmp_path / "chains"))
    played = []
    monkeypatch.setattr(
        chain_script, "_play_run", lambda env, run, config: played.append(run) or np.ones((1, 2))
    )
    longer, retrained = first._replace(step=2), first._replace(params=tiny_run.params(1))
    for run in (first, first, longer, first, retrained):
        monkeypatch.setattr(chain_script, "_load", lambda env, config, run=run: run)
        chain_script.chain_suite(config)
    assert [id(run) for run in played] == [id(run) for run in (first, longer, retrained)]


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="unknown name 'lstn' in policies"):
        ChainsConfig(policies=("lstn",))
    with pytest.raises(ValueError, match="mode must be None without run"):
        ChainsConfig(mode="refresh")


def test_a_weight_of_recall_is_refused_before_anything_is_deleted():
    with pytest.raises(ValueError, match=r"recall_weight must be 0, since chains have no recall"):
        ChainsConfig(cloning=CloningConfig())
