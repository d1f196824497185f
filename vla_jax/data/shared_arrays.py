"""Arrays that worker processes map from a file instead of receiving a copy each."""

import contextlib
import os
import tempfile
import threading
import weakref
from typing import Any

import numpy as np

MIN_BYTES = 2**20  # smaller arrays are copied


class SharedArrays:
    """Large arrays of one object, written to temporary files when the object is first pickled.

    The files have no name, so that none is left behind if the program is killed: other processes
    open them as descriptors of this process, which must outlive them. Safe to share by threads.
    """

    def __init__(self) -> None:
        """Writes nothing."""
        self._lock = threading.Lock()
        self._files: dict[int, tuple[np.ndarray, str]] = {}  # id of the array -> array, file name
        self._open = contextlib.ExitStack()
        weakref.finalize(self, self._open.close)

    def detach(self, array: Any) -> Any:
        """Returns the place of an array in a file for `attach`, or a small array itself."""
        if isinstance(array, np.memmap):
            return array.filename, array.dtype, array.offset, array.shape
        if not isinstance(array, np.ndarray) or array.nbytes < MIN_BYTES:
            return array
        with self._lock:
            if id(array) not in self._files:
                name = self._write(array)
                if name is None:
                    return array
                self._files[id(array)] = array, name
            return self._files[id(array)][1], array.dtype, 0, array.shape

    def _write(self, array: np.ndarray) -> str | None:
        """Returns the name of a file with an array; None if each process has to get a copy."""
        if not os.path.isdir("/proc/self/fd"):  # outside Linux
            return None
        try:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(tempfile.TemporaryFile(prefix="vla_jax_"))
                array.tofile(file)
                self._open.push(stack.pop_all())
        except OSError:  # no space
            return None
        return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def attach(item: Any) -> Any:
    """Returns an array as a read-only memory map of the place that `detach` gave."""
    if isinstance(item, tuple):
        filename, dtype, offset, shape = item
        return np.memmap(filename, dtype, "r", offset, shape)
    return item
