"""Lock files: one process at a time writes into a folder.

    with folder_lock.hold(run_dir / ".lock", f"run_dir {run_dir}", "choose another --run-dir"):
        ...

The file names host, process and time. It is made by a hard link, which is atomic on network file
systems too; its holder touches it every few seconds. The lock of a process that has ended is taken
over: at once on the same host, and after two minutes without a touch where the process cannot be
seen (another host, or another container).
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from vla_jax import processes
from vla_jax.files import Path, named_errors

_TOUCH_EVERY = 15.0  # s
_SILENCE = 120.0  # s without a touch after which the holder counts as ended
_POLL = 1.0  # s between two attempts to take a lock that is waited for


class Holder(NamedTuple):
    """A process that holds a lock."""

    host: str
    pid: int
    pid_namespace: str  # of Linux; processes of other namespaces cannot be seen
    started: str  # start of the process, in ticks since the start of the system; "" = unknown
    since: str  # local time


@contextlib.contextmanager
def hold(path: Path, what: str, remedy: str, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file for the length of the block.

    Args:
      path: the lock file, in an existing folder.
      what: what is locked, for the error message.
      remedy: what to do instead, for the error message.
      wait: wait until no other process holds the lock, after a warning with that message.

    Raises:
      BlockingIOError: another process holds the lock, and `wait` is False.
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    with named_errors(path):
        text = (_wait_and_acquire if wait else _acquire)(path, what, remedy)
    end = threading.Event()
    thread = threading.Thread(target=_touch, args=(path, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        if _read(path) == text:
            path.unlink(missing_ok=True)


def check(path: Path, what: str, remedy: str) -> None:
    """Raises an error if another process holds the lock; takes nothing.

    Args:
      path: the lock file, which may be absent.
      what: what is locked, for the error message.
      remedy: what to do instead, for the error message.

    Raises:
      BlockingIOError: another process holds the lock.
    """
    path = pathlib.Path(path)
    text = _read(path)
    if text is not None and _is_alive(path, _parse(text)):
        raise _in_use(path, text, what, remedy)


def _wait_and_acquire(path: pathlib.Path, what: str, remedy: str) -> str:
    """As `_acquire`, but waits for another holder."""
    has_warned = False
    while True:
        try:
            return _acquire(path, what, remedy)
        except BlockingIOError as error:
            if not has_warned:
                warnings.warn(f"{error} This process waits for it.", stacklevel=5)
            has_warned = True
            time.sleep(_POLL)


def _acquire(path: pathlib.Path, what: str, remedy: str) -> str:
    """Takes the lock; returns the text of its file."""
    text = json.dumps(_this_process()._asdict()) + "\n"
    unique = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    candidate = path.with_name(f"{path.name}.{unique}.part")
    try:
        candidate.write_text(text, encoding="utf-8")
        while not _link(candidate, path):
            check(path, what, remedy)
            found = _read(path)
            if found is None:  # released in the meantime
                continue
            # Of two processes that take over, one renames the file first; the other notices here.
            stale = path.with_name(f"{path.name}.{unique}.stale.part")
            with contextlib.suppress(FileNotFoundError):  # another process took it over first
                path.rename(stale)
                if _read(stale) != found:
                    _link(stale, path)
                stale.unlink()
    finally:
        candidate.unlink(missing_ok=True)
    return text


def _link(candidate: pathlib.Path, path: pathlib.Path) -> bool:
    """Gives a file a second name; returns False if that name exists."""
    try:
        os.link(candidate, path)
    except FileExistsError:  # the lock is taken
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(candidate.read_text(encoding="utf-8"))
        except FileExistsError:  # the lock is taken
            return False
    return True


def _touch(path: pathlib.Path, end: threading.Event) -> None:
    while not end.wait(_TOUCH_EVERY):
        with contextlib.suppress(OSError):  # tried again; `_SILENCE` allows for many failures
            os.utime(path)


def _is_alive(path: pathlib.Path, holder: Holder | None) -> bool:
    """Returns True unless the process of a lock has certainly ended, or is silent for long."""
    if holder is not None and (holder.host, holder.pid_namespace) == processes.place():
        started = processes.start_of(holder.pid)
        return started is not None and started == holder.started
    with contextlib.suppress(FileNotFoundError):  # released in the meantime
        return time.time() - path.stat().st_mtime < _SILENCE
    return False


def _this_process() -> Holder:
    pid = os.getpid()
    host, namespace = processes.place()
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return Holder(host, pid, namespace, processes.start_of(pid) or "", now)


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")  # `_parse` finds damage
    except FileNotFoundError:  # released, or never taken
        return None


def _parse(text: str) -> Holder | None:
    """Returns the holder in a lock file; None if the file is damaged."""
    try:
        data = json.loads(text)
        return Holder(**data) if isinstance(data.get("pid"), int) else None
    except (ValueError, TypeError, AttributeError, RecursionError):  # its age decides
        return None


def _in_use(path: pathlib.Path, text: str, what: str, remedy: str) -> BlockingIOError:
    holder = _parse(text)
    who = "another process"
    if holder is not None:
        who = f"process {holder.pid} on {holder.host} since {holder.since}"
    return BlockingIOError(
        f"{what} is in use by {who}; wait for it or stop it, or {remedy} (delete {path} if that "
        "process has certainly ended)."
    )
