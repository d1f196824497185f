"""Every command is tried by the campaign of wrong options, and refuses one early."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "campaigns"))

from option_commands import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 6  # s of CPU time, of which about 2 are measured


def is_command(path):
    """Returns True for a module that runs as `python -m`."""
    tests = [node.test for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    return "__name__ == '__main__'" in map(ast.unparse, tests)


def test_every_command_is_tried():
    paths = [*(ROOT / "train").rglob("*.py"), *(ROOT / "vla_jax").rglob("*.py")]
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if is_command(path)
    }
    assert len(found) > 20
    assert {command.module for command in COMMANDS} == found


@pytest.mark.sampled
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_wrong_setting_is_refused_early_in_one_sentence(command, tmp_path):
    """In an empty folder: neither the data nor the run are missed, since neither is read."""
    (tmp_path / "empty").mkdir()
    argv = [sys.executable, "-m", command.module, *command.base.split(), *command.wrong.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(argv, cwd=tmp_path / "empty", env=env, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = (tmp_path / "errors").read_text().splitlines()
    assert process.returncode == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    name = command.wrong.split()[0].removeprefix("--")
    assert name in lines[0] or name.replace("-", "_") in lines[0]
    assert list((tmp_path / "empty").iterdir()) == []
    assert usage.ru_utime + usage.ru_stime < LIMIT
