"""Commands in forked children of a process that has imported their modules: cheap starts.

A child runs `python -m MODULE …` as `runpy` does, in a process group of its own, with its own
devices and threads: the parent imports, and never computes. Programs are compiled once for all
children, into a cache of compiled programs that they share.
"""

import contextlib
import importlib
import multiprocessing
import os
import pathlib
import resource
import runpy
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
_CONTEXT = multiprocessing.get_context("fork")
_SLOW = ("orbax.checkpoint", "grain", "tyro")  # that scripts import in their functions
_POLL = 0.002  # s between two looks at a folder


class Limits(NamedTuple):
    """Limits of a child."""

    file_bytes: int | None = None  # size of every file that it writes; None = none
    user: int | None = None  # id of the user that it runs as; None = the parent's


UNLIMITED = Limits()


class Command:
    """A command that runs in a forked child."""

    def __init__(self, words: list[str], log: pathlib.Path, limits: Limits = UNLIMITED) -> None:
        """Starts the command.

        Args:
          words: module and arguments, as after `python -m`.
          log: file for its output.
          limits: of the child.
        """
        self._log = log
        if sys.path[0] != str(ROOT):  # as `python -m` in that folder has it
            sys.path.insert(0, str(ROOT))
        for name in (*_SLOW, words[0]):
            importlib.import_module(name)
        sys.modules.pop(words[0])  # the child runs it anew
        self._process = _CONTEXT.Process(target=_run_module, args=(words, log, limits))
        _start(self._process)
        while os.getpgid(self._process.pid or 0) != self._process.pid:
            time.sleep(_POLL)

    def wait(self, seconds: float | None = None) -> bool:
        """Waits; returns False if the command still runs after so many seconds.

        Raises:
          RuntimeError: the command ended with an error.
        """
        self._process.join(seconds)
        if self._process.exitcode:
            raise RuntimeError(f"exit {self._process.exitcode}: {self.output()[-2000:]}")
        return self._process.exitcode is not None

    def end(self, seconds: float | None = None) -> int | None:
        """Waits; returns the exit code, None if the command still runs after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def output(self) -> str:
        """Returns what the command has printed."""
        return self._log.read_text(errors="replace")

    def wait_for(self, happened: Callable[[], bool]) -> bool:
        """Waits until something happened; returns False if the command ended before, with success.

        Raises:
          RuntimeError: the command ended with an error.
        """
        while not happened():
            if self.wait(_POLL):
                return False
        return True

    def kill(self) -> bool:
        """Kills the process group (SIGKILL); returns False if it had ended with success before."""
        return not self.wait(0) and kill_together([self])


def kill_together(commands: list[Command]) -> bool:
    """Kills commands at once (SIGKILL); returns False if none of them ran any more."""
    running = [command._process for command in commands if command._process.is_alive()]
    for process in running:
        os.killpg(process.pid or 0, signal.SIGKILL)
    for process in running:
        process.join()
    return any(process.exitcode == -signal.SIGKILL for process in running)


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Lets all children share compiled programs, in a temporary folder; before JAX is imported."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Returns the result of a function, called in a forked child.

    Raises:
      RuntimeError: the function failed.
    """
    receive, send = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send, args=(send, function, args))
    _start(process)
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        raise RuntimeError(f"{function} failed; see the traceback above.") from None
    finally:
        process.join()
    return result


def _start(process: Any) -> None:
    with warnings.catch_warnings():  # JAX and Python warn of any fork; the parent never computes
        warnings.filterwarnings("ignore", ".*fork", RuntimeWarning)
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        process.start()


def _run_module(words: list[str], log: pathlib.Path, limits: Limits) -> None:
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limits.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    if limits.user is not None:
        os.setgid(limits.user)
        os.setuid(limits.user)
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _send(send: connection.Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    send.send(function(*args))
    send.close()
