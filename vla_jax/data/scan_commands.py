"""SCAN: commands in a small English, and the actions that they mean.

    "jump twice after look left"  ->  "I_TURN_LEFT I_LOOK I_JUMP I_JUMP"

A command is one clause, or two joined by `and` or `after`; a clause is a phrase, once, `twice` or
`thrice`; a phrase is a verb, where it may be turned to, and how. That makes 34 phrases, 102
clauses, 102 + 2·102² = 20,910 commands.

Source: Lake and Baroni 2018, "Generalization without Systematicity" (arXiv:1711.00350), its
grammar (figure 6 there) and interpretation function (figure 7); their file has the same lines.
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
LONGEST_TRAINED = 22  # actions, of the split "length"
_SIMPLE_TRAIN = 16_728  # commands: four in five, as published


class Pair(NamedTuple):
    """A command and its meaning."""

    command: str  # words with a blank between two
    actions: str  # names with a blank between two


class Ids(NamedTuple):
    """Pairs as numbers, one pair a row, filled up with 0."""

    source: np.ndarray  # [F, S] int32, 1 + place in WORDS; 0 behind the last word
    target: np.ndarray  # [F, K] int32, 1 + place in ACTIONS; 0 behind the last action, at least one


def commands() -> list[Pair]:
    """Returns all 20,910 commands with their actions, in an order that never changes."""
    clauses = _clauses()
    pairs = [Pair(command, _join(actions)) for command, actions in clauses]
    for (one, first), (other, second) in itertools.product(clauses, repeat=2):
        pairs.append(Pair(f"{one} and {other}", _join(first + second)))
        pairs.append(Pair(f"{one} after {other}", _join(second + first)))
    return pairs


def split(name: Split, *, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Returns what to train on, and what to test on.

    - "simple": four fifths and one, at random (16,728 and 4,182);
    - "length": up to 22 actions, and more (16,990 and 3,920);
    - "addprim_jump": all without `jump`, and the bare `jump` as a tenth of the lines (1,467 of
      14,670); whatever else has it (7,706);
    - "addprim_turn_left": the same of `turn left` (2,189 of 21,890; 1,208).

    Args:
      name: one of the four.
      seed: of "simple", whose published lines are another draw of the same size.

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
        return _part(pairs, [len(pair.actions.split()) <= LONGEST_TRAINED for pair in pairs])
    primitive = name.removeprefix("addprim_").replace("_", " ")
    train, test = _part(pairs, [primitive not in pair.command for pair in pairs])
    (bare,), test = _part(test, [pair.command == primitive for pair in test])
    return train + [bare] * round(len(train) / 9), test


def hold_out(
    pairs: Sequence[Pair], share: float, *, seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """Returns the pairs without some of them at random, and those: what to choose settings on.

    Args:
      pairs: the training part; what stands in it more than once stays.
      share: of its commands, in [0, 1).
      seed: of the draw.
    """
    counts = collections.Counter(pairs)
    once = [pair for pair in counts if counts[pair] == 1]
    order = np.random.default_rng(seed).permutation(len(once))
    held = {once[i] for i in order[: round(share * len(counts))]}
    return _part(pairs, [pair not in held for pair in pairs])


def to_ids(pairs: Sequence[Pair]) -> Ids:
    """Returns the pairs as numbers, padded to the longest.

    Args:
      pairs: at least one.

    Raises:
      ValueError: a word or an action is not SCAN's.
    """
    sources = [_places(pair.command, WORDS) for pair in pairs]
    targets = [[*_places(pair.actions, ACTIONS), 0] for pair in pairs]
    return Ids(_rows(sources), _rows(targets))


def to_text(ids: np.ndarray, names: Sequence[str]) -> str:
    """Returns the words or actions of one row, up to the first 0.

    Args:
      ids: `[S]`.
      names: `WORDS` or `ACTIONS`.
    """
    first: list[int] = [int(i) for i in itertools.takewhile(bool, ids)]
    return " ".join(names[i - 1] for i in first)


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


def _part(pairs: Sequence[Pair], kept: Sequence[bool]) -> tuple[list[Pair], list[Pair]]:
    rest = [not keep for keep in kept]
    return list(itertools.compress(pairs, kept)), list(itertools.compress(pairs, rest))


def _places(text: str, names: Sequence[str]) -> list[int]:
    for word in text.split():
        if word not in names:
            raise ValueError(f"unknown word '{word}'; {did_you_mean(word, names)}")
    return [1 + names.index(word) for word in text.split()]


def _rows(ids: Sequence[Sequence[int]]) -> np.ndarray:
    rows = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, numbers in zip(rows, ids, strict=True):
        row[: len(numbers)] = numbers
    return rows
