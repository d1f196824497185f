"""Time in which a device works, read from a trace of JAX's profiler: the host does not count.

On an NVIDIA GPU the profiler records the kernels of the whole process, so that JAX and PyTorch are
measured by the same instrument. A CPU has no such trace.
"""

import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.profiler import ProfileData

# Lines of a device's trace with what it computes. Others repeat these events in larger units, whose
# pauses would count (the modules and steps of XLA).
_LINES = ("Stream", "XLA Ops")


def device_ms(run: Callable[[], Any], wait: Callable[[Any], Any], num_runs: int) -> float | None:
    """Returns ms per run in which the device works; None if the platform does not record it.

    Args:
      run: starts one run; has run before, so that nothing is compiled.
      wait: blocks until the results of a run are ready.
      num_runs: runs to record.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(num_runs - 1):
                run()
            wait(run())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        busy = busy_ns(ProfileData.from_file(str(path)))
    return None if busy is None else busy / 1e6 / num_runs


def busy_ns(profile: Any) -> float | None:
    """Returns ns in which any device of a trace (`ProfileData`) computes; None without a device."""
    planes = [plane for plane in profile.planes if plane.name.startswith("/device:")]
    events = [
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in planes
        for line in plane.lines
        if line.name.startswith(_LINES)
        for event in line.events
    ]
    return _length_of_union(events) if events else None


def _length_of_union(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union: kernels of two streams may overlap."""
    length, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        length += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return length
