"""The choice of the cases of a sampled test that run in `make test` and in `make test-slow`."""

import zlib
from typing import Literal

SAMPLING = 4  # one in this many cases of a test is fast

Tier = Literal["fast", "slow", "exhaustive"]


def tiers(name: str, num_cases: int, sample: str) -> list[Tier]:
    """Returns the tier of each case of a test.

    Every fourth case is fast, others for each test. The rest is slow if `sample` is empty.
    Otherwise another fourth, which `sample` chooses, is slow, and the rest is exhaustive.

    Args:
      name: of the test.
      num_cases: of the test.
      sample: such as the hash of a commit.
    """
    size = min(SAMPLING, num_cases)
    first = zlib.crc32(name.encode()) % size
    second = 1 + zlib.crc32((name + sample).encode()) % max(size - 1, 1)
    found: list[Tier] = []
    for index in range(num_cases):
        place = (index - first) % size
        if place == 0:
            found.append("fast")
        else:
            found.append("slow" if not sample or place == second else "exhaustive")
    return found
