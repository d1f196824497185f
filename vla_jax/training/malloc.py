"""What the C library does with memory that is given back to it."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of malloc.h


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, by XLA and by everybody else in this process.

    On a CPU, XLA frees its temporary memory after every call; without this, glibc gives those
    megabytes back to the kernel and faults them in again, which was up to a third of the time of a
    small training. It cannot be undone.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every libc has it
        if mallopt:
            for parameter, value in ((_M_MMAP_THRESHOLD, 1 << 25), (_M_TRIM_THRESHOLD, 1 << 30)):
                mallopt(parameter, value)
