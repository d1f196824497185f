"""Worker processes: signals of a scheduler or a terminal do not end them, the parent's end does."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

from vla_jax import workers

ROOT = pathlib.Path(__file__).parents[1]
# Each starts workers, prints their PIDs, and after the signals uses them again.
POOL = """
import os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from vla_jax import stopping, workers

if __name__ == "__main__":
    with ProcessPoolExecutor(2, workers.CONTEXT) as pool, stopping.deferred("work") as stop:
        pids = [pool.submit(os.getpid).result()]
        print(*pids, flush=True)
        while not stop.requested:
            time.sleep(0.05)
        print(pool.submit(os.getpid).result() in pids, flush=True)
        time.sleep(600)
"""
LOADER = """
import multiprocessing, time
from test_loader import make_source
from vla_jax import stopping
from vla_jax.data import loader

if __name__ == "__main__":
    config = loader.LoaderConfig(batch_size=5, num_workers=2)
    with loader.make_loader(make_source(), config) as batches, stopping.deferred("work") as stop:
        next(batches)
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        while not stop.requested:
            time.sleep(0.05)
        for _ in range(20):
            next(batches)
        print(True, flush=True)
        time.sleep(600)
"""


def is_alive(pid):
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("program", "number"),
    [
        pytest.param(POOL, signal.SIGTERM, id="pool"),
        pytest.param(POOL, signal.SIGINT, id="pool, Ctrl-C", marks=pytest.mark.slow),
        pytest.param(LOADER, signal.SIGTERM, id="loader", marks=pytest.mark.slow),
    ],
)
def test_workers_outlive_a_signal_to_all_and_end_with_their_parent(program, number, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(program)
    parent = subprocess.Popen(
        [sys.executable, str(script)], start_new_session=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )  # fmt: skip
    try:
        pids = parent.stdout.readline().split()
        assert pids
        os.killpg(parent.pid, number)
        assert parent.stdout.readline() == "True\n"
    finally:
        parent.kill()
        parent.communicate()
    deadline = time.monotonic() + 30
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_daemon_does_not_delay_an_error_of_its_parent(tmp_path):
    """Python waits for daemons at its end, after a SIGTERM that these do not get."""
    script = tmp_path / "script.py"
    script.write_text("""
import time
from vla_jax import workers

if __name__ == "__main__":
    workers.CONTEXT.Process(target=time.sleep, args=(600,), daemon=True).start()
    raise SystemExit(3)
""")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, str(script)], env=environment, timeout=60, check=False)
    assert ended.returncode == 3


def kill_this_process():
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_pool_whose_worker_was_killed_ends():
    with ProcessPoolExecutor(2, workers.CONTEXT) as pool:
        waiting = pool.submit(time.sleep, 600)
        killed = pool.submit(kill_this_process)
        pool.submit(abs, 0)  # the pool looks at its processes at each call, those of before
        with pytest.raises(BrokenProcessPool):
            killed.result(60)
        with pytest.raises(BrokenProcessPool):
            waiting.result(60)
