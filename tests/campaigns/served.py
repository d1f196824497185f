"""A policy server in a process of its own, for campaigns."""

import contextlib
import http.client
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]


class Served(NamedTuple):
    """A running server."""

    port: int
    pid: int
    log: pathlib.Path
    start_seconds: float  # until the first answer of /healthz


def free_port() -> int:
    """Returns a port of this machine on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_healthy(port: int) -> bool:
    """Returns True if GET /healthz is answered with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def get(port: int, path: str) -> str:
    """Returns the body of a GET request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    body = connection.getresponse().read().decode()
    connection.close()
    return body


@contextlib.contextmanager
def serve(
    run_dir: pathlib.Path | str,
    *options: str,
    module: str = "vla_jax.serve",
    environment: dict[str, str] | None = None,
    patience: float = 300,
    port: int | None = None,
) -> Iterator[Served]:
    """Runs `python -m MODULE RUN_DIR --port PORT OPTIONS` until the block ends.

    Args:
      run_dir: run folder.
      options: further arguments.
      module: the server.
      environment: variables to add.
      patience: seconds to wait for /healthz.
      port: of a server that runs already, and goes on; None starts one.
    """
    if port is not None:
        yield Served(port, _listener(port), pathlib.Path(os.devnull), 0.0)
        return
    port, began = free_port(), time.monotonic()
    log = pathlib.Path(f"{run_dir}.{port}.log")
    command = [sys.executable, "-m", module, str(run_dir), "--port", str(port), *options]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        )
        try:
            while not is_healthy(port):
                if process.poll() is not None or time.monotonic() - began > patience:
                    raise RuntimeError(f"no server: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield Served(port, process.pid, log, time.monotonic() - began)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _listener(port: int) -> int:
    """Returns the process that listens on a port."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"--port" in words and str(port).encode() in words:
                return int(folder.name)
    raise RuntimeError(f"no server on port {port}")


def resident_mb(pid: int) -> float:
    """Returns the resident memory of a process in MB."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time that a process has used."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
