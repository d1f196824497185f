"""Ends this process when another one has died or ended too early, with a sentence that names it."""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

OTHER_DIED = 75  # exit code of a process whose peer died: the same command may succeed (sysexits.h)
FAILED = 2  # exit code of an error, as of every command
NOTE = "vla_jax/ended"  # key of exit code and sentence of the first process that ended too early
INTERVAL = 2.0  # s between two heartbeats
SILENCE = 30.0  # s without a heartbeat after which a process is dead
GRACE = 5.0  # s that a process has to end by itself after another one has ended too early
_HEARTBEATS = "vla_jax/heartbeats"  # key of the heartbeats
RESUMES = "the same command continues"
_FIRST_DIED = f"process 0, which connects the others, has died; {RESUMES}"
_ABORTED = (
    "error: this process has aborted, by the cause above; if that is JAX's distributed service, "
    f"another process has died or was started again, and {RESUMES}\n"
)


def watch(client: Any, left: threading.Event) -> None:
    """Sends heartbeats; ends this process when another one has died or ended too early.

    Args:
      client: JAX's client of the keys that all processes share.
      left: set when this process leaves the others.
    """
    own, identity = jax.process_index(), f"{socket.gethostname()}, PID {os.getpid()}"
    # Process 0 ends last: the others would take its end for the cause.
    patience = SILENCE + (0.0 if own else 2 * GRACE)
    last: dict[str, tuple[str, float]] = {}  # last heartbeat of every process, and when it came
    for beat in itertools.count():
        if left.is_set():
            return
        try:
            client.key_value_set(f"{_HEARTBEATS}/{own}", f"{identity}#{beat}", allow_overwrite=True)
            beats = dict(client.key_value_dir_get(_HEARTBEATS))
            note = _wait_for_note(client)
        except jax.errors.JaxRuntimeError as error:
            lost = f"process 0 has lost what it shares with the others ({error}); {RESUMES}"
            _end(_FIRST_DIED if own else lost, left, OTHER_DIED)
            return
        if note is not None:
            time.sleep(GRACE)  # this process may be about to end by itself
            code, _, sentence = note.partition(" ")
            _end(sentence, left, int(code))
            return
        now = time.monotonic()
        for key, newest in beats.items():
            if last.get(key, ("",))[0] != newest:
                last[key] = (newest, now)
        for key, (newest, since) in last.items():
            if now - since > patience:
                place = place_of(int(key.rpartition("/")[2]), newest.partition("#")[0])
                dead = f"{place} has died: no heartbeat for {patience:.0f} s"
                _end(f"{dead}; {RESUMES}", left, OTHER_DIED)


@contextlib.contextmanager
def time_limit(seconds: float, sentence: Callable[[], str]) -> Iterator[None]:
    """Ends this process if the block takes longer.

    Args:
      seconds: that the block may take.
      sentence: returns the reason.
    """
    done = threading.Event()

    def wait() -> None:
        if not done.wait(seconds):
            _end(sentence(), done, OTHER_DIED)

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextlib.contextmanager
def explained_aborts(address: str, left: threading.Event) -> Iterator[None]:
    """Ends this process inside the block when process 0 has died, and explains aborts by JAX.

    JAX aborts a process when process 0 has died, or when another one has been started again, at
    once and with a page of text. The end of a connection to the port of process 0 is mostly seen
    earlier; if not, the abort itself asks whether process 0 lives.

    Args:
      address: host:port of process 0.
      left: set when this process leaves the others.
    """
    is_first = jax.process_index() == 0
    if not is_first:
        threading.Thread(target=_watch_first, args=(address, left), daemon=True).start()

    process, set_handler = os.getpid(), ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)

    # A handler of Python's `signal` would wait for the main thread, which waits in a collective.
    # Python may hang here if memory is corrupt; the scheduler's time limit ends such a process.
    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(number: int) -> None:
        if os.getpid() == process:
            if not is_first and _is_refused(address):
                _end(_FIRST_DIED, left, OTHER_DIED)
            os.write(2, _ABORTED.encode())
        set_handler(number, before)  # another cause, or a forked worker
        signal.raise_signal(number)

    before = set_handler(signal.SIGABRT, ctypes.cast(on_abort, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGABRT, before)


def _watch_first(address: str, left: threading.Event) -> None:
    while not left.is_set():
        with contextlib.suppress(OSError), _connect(address) as connection:  # ends by an error too
            while connection.recv(4096):
                pass
        if _is_refused(address):
            _end(_FIRST_DIED, left, OTHER_DIED)
        left.wait(1.0)  # process 0 lives and does not want this connection


def _is_refused(address: str) -> bool:
    try:
        _connect(address).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # a slow host, or no descriptors are left: heartbeats decide
        return False
    return False


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(port)), timeout=GRACE)
    connection.settimeout(None)
    return connection


def _wait_for_note(client: Any) -> str | None:
    """Returns exit code and sentence of a process that ended, if there are any in `INTERVAL`."""
    try:
        return client.blocking_key_value_get(NOTE, int(1000 * INTERVAL))
    except jax.errors.JaxRuntimeError as error:  # also at the end of the time
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def place_of(index: int, identity: str) -> str:
    """Returns words for process `index`; `identity` is its host and number."""
    return f"process {index} of {jax.process_count()} ({identity})"


def _end(sentence: str, left: threading.Event, code: int) -> None:
    """Ends this process, whose main thread may wait in a collective, unless it has left."""
    if left.is_set():
        return
    os.write(2, f"error: {sentence}\n".encode())
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)
