"""Stops on SIGTERM and Ctrl-C: the work at hand is finished and saved first.

    with stopping.deferred("update") as stop:
        for item in items:
            update(item)
            if stop.requested:
                break
        if stop.requested:
            save()
            stop.end("update 60 is saved; the same command continues from there")

Handlers are installed for the length of the block, in the main thread; other threads change
nothing. A second signal ends the program at once, even inside a long computation of the device.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODE = {signal.SIGINT: 130, signal.SIGTERM: 143}
_ONE_SIGNAL = 0.1  # s within which repeated signals count as one, as a launcher may send them twice


class Stop:
    """State of a request to stop, made by a signal; from `deferred`."""

    def __init__(self, work: str) -> None:
        """Notes the name of the work that is finished first, for the message."""
        self._work = work
        self._signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """True after the first signal."""
        return self._signal is not None

    def request(self, number: int, frame: FrameType | None = None) -> None:
        """Notes the signal; a handler for `signal.signal`."""
        del frame
        if self._signal is None:
            self._signal = signal.Signals(number)
            _write(
                f"{self._signal.name}: stops after this {self._work}; a second signal ends at once."
            )

    def end(self, done: str) -> NoReturn:
        """Says what is saved, and raises what ends the program.

        Args:
          done: end of the message.

        Raises:
          KeyboardInterrupt: after Ctrl-C (SIGINT).
          SystemExit: 143 after SIGTERM, also of another process.
        """
        _write(f"{'stopped' if self._signal is None else self._signal.name}: {done}.")
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_CODE[signal.SIGTERM])


@contextlib.contextmanager
def deferred(work: str) -> Iterator[Stop]:
    """Yields a `Stop` that notes SIGTERM and Ctrl-C inside the block, instead of an exception.

    Args:
      work: name of what is finished before the stop, such as "update".
    """
    stop = Stop(work)
    if not _in_main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with _second_signal_ends():
        for number in SIGNALS:
            signal.signal(number, stop.request)
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM inside the block into SystemExit 143, so that partial files are deleted.

    For the entry point of a program. A handler that is installed already is left in place.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    with _second_signal_ends():
        signal.signal(signal.SIGTERM, _exit)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _second_signal_ends() -> Iterator[None]:
    """Ends the program at a second signal inside the block.

    Python runs handlers between two of its own instructions only, not inside a compilation. The
    wake-up file descriptor gets a byte at once, and a thread reads it.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # the thread reads the end of the stream
        thread.join()
        reader.close()


def _watch(reader: socket.socket) -> None:
    first: float | None = None
    while data := reader.recv(1):
        if data[0] not in SIGNALS:
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > _ONE_SIGNAL:
            os._exit(128 + data[0])


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _write(text: str) -> None:
    """Writes a line to stderr; `print` may not be called inside a handler."""
    with contextlib.suppress(OSError):  # stderr is closed
        os.write(2, f"{text}\n".encode())
