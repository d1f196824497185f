"""Lock of a run folder: one process at a time trains in it."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from vla_jax import folder_lock
from vla_jax.files import Path
from vla_jax.training.parallel import is_first_process

NAME = ".lock"  # file in a run folder
_ELSE = "choose another --run-dir"


class HasRunDir(Protocol):
    """A config of a script that writes a run folder."""

    @property
    def run_dir(self) -> str:
        """Returns the output folder of the run."""
        ...


Config = TypeVar("Config", bound=HasRunDir)
Result = TypeVar("Result")


def exclusive(script: Callable[[Config], Result]) -> Callable[[Config], Result]:
    """Returns a script that holds the lock of its config's `run_dir` while it runs.

    A second process that is started on the same folder ends with an error, and changes nothing.

    Args:
      script: takes a config with a field `run_dir`.
    """

    @functools.wraps(script)
    def locked(config: Config) -> Result:
        with in_use(config.run_dir):
            return script(config)

    return locked


@contextlib.contextmanager
def in_use(run_dir: Path) -> Iterator[None]:
    """Holds the lock of a run folder; a folder that is still empty at the end is removed.

    Args:
      run_dir: folder of the run; created if necessary.

    Raises:
      BlockingIOError: another process holds the lock.
      OSError: the folder cannot be written.
    """
    path = pathlib.Path(run_dir)
    if not is_first_process():
        yield
        return
    check_writable(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with folder_lock.hold(path / NAME, f"run_dir {path}", _ELSE):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


def check_writable(path: pathlib.Path) -> None:
    """Raises an OSError if a folder cannot be written or created."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"run_dir {path} cannot be written; choose another --run-dir.")
