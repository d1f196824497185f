"""Arrays that worker processes map from a file instead of receiving a copy each."""

import tempfile
import threading
from typing import Any

import numpy as np

MIN_BYTES = 2**20  # smaller arrays are copied


class SharedArrays:
    """Large arrays of one object, written to temporary files when the object is first pickled.

    The files are removed with this object, which must outlive the processes that map them. Safe to
    share by threads.
    """

    def __init__(self) -> None:
        """Writes nothing."""
        self._lock = threading.Lock()
        self._files: dict[int, tuple[np.ndarray, Any]] = {}  # id of the array -> array, file

    def detach(self, array: Any) -> Any:
        """Returns the place of an array in a file for `attach`, or a small array itself."""
        if isinstance(array, np.memmap):
            return array.filename, array.dtype, array.offset, array.shape
        if not isinstance(array, np.ndarray) or array.nbytes < MIN_BYTES:
            return array
        with self._lock:
            if id(array) not in self._files:
                try:
                    file = tempfile.NamedTemporaryFile(prefix="vla_jax_")  # noqa: SIM115
                    array.tofile(file.name)
                except OSError:  # no space: every process gets a copy
                    return array
                self._files[id(array)] = array, file
            return self._files[id(array)][1].name, array.dtype, 0, array.shape


def attach(item: Any) -> Any:
    """Returns an array as a read-only memory map of the place that `detach` gave."""
    if isinstance(item, tuple):
        filename, dtype, offset, shape = item
        return np.memmap(filename, dtype, "r", offset, shape)
    return item
