"""Settings of the C library's memory allocator for trainings on a CPU."""

import ctypes
import sys

# Parameters of mallopt in malloc.h, in the order in which they are set.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_SETTINGS = (
    (_MMAP_THRESHOLD, 1 << 25),  # bytes; 32 MB is the largest value that glibc accepts
    (_MMAP_MAX, 0),  # no separate mappings, so that blocks above 32 MB are kept too
    (_TRIM_THRESHOLD, 1 << 30),  # bytes of free memory at the heap's end before it shrinks
    (_TOP_PAD, 1 << 26),  # bytes; with the size of a thread's heap, an empty heap is not unmapped
)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for reuse, in the whole process.

    On a CPU, XLA frees its temporary buffers after every call. By default glibc returns large
    blocks to the kernel, and the next call causes a page fault for each of their pages: up to a
    third of the time of a small training. Memory use stays at its peak, the address space of every
    thread grows in steps of 64 MB, and the settings cannot be undone. Does nothing if the C library
    is not glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every libc has it
        if mallopt:
            for parameter, value in _SETTINGS:
                mallopt(parameter, value)
