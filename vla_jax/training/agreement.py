"""Decisions of all processes together that do not cost a collective in every update."""

import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

INTERVAL = 1.0  # s between two votes, about


class Votes:
    """Asks all processes about once a second, at the same updates, whether to stop.

    The next update to ask at follows from the duration of the last ones, which the processes tell
    each other with their votes. A process alone is asked at every update.
    """

    def __init__(self, step: int) -> None:
        """Starts after `step` updates."""
        self._last, self._next = step, step + 1
        self._time, self._seconds = time.monotonic(), np.inf  # of the last vote; s per update

    def any(self, step: int, flag: bool, after: Any) -> bool:
        """Returns True if the flag is True in any process; all of them must call it.

        Args:
          step: number of the update, from 1; called for each of them.
          flag: of this process.
          after: arrays of the update, for which the vote waits: on CPUs, two programs with
            collectives would otherwise run at a time.
        """
        if jax.process_count() == 1:
            return flag
        if step < self._next:
            return False
        jax.block_until_ready(after)
        own = np.array([flag, self._seconds], np.float32)
        votes = np.asarray(multihost_utils.process_allgather(own))  # [processes, 2]
        now, num_updates = time.monotonic(), step - self._last
        until_next = np.clip(INTERVAL / votes[:, 1].max(), 1, 2 * num_updates)
        self._seconds, self._time = (now - self._time) / num_updates, now
        self._last, self._next = step, step + int(until_next)
        return bool(votes[:, 0].any())
