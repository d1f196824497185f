"""Identity of processes, for the names of temporary files and for locks."""

import contextlib
import os
import pathlib
import socket


def place() -> tuple[str, str]:
    """Returns host and PID namespace, within which processes see each other."""
    with contextlib.suppress(OSError):  # no /proc outside Linux
        return socket.gethostname(), os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), ""


def start_of(pid: int) -> str | None:
    """Returns when a process started; "" if that is unknown, None if there is no such process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:  # it has ended
        return None
    except (OSError, OverflowError):  # of another user
        pass
    with contextlib.suppress(OSError, IndexError):  # no /proc outside Linux
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces
        return None if fields[0] == "Z" else fields[19]  # a zombie has ended
    return ""
