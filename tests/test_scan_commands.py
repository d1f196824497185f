"""SCAN as published: number of commands, splits, and the actions of single commands."""

import collections

import numpy as np
import pytest

from vla_jax.data import scan_commands

ACTIONS_OF = dict(scan_commands.commands())
COUNTS = {
    "simple": (16_728, 4_182),
    "length": (16_990, 3_920),
    "addprim_jump": (14_670, 7_706),
    "addprim_turn_left": (21_890, 1_208),
}
each_split = pytest.mark.parametrize("name", COUNTS)

# Pairs from the paper, and others derived by hand from the grammar.
PUBLISHED = {
    "jump": "JUMP",
    "jump left": "LEFT JUMP",
    "jump around right": "RIGHT JUMP RIGHT JUMP RIGHT JUMP RIGHT JUMP",
    "turn left twice": "LEFT LEFT",
    "jump thrice": "JUMP JUMP JUMP",
    "jump opposite left and walk thrice": "LEFT LEFT JUMP WALK WALK WALK",
    "jump opposite left after walk around left": (
        "LEFT WALK LEFT WALK LEFT WALK LEFT WALK LEFT LEFT JUMP"
    ),
    "jump twice after look left": "LEFT LOOK JUMP JUMP",
    "run after run left": "LEFT RUN RUN",
    "look opposite right thrice and walk left": (
        "RIGHT RIGHT LOOK RIGHT RIGHT LOOK RIGHT RIGHT LOOK LEFT WALK"
    ),
    "run left thrice and walk twice": "LEFT RUN LEFT RUN LEFT RUN WALK WALK",
    "run opposite right and turn opposite right": "RIGHT RIGHT RUN RIGHT RIGHT",
    "turn opposite left after walk opposite left thrice": (
        "LEFT LEFT WALK LEFT LEFT WALK LEFT LEFT WALK LEFT LEFT"
    ),
    "turn opposite left thrice and walk around right": (
        "LEFT LEFT LEFT LEFT LEFT LEFT RIGHT WALK RIGHT WALK RIGHT WALK RIGHT WALK"
    ),
    "turn around right twice": "RIGHT RIGHT RIGHT RIGHT RIGHT RIGHT RIGHT RIGHT",
    "turn left and turn right after": None,
    "jump around": None,
    "turn": None,
    "walk twice thrice": None,
    "walk and run after look": None,
}


@pytest.mark.parametrize("command", PUBLISHED)
def test_commands_have_the_published_actions_and_others_are_invalid(command):
    actions = PUBLISHED[command]
    if actions is None:
        assert command not in ACTIONS_OF
        return
    for turn in ("LEFT", "RIGHT"):
        actions = actions.replace(turn, f"TURN_{turn}")
    assert ACTIONS_OF[command] == " ".join(f"I_{action}" for action in actions.split())


def test_there_are_20910_commands_of_up_to_9_words_and_48_actions():
    assert len(scan_commands.commands()) == len(ACTIONS_OF) == 20_910
    assert max(len(command.split()) for command in ACTIONS_OF) == 9
    assert max(len(actions.split()) for actions in ACTIONS_OF.values()) == 48
    assert {word for command in ACTIONS_OF for word in command.split()} == set(scan_commands.WORDS)
    assert {act for actions in ACTIONS_OF.values() for act in actions.split()} == set(
        scan_commands.ACTIONS
    )


@each_split
def test_splits_have_the_published_sizes_and_are_disjoint(name):
    train, test = scan_commands.split(name)
    assert (len(train), len(test)) == COUNTS[name]
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(scan_commands.commands())
    assert len(set(test)) == len(test)


def test_the_length_split_trains_up_to_22_actions_and_tests_from_24():
    train, test = (
        [len(pair.actions.split()) for pair in part] for part in scan_commands.split("length")
    )
    assert max(train) == 22
    assert min(test) == 24


@pytest.mark.parametrize(
    ("name", "bare", "copies"),
    [("addprim_jump", "jump", 1_467), ("addprim_turn_left", "turn left", 2_189)],
)
def test_a_new_primitive_is_trained_alone_and_tested_in_combinations(name, bare, copies):
    train, test = scan_commands.split(name)
    with_word = collections.Counter(pair.command for pair in train if bare in pair.command)
    assert with_word == {bare: copies}
    assert all(bare in pair.command for pair in test)


def test_the_simple_split_depends_on_the_seed():
    assert scan_commands.split("simple", seed=1) == scan_commands.split("simple", seed=1)
    assert set(scan_commands.split("simple", seed=1)[1]) != set(scan_commands.split("simple")[1])


def test_held_out_commands_are_not_trained_on_and_single_words_are_kept():
    train, _ = scan_commands.split("addprim_jump")
    kept, held = scan_commands.hold_out(train, 0.1)
    assert sorted(kept + held) == sorted(train)
    assert not set(kept) & set(held)
    assert len(held) == round(0.1 * len(set(train)))
    assert sum(pair.command == "jump" for pair in kept) == 1_467
    assert scan_commands.hold_out(train, 0.0) == (train, [])


def test_ids_are_indices_and_convert_back_to_text():
    pairs = [
        scan_commands.Pair("jump left", "I_TURN_LEFT I_JUMP"),
        scan_commands.Pair("walk", "I_WALK"),
    ]
    ids = scan_commands.to_ids(pairs)
    left = 1 + scan_commands.WORDS.index("left")
    np.testing.assert_array_equal(ids.source, [[4, left], [1, 0]])
    np.testing.assert_array_equal(ids.target, [[5, 4, 0], [1, 0, 0]])
    for pair, source, target in zip(pairs, *ids, strict=True):
        assert scan_commands.to_text(source, scan_commands.WORDS) == pair.command
        assert scan_commands.to_text(target, scan_commands.ACTIONS) == pair.actions


def test_unknown_splits_and_words_are_refused():
    with pytest.raises(ValueError, match=r"unknown split 'addprim_jum'; .* Did you mean 'add"):
        scan_commands.split("addprim_jum")
    with pytest.raises(ValueError, match="unknown word 'hop'; choose from walk, look"):
        scan_commands.to_ids([scan_commands.Pair("hop", "I_JUMP")])
