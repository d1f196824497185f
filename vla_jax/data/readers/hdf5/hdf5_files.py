"""Opening of HDF5 files: one handle per thread and file, a bounded number of them, clear errors."""

import collections
import contextlib
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

MAX_OPEN_FILES = 16  # per thread
METADATA_BYTES = 2**23  # of a file's cache, by the size on disk; 12 times as much in memory
SUFFIXES = (".hdf5", ".h5")


class OpenFiles:
    """Handles of HDF5 files, opened when they are first used in a thread of a process.

    Handles can be neither pickled nor used in a forked process; a copy in another process opens
    its own. Each thread has its own handles, so that none is closed while another thread reads.
    """

    def __init__(self) -> None:
        """Opens nothing."""
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """Returns a state without handles."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts without handles."""
        self._local = threading.local()

    def get(self, path: pathlib.Path) -> Any:
        """Returns the open `h5py.File` of a path, read only.

        Raises:
          ImportError: h5py is missing.
          FileNotFoundError: there is no such file.
          ValueError: the file is damaged, or not HDF5.
        """
        if getattr(self._local, "process", None) != os.getpid():
            self._local.process = os.getpid()
            self._local.files = collections.OrderedDict()
        files = self._local.files
        if path in files:
            files.move_to_end(path)
            return files[path]
        while len(files) >= MAX_OPEN_FILES:
            files.popitem(last=False)[1].close()
        files[path] = open_file(path)
        return files[path]


def import_h5py() -> Any:
    """Returns the package h5py; ImportError if it is missing."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "reading HDF5 files needs h5py; install it with `pip install 'vla-jax[data]'`."
        ) from error
    return h5py


def open_file(path: pathlib.Path) -> Any:
    """Opens an HDF5 file for reading; errors as for `OpenFiles.get`."""
    h5py = import_h5py()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected an HDF5 file; restore it.")
    with reading(path, "its header"):
        file = h5py.File(path, "r", locking="best-effort")
        cache = file.id.get_mdc_config()
        cache.set_initial_size, cache.initial_size, cache.max_size = True, 2**21, METADATA_BYTES
        file.id.set_mdc_config(cache)
        return file


@contextlib.contextmanager
def reading(path: pathlib.Path, part: str) -> Iterator[None]:
    """Turns every error of the HDF5 library inside the block into one sentence.

    Args:
      path: file that is read.
      part: what is read, as it appears in the message.

    Raises:
      ValueError: the block failed.
    """
    try:
        yield
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError,
            MemoryError, AttributeError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{path}: {part} cannot be read ({reason}); restore the file from its source."
        ) from error


def hdf5_paths(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the HDF5 files of a data set: the file itself, or those in a folder by name.

    Files whose name starts with a dot are no data.
    """
    if path.is_file():
        return [path] if path.suffix in SUFFIXES or is_hdf5(path) else []
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        names = [e.name for e in entries if e.name.endswith(SUFFIXES) and e.name[0] != "."]
    return [path / name for name in sorted(names) if (path / name).is_file()]


def is_hdf5(path: pathlib.Path) -> bool:
    """Returns True if a file begins as HDF5 files do."""
    with open(path, "rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"
