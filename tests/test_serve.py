"""The command: early refusals, SIGTERM, and a kill in the middle of an episode."""

import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_run
from websockets.sync.client import connect

from vla_jax import serve
from vla_jax.serving.messages import pack, unpack

OBSERVATION = {"state": np.zeros(8), "environment_state": np.zeros(22, np.float32)}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--host", "0.0.0.0"], "host must be 127.0.0.1 without a token, got '0.0.0.0'"),
        (["--token-file", "missing"], "token_file missing is missing; write the token into it"),
        (["--sessions", "0"], "sessions must be at least 1, got 0"),
        (["--max-batch", "0"], "max_batch must be at least 1, got 0"),
        (["--port", "70000"], "port must be at most 65535, got 70000"),
        ([], "run folder RUN is missing"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(argv, message, capsys, monkeypatch):
    monkeypatch.delenv(serve.TOKEN, raising=False)
    with pytest.raises(SystemExit) as stopped:
        serve.main(["RUN", *(argv or ["--port", "0"])])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_taken_port_and_an_empty_token_are_refused(capsys, tmp_path):
    (tmp_path / "token").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for argv, message in (
            (["--port", port], f"error: port must be free on 127.0.0.1, got {port}"),
            (["--token-file", str(tmp_path / "token")], "must hold a token, got an empty file"),
        ):
            with pytest.raises(SystemExit, match="2"):
                serve.main(["RUN", *argv])
            assert message in capsys.readouterr().err


def start(run_dir, *argv):
    """Starts the command on a free port; returns the process and the URL."""
    command = [sys.executable, "-m", "vla_jax.serve", str(run_dir), "--port", "0", *argv]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    line = process.stdout.readline()
    found = re.match(r"serving on (ws://127\.0\.0\.1:\d+)$", line)
    if found is None:
        pytest.fail(line + process.communicate()[1])
    return process, found[1]


def ask(url, step):
    with connect(f"{url}/?session_id=arm", compression=None, proxy=None) as client:
        client.recv()
        client.send(pack({**OBSERVATION, "step": step, "prompt": "lift"}))
        return unpack(client.recv(timeout=10))


@pytest.mark.slow
def test_a_killed_server_goes_on_with_its_sessions_and_a_stopped_one_exits_with_0(tmp_path):
    (tmp_path / "run").mkdir()
    run_dir = tiny_run.write(tmp_path / "run")
    options = ("--max-batch", "1", "--snapshot", str(tmp_path / "sessions"))
    process, url = start(run_dir, *options)
    assert ask(url, 0)["session"]["reset"]
    last = ask(url, 1)
    process.kill()
    process.communicate()
    process, url = start(run_dir, *options)
    again = ask(url, 1)
    np.testing.assert_array_equal(again["actions"], last["actions"])
    assert ask(url, 2)["session"] == {"id": "arm", "step": 2, "reset": False}
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=10)
    assert (process.returncode, output[0]) == (0, "")
