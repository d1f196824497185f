"""Standard output whose reader has ended, as in `python -m train.record --help | head -1`."""

import os
import select
import sys


def drop_unread() -> bool:
    """Returns True if nobody reads the output any more, such as `head` that has ended.

    Then it is dropped; otherwise Python would report it at its end, and change the exit code.
    """
    if sys.stdout is None:
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # what is lost has no reader
        drop()
        return True
    return False


def has_reader() -> bool:
    """Returns False if the standard output is a pipe whose other end is closed."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError):  # no output, or one that is not a file, as in a notebook
        return True
    watch = select.poll()
    watch.register(descriptor, 0)  # errors are always reported
    return not watch.poll(0)


def drop() -> None:
    """Drops all output from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
