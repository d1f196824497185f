"""Places of the windows of a data set, computed from the lengths of its episodes."""

from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.raw import steps_of


class WindowIndex(NamedTuple):
    """Episode and last step of every window.

    Windows of an episode of `T` steps end at T-1, T-1-stride, … ≥ 0, so that with stride ≥ T
    the episode is one window.
    """

    lengths: np.ndarray  # [E] int64, T of each episode
    ends: np.ndarray  # [E] int64, windows of the episodes up to and with each
    stride: int  # environment steps

    def place(self, index: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns episode and last step `[...]` of windows.

        Args:
          index: an integer, a slice, or an array of integers `[...]`, negative ones from the end.

        Raises:
          IndexError: there is no such window.
        """
        windows = steps_of(index, int(self.ends[-1]))
        episode = np.searchsorted(self.ends, windows, side="right")
        following = self.ends[episode] - 1 - windows  # windows of the episode behind each
        return episode, self.lengths[episode] - 1 - following * self.stride


def window_index(episode_ends: np.ndarray, stride: int) -> WindowIndex:
    """Returns the places of all windows.

    Args:
      episode_ends: `[E]`, exclusive.
      stride: environment steps between the ends of consecutive windows.
    """
    lengths = np.diff(episode_ends, prepend=0)
    return WindowIndex(lengths, np.cumsum(-(-lengths // stride)), stride)
