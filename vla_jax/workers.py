"""Worker processes that only the process that starts them ends.

Schedulers send SIGTERM to every process of a job, and a terminal Ctrl-C. A worker that ended by it
would look like one that was killed for lack of memory, before its parent has saved anything.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import popen_spawn_posix, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess

from vla_jax import stopping


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes and threads that are started inside the block get neither SIGTERM nor Ctrl-C.

    SIGKILL alone ends such a process from outside. This process gets the signals as before.
    """
    # It would be started with the first process, and would remove the mask.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Ends this worker process as soon as its parent has ended, by SIGKILL too."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class _Popen(popen_spawn_posix.Popen):
    """The handle of a process that would not get the SIGTERM of `terminate`.

    Python calls it at its end for every daemon, and then waits for all of them.
    """

    def terminate(self) -> None:
        """Kills the process."""
        self.kill()


class _Worker(SpawnProcess):
    """A process that gets no signals, and ends with its parent."""

    _Popen = _Popen  # pyright: ignore[reportAssignmentType]

    def start(self) -> None:
        """Starts the process."""
        with shielded():
            super().start()

    def run(self) -> None:
        """Runs in the process."""
        end_with_parent()
        super().run()


class WorkerContext(SpawnContext):
    """Starts workers, as `multiprocessing.get_context("spawn")` starts processes.

    A fork of a process that runs threads of JAX, PyAV or Arrow may hang.
    """

    Process = _Worker  # pyright: ignore[reportAssignmentType]


CONTEXT = WorkerContext()


def kill_all() -> None:
    """Kills the processes of `CONTEXT` that this process has started."""
    for process in multiprocessing.active_children():
        if isinstance(process, _Worker):
            process.kill()
