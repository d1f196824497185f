"""Least-recently-used cache of decoded images, bounded in bytes and safe to share by threads."""

import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np


class FrameCache:
    """Decoded pieces of videos; the least recently used ones are removed first.

    The cache never exceeds its capacity. A piece larger than the capacity is not stored.
    A pickled cache is empty: each worker process has a cache of the same capacity.
    """

    def __init__(self, capacity: int) -> None:
        """Creates an empty cache.

        Args:
          capacity: bytes of images to store at most.
        """
        self.capacity = capacity
        self._lock = threading.Lock()
        self._pieces: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of stored images."""
        return self._num_bytes

    def get(self, key: Hashable) -> np.ndarray | None:
        """Returns the images of a piece, or None if they are not stored."""
        with self._lock:
            images = self._pieces.get(key)
            if images is not None:
                self._pieces.move_to_end(key)
            return images

    def put(self, key: Hashable, images: np.ndarray) -> None:
        """Stores the images of a piece, if it fits; removes other pieces to make room.

        Args:
          key: identifies the piece.
          images: `[num_frames, h, w, 3]` uint8, not changed afterwards; must own its memory, or
            more than its bytes would stay allocated.
        """
        if images.nbytes > self.capacity:
            return
        with self._lock:
            previous = self._pieces.pop(key, None)  # another thread may have decoded it as well
            self._num_bytes -= 0 if previous is None else previous.nbytes
            while self._num_bytes + images.nbytes > self.capacity:
                self._num_bytes -= self._pieces.popitem(last=False)[1].nbytes
            self._pieces[key] = images
            self._num_bytes += images.nbytes

    def __reduce__(self) -> tuple[type["FrameCache"], tuple[int]]:
        """Pickles the capacity only."""
        return FrameCache, (self.capacity,)
