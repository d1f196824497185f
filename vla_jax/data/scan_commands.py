"""SCAN: commands of a small English grammar, and the corresponding action sequences.

    "jump twice after look left"  ->  "I_TURN_LEFT I_LOOK I_JUMP I_JUMP"

A command is a clause, or two clauses joined by `and` or `after`; a clause is a phrase, optionally
with `twice` or `thrice`; a phrase is a verb, optionally with a direction and `opposite` or
`around`. There are 34 phrases, 102 clauses and 102 + 2·102² = 20,910 commands.

Source: Lake and Baroni 2018, "Generalization without Systematicity" (arXiv:1711.00350), grammar
(figure 6) and interpretation function (figure 7); the published file has the same lines.
"""

import collections
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from vla_jax.config import did_you_mean

VERBS = {"walk": "I_WALK", "look": "I_LOOK", "run": "I_RUN", "jump": "I_JUMP"}
TURNS = {"left": "I_TURN_LEFT", "right": "I_TURN_RIGHT"}
TIMES = {"twice": 2, "thrice": 3}
WORDS = (*VERBS, "turn", *TURNS, "opposite", "around", *TIMES, "and", "after")
ACTIONS = (*VERBS.values(), *TURNS.values())

Split = Literal["simple", "length", "addprim_jump", "addprim_turn_left"]
MAX_TRAIN_ACTIONS = 22  # actions per training command of split "length"
_SIMPLE_TRAIN = 16_728  # training commands of split "simple": 80 %, as published


class Pair(NamedTuple):
    """A command and its actions."""

    command: str  # words separated by blanks
    actions: str  # names of actions separated by blanks


class Ids(NamedTuple):
    """Pairs as ids, one pair per row, padded with 0."""

    source: np.ndarray  # [num_pairs, S] int32, 1 + index in WORDS; 0 after the last word
    target: np.ndarray  # [num_pairs, T] int32, 1 + index in ACTIONS; 0 after the last, at least one


def commands() -> list[Pair]:
    """Returns all 20,910 commands with their actions, in a fixed order."""
    clauses = _clauses()
    pairs = [Pair(command, _join(actions)) for command, actions in clauses]
    for (left, left_actions), (right, right_actions) in itertools.product(clauses, repeat=2):
        pairs.append(Pair(f"{left} and {right}", _join(left_actions + right_actions)))
        pairs.append(Pair(f"{left} after {right}", _join(right_actions + left_actions)))
    return pairs


def split(name: Split, *, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Returns training and test set of a split.

    - "simple": random, 80 % and 20 % (16,728 and 4,182 commands);
    - "length": up to 22 actions, and more than 22 (16,990 and 3,920);
    - "addprim_jump": commands without `jump`, plus the bare `jump` repeated to a tenth of the
      training set (1,467 of 14,670); all other commands with `jump` (7,706);
    - "addprim_turn_left": the same with `turn left` (2,189 of 21,890; 1,208).

    Args:
      name: one of the four.
      seed: random seed of "simple"; the published split is another one of the same sizes.

    Raises:
      ValueError: there is no such split.
    """
    if name not in get_args(Split):
        raise ValueError(f"unknown split '{name}'; {did_you_mean(name, get_args(Split))}")
    pairs = commands()
    if name == "simple":
        order = np.random.default_rng(seed).permutation(len(pairs))
        shuffled = [pairs[i] for i in order]
        return shuffled[:_SIMPLE_TRAIN], shuffled[_SIMPLE_TRAIN:]
    if name == "length":
        return _part(pairs, [len(pair.actions.split()) <= MAX_TRAIN_ACTIONS for pair in pairs])
    primitive = name.removeprefix("addprim_").replace("_", " ")
    train, test = _part(pairs, [primitive not in pair.command for pair in pairs])
    (bare,), test = _part(test, [pair.command == primitive for pair in test])
    return train + [bare] * round(len(train) / 9), test


def hold_out(
    pairs: Sequence[Pair], fraction: float, *, seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """Splits a training set at random into training and validation set.

    Args:
      pairs: the training set; repeated pairs stay in it.
      fraction: fraction of its distinct commands to hold out, in [0, 1).
      seed: random seed.

    Returns:
      The remaining pairs, and those held out.
    """
    counts = collections.Counter(pairs)
    once = [pair for pair in counts if counts[pair] == 1]
    order = np.random.default_rng(seed).permutation(len(once))
    held_out = {once[i] for i in order[: round(fraction * len(counts))]}
    return _part(pairs, [pair not in held_out for pair in pairs])


def to_ids(pairs: Sequence[Pair]) -> Ids:
    """Returns the pairs as ids, padded to the longest.

    Args:
      pairs: at least one.

    Raises:
      ValueError: an unknown word or action.
    """
    sources = [_indices(pair.command, WORDS) for pair in pairs]
    targets = [[*_indices(pair.actions, ACTIONS), 0] for pair in pairs]
    return Ids(_rows(sources), _rows(targets))


def to_text(ids: np.ndarray, names: Sequence[str]) -> str:
    """Returns the words or actions of one row of ids, up to the first 0.

    Args:
      ids: `[S]`.
      names: `WORDS` or `ACTIONS`.
    """
    indices: list[int] = [int(i) for i in itertools.takewhile(bool, ids)]
    return " ".join(names[i - 1] for i in indices)


def _phrases() -> list[tuple[str, tuple[str, ...]]]:
    phrases = [(verb, (action,)) for verb, action in VERBS.items()]
    for verb, (side, turn) in itertools.product((*VERBS, "turn"), TURNS.items()):
        act = (VERBS[verb],) if verb in VERBS else ()
        phrases += [
            (f"{verb} {side}", (turn, *act)),
            (f"{verb} opposite {side}", (turn, turn, *act)),
            (f"{verb} around {side}", (turn, *act) * 4),
        ]
    return phrases


def _clauses() -> list[tuple[str, tuple[str, ...]]]:
    phrases = _phrases()
    repeated = [(f"{p} {word}", actions * n) for p, actions in phrases for word, n in TIMES.items()]
    return phrases + repeated


def _join(actions: tuple[str, ...]) -> str:
    return " ".join(actions)


def _part(pairs: Sequence[Pair], mask: Sequence[bool]) -> tuple[list[Pair], list[Pair]]:
    rest = [not selected for selected in mask]
    return list(itertools.compress(pairs, mask)), list(itertools.compress(pairs, rest))


def _indices(text: str, names: Sequence[str]) -> list[int]:
    for word in text.split():
        if word not in names:
            raise ValueError(f"unknown word '{word}'; {did_you_mean(word, names)}")
    return [1 + names.index(word) for word in text.split()]


def _rows(ids: Sequence[Sequence[int]]) -> np.ndarray:
    rows = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, numbers in zip(rows, ids, strict=True):
        row[: len(numbers)] = numbers
    return rows
