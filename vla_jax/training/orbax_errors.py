"""Errors of Orbax in one sentence each, without the pages that it logs for them."""

import contextlib
import gc
import logging
import os
import pathlib
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_PENDING = 0.1  # s to wait until the other reads or writes of a checkpoint have ended


@contextlib.contextmanager
def one_sentence(directory: Any) -> Iterator[None]:
    """Turns any error of a save into one OSError, and deletes its partial files."""
    try:
        with collected():
            yield
    except Exception as error:  # a full disk is a ValueError of TensorStore, or an OSError
        for partial in pathlib.Path(directory).glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(partial, ignore_errors=True)  # the error is raised
        raise OSError(
            f"could not save into {directory} ({_reason(error)}); the steps saved before are "
            "intact: free some space if the disk is full, and save again."
        ) from error


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[None]:
    """Does the same for a save into a new folder; one that exists is named as the reason."""
    try:
        with one_sentence(path.parent):
            yield
    except OSError as error:
        if path.exists():  # complete folders alone have this name
            raise FileExistsError(
                f"{path} exists already, perhaps written by another process; choose another folder."
            ) from error
        raise


@contextlib.contextmanager
def readable(path: pathlib.Path) -> Iterator[None]:
    """Turns any error of Orbax about damaged files into one sentence."""
    with quiet():
        try:
            with collected():
                yield
        except Exception as error:  # many types
            raise ValueError(
                f"{path} cannot be read ({_reason(error)}); delete it to use the step before."
            ) from error


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """Waits for the other reads or writes after one has failed, and ignores their reports."""
    with _quiet_pending() as hook:
        try:
            yield
        except Exception as error:  # many types
            hook.stays = True
            time.sleep(_PENDING)
            # Python reports the other failures when it collects the frames that refer to them:
            # collect these here, where the reports are ignored.
            for cause in _chain(error):
                traceback.clear_frames(cause.__traceback__)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
                gc.collect()
            raise


class _IgnorePending:
    """A `sys.unraisablehook` without the reports of reads or writes that end after another failed.

    Every other report passes.
    """

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self.before = before  # gets the other reports
        self.stays = False  # after a failed save or read: the slowest ends at any later time

    def __call__(self, report: Any) -> None:
        if not str(report.exc_value).endswith(("Event loop is closed", "was never awaited")):
            self.before(report)


@contextlib.contextmanager
def _quiet_pending() -> Iterator[_IgnorePending]:
    """Ignores what ends, or never starts, after one read or write of Orbax has failed.

    Python reports them through `sys.unraisablehook`, which is restored at the end unless the hook
    that this yields is marked to stay.
    """
    before = sys.unraisablehook
    hook = before if isinstance(before, _IgnorePending) else _IgnorePending(before)
    sys.unraisablehook = hook
    try:
        yield hook
    finally:
        if not hook.stays:
            sys.unraisablehook = before


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides reports about errors that Orbax also raises; the loggers are restored at the end.

    Orbax logs pages of tracebacks for them. Where it reads broken files, asyncio adds a page for
    every array (OCDBT is their format).
    """

    def is_foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname and "OCDBT" not in record.getMessage()

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(is_foreign)
    try:
        with _quiet_pending():  # a save in the background fails between two calls
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_foreign)


def _reason(error: Exception) -> str:
    """Returns the operating system's message if the error has its code, else the first line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return (str(error) or type(error).__name__).splitlines()[0]
