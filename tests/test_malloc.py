"""Freed memory stays with the process: repeated large allocations cause no page faults."""

import platform
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest

from vla_jax.training.malloc import keep_freed_memory

NUM_BLOCKS, BLOCK = 4, 28 << 20  # bytes; together above the 64 MB of a thread's heap in glibc


def faults_of_repeated_allocations() -> int:
    """Returns the page faults of ten rounds of a thread that allocates, fills and frees blocks.

    Every thread has its own heaps; in a training such threads belong to XLA and Orbax.
    """
    counts = []

    def run():
        for _ in range(11):
            blocks = [np.ones(BLOCK, np.uint8) for _ in range(NUM_BLOCKS)]
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
            del blocks

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return counts[-1] - counts[0]


def main() -> None:
    """Prints the page faults before and after the change of the settings."""
    before = faults_of_repeated_allocations()
    keep_freed_memory()
    print(before, faults_of_repeated_allocations())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_freed_memory_of_a_thread_is_reused():
    command = [sys.executable, __file__]  # the settings cannot be undone in this process
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 10


if __name__ == "__main__":
    main()
