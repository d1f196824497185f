"""The choice of the cases of a sampled test that run in `make test` and in `make test-slow`."""

import hashlib
from collections.abc import Sequence
from typing import Literal

Tier = Literal["fast", "slow", "exhaustive"]


def tiers(name: str, num_cases: int, sample: str, *, is_long: bool = False) -> list[Tier]:
    """Returns the tier of each case of a test.

    One case in twelve is fast, others for each test. The rest is slow if `sample` is empty.
    Otherwise one in twelve of the rest, which `sample` chooses, is slow, and the others are
    exhaustive. Of a long test no case is fast, and one in six is slow, the same for all tests of a
    file, which often share a training for each case; a single case is slow for every third sample.

    Args:
      name: of the test.
      num_cases: of the test.
      sample: such as the hash of a commit.
      is_long: each case of the test takes many seconds.
    """
    every = range(num_cases)
    fast = set() if is_long else _choose(every, 12, name)
    rest = [case for case in every if case not in fast]
    slow = set(rest)
    if sample and is_long and num_cases == 1:
        slow = set(rest) if _hash(name + sample)[0] % 3 == 0 else set()
    elif sample and is_long:
        slow = _choose(rest, 6, name.partition("::")[0] + sample)
    elif sample:
        slow = _choose(rest, 12, name + sample)
    return ["fast" if case in fast else "slow" if case in slow else "exhaustive" for case in every]


def _choose(cases: Sequence[int], share: int, text: str) -> set[int]:
    """Returns one in so many of the cases, at least one: the first in the order of their hashes.

    Cases at a fixed distance would share the values of some of their parameters.
    """
    by_hash = sorted(cases, key=lambda case: _hash(f"{text} {case}"))
    return set(by_hash[: -(-len(cases) // share)])


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
