"""A lock is held by one process, and taken over from one that has ended."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from vla_jax import folder_lock

ENDED = """
import sys
from vla_jax import folder_lock
lock = folder_lock.hold(sys.argv[1], "run", "wait")
lock.__enter__()
import os; os._exit(0)
"""


def hold(path):
    return folder_lock.hold(path, "run_dir here", "choose another --run-dir")


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


def test_a_second_holder_is_refused_and_the_sentence_names_the_first(path):
    with hold(path):
        with pytest.raises(BlockingIOError) as caught, hold(path):
            pass
        with pytest.raises(BlockingIOError):
            folder_lock.check(path, "run_dir here", "wait")
        data = json.loads(path.read_text())
    assert str(caught.value) == (
        f"run_dir here is in use by process {os.getpid()} on {data['host']} since {data['since']}; "
        f"wait for it or stop it, or choose another --run-dir (delete {path} if that process has "
        "certainly ended)."
    )
    assert list(path.parent.iterdir()) == []
    folder_lock.check(path, "run_dir here", "wait")


def test_the_lock_of_a_process_that_has_ended_is_taken_over(path):
    subprocess.run([sys.executable, "-c", ENDED, path], check=True)
    assert json.loads(path.read_text())["pid"] != os.getpid()
    with hold(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(path.parent.iterdir()) == []


def test_another_process_of_the_same_number_does_not_keep_the_lock(path):
    with hold(path):
        data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "started": "1"}))
    with hold(path):
        assert json.loads(path.read_text())["started"] == data["started"]


@pytest.mark.parametrize(
    "change", [{"host": "elsewhere"}, {"pid_namespace": "pid:[1]"}, b"{", b"\xff\xfe", b"[" * 99999]
)
def test_a_process_that_cannot_be_seen_keeps_the_lock_while_it_touches_it(path, change):
    with hold(path):
        data = json.loads(path.read_text())
    damaged = isinstance(change, bytes)
    path.write_bytes(change if damaged else json.dumps(data | change).encode())
    with pytest.raises(BlockingIOError, match="in use by"), hold(path):
        pass
    long_ago = time.time() - 200
    os.utime(path, (long_ago, long_ago))
    with hold(path):
        pass


def test_a_lock_whose_age_cannot_be_read_is_kept(path, monkeypatch):
    def stat(*_, **__):
        raise OSError(errno.ESTALE, "stale file handle")

    path.write_text("{")
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "stat", stat)
        with pytest.raises(OSError, match="stale file handle"):
            folder_lock.check(path, "run_dir here", "wait")
    assert path.read_text() == "{"


def test_a_file_system_without_hard_links_is_locked_too(path, monkeypatch):
    def link(*_):
        raise PermissionError("no hard links")

    monkeypatch.setattr(os, "link", link)
    with hold(path), pytest.raises(BlockingIOError), hold(path):
        pass


def test_the_lock_is_touched(path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_TOUCH_EVERY", 0.01)
    with hold(path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0


def test_a_second_holder_can_wait(path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_POLL", 0.01)
    first, order = hold(path), []
    first.__enter__()

    def release():
        order.append("released")
        first.__exit__(None, None, None)

    timer = threading.Timer(0.2, release)
    timer.start()
    with (
        pytest.warns(
            UserWarning, match=r"run is in use by process \d+ .* This process waits"
        ) as warned,
        folder_lock.hold(path, "run", "choose another --run-dir", wait=True),
    ):
        order.append("held")
    timer.join()
    assert (order, len(warned)) == (["released", "held"], 1)
    assert list(path.parent.iterdir()) == []
