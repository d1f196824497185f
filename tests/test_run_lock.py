"""A script holds the lock of its run folder, and leaves no empty folder behind."""

from typing import NamedTuple

import pytest

from vla_jax.training import run_lock


class Config(NamedTuple):
    run_dir: str


def test_a_script_holds_the_lock_of_its_run_folder_while_it_runs(tmp_path):
    seen = []

    @run_lock.exclusive
    def script(config):
        seen.append((tmp_path / "a" / "run" / run_lock.NAME).exists())
        with pytest.raises(BlockingIOError, match="choose another --run-dir"):
            script(config)

    script(Config(str(tmp_path / "a" / "run")))
    assert seen == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_stays(tmp_path):
    with run_lock.in_use(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_the_lock_is_released_after_an_error(tmp_path):
    @run_lock.exclusive
    def script(config):
        raise ValueError("wrong")

    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            script(Config(str(tmp_path / "run")))
    assert list(tmp_path.iterdir()) == []
