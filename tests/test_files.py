"""Files are complete or unchanged, and damaged ones are reported in one sentence."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from vla_jax import files, folder_lock
from vla_jax.evaluation import plots
from vla_jax.training.logs import Logs, read_metrics


def test_a_file_is_replaced_only_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with files.replacing(path) as part:
        part.write_text("first")
        assert not path.exists()
    with files.replacing(path) as part:
        part.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


@contextlib.contextmanager
def small_files(num_bytes):
    """Limits the size of every file that this process writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


PANEL = plots.Panel("loss", "updates", "loss", {"a": (np.arange(2), np.arange(2.0))})
WRITERS = {
    "write_json": lambda path: files.write_json(path, {"words": "x" * 100}),
    "append_json_line": lambda path: files.append_json_line(path, {"words": "x" * 100}),
    "a plot": lambda path: plots.curves(path, [PANEL]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_gives_one_sentence_with_the_file_and_a_remedy(tmp_path, name):
    sentence = r"run/a.file could not be written \(File too large\); allow larger files .ulimit -f."
    path = tmp_path / "run" / "a.file"
    path.parent.mkdir()
    with small_files(10), pytest.raises(OSError, match=sentence) as caught:
        WRITERS[name](path)
    assert caught.value.errno == errno.EFBIG
    assert [each.name for each in path.parent.iterdir() if each.suffix == ".part"] == []


def test_a_metric_on_a_full_disk_gives_one_sentence(tmp_path):
    with Logs(tmp_path, num_updates=5, console=Console(quiet=True)) as logs:
        logs.write(1, {"loss": 1.0})
        sentence = r"metrics.jsonl could not be written \(File too large\)"
        with small_files(100), pytest.raises(OSError, match=sentence):
            logs.write(2, {"loss": 1.0})
        logs.write(3, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


def test_a_lock_on_a_full_disk_gives_one_sentence_and_leaves_nothing(tmp_path):
    lock = folder_lock.hold(tmp_path / ".lock", "folder", "wait")
    with small_files(10), pytest.raises(OSError, match=r"\.lock could not be written"), lock:
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_has_its_sentence_or_is_about_another_file_is_unchanged(tmp_path):
    inner = OSError(errno.ENOSPC, "data set d could not be written (full); free space")
    other = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/b/c")
    for error in (inner, other):
        with (
            pytest.raises(OSError, match=r"free space|denied") as caught,
            files.named_errors(tmp_path / "a"),
        ):
            raise error
        assert caught.value is error
    here = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a"))
    raises = pytest.raises(
        PermissionError, match="choose another folder, or change its permissions"
    )
    with raises, files.named_errors(tmp_path / "a" / "b"):
        raise here


def fail_to_write(path, make):
    with files.replacing(path) as part:
        if make == "file":
            part.write_text("half")
        if make == "folder":
            part.mkdir()
            (part / "inner").write_text("half")
        raise KeyError("in the block")


@pytest.mark.parametrize("make", ["file", "folder", "nothing"])
def test_an_error_leaves_the_target_unchanged_and_no_temporary_file(make, tmp_path):
    path = tmp_path / "target"
    path.write_text("old")
    with pytest.raises(KeyError):
        fail_to_write(path, make)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_a_folder(tmp_path):
    folder = tmp_path / "folder"
    for name in ("old", "new"):
        with files.replacing(folder) as part:
            part.mkdir()
            (part / name).write_text("")
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_leftovers_of_a_killed_program_do_no_harm(tmp_path):
    path = tmp_path / "file.json"
    with files.replacing(path) as part:
        name = part.name
        part.write_text("{}")
    (tmp_path / name).mkdir()  # as a killed program with the same process id left it
    files.write_json(path, {"a": 1})
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})
    script = (
        "import sys, time\n"
        "from vla_jax import files\n"
        "with files.replacing(sys.argv[1]) as part:\n"
        "    part.write_text('half')\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert files.read_json(path, "numbers") == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 2
    files.write_json(path, {"a": 2})
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_of_a_running_program_is_kept(tmp_path):
    path = tmp_path / "file.json"
    with files.replacing(path) as part:
        other = part.with_name(part.name.replace(f".{os.getpid()}.", f".{os.getppid()}."))
        foreign = part.with_name(f"{path.name}.elsewhere.1.part")
        for left in (other, foreign):
            left.write_text("half")
        part.write_text("{}")
    files.write_json(path, {"a": 1})
    assert set(tmp_path.iterdir()) == {path, other, foreign}


def test_json_survives_a_round_trip_and_is_readable(tmp_path):
    data = {"b": [1, 2.5, None, True, "é"], "a": {"c": {}}}
    files.write_json(tmp_path / "file.json", data)
    assert files.read_json(tmp_path / "file.json", "numbers") == data
    assert (tmp_path / "file.json").read_text().endswith("\n}\n")


def test_what_json_cannot_represent_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.write_json(path, {"a": object()})
    assert files.read_json(path, "numbers") == {"a": 1}


FAULTS = {
    "truncated": (b'{"a": ', "is not valid JSON"),
    "not UTF-8": (b"\xff", "is not valid JSON"),
    "no object": (b"[1]", "must hold a JSON object, got list; restore it"),
}


@pytest.mark.parametrize(("content", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_json_file_is_reported_with_its_name(content, sentence, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as raised:
        files.read_json(path, "numbers")
    assert str(path) in str(raised.value)


def test_a_missing_json_file_is_reported_with_its_expected_content(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nix\.json is missing: expected numbers as JSON"):
        files.read_json(tmp_path / "nix.json", "numbers")


def test_json_lines_are_written_appended_and_read(tmp_path):
    path = tmp_path / "lines.jsonl"
    files.write_json_lines(path, [{"step": 1}, {"step": 2}])
    files.append_json_line(path, {"step": 3})
    assert files.read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_last_line_without_a_newline_is_ignored(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert files.read_json_lines(path) == [{"step": 1}]


def test_a_missing_json_lines_file_has_no_lines(tmp_path):
    assert files.read_json_lines(tmp_path / "nix.jsonl") == []


def test_a_damaged_line_is_reported(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": \n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl has a damaged line \d .*; delete"):
        files.read_json_lines(path)


def test_a_folder_is_deleted_whether_or_not_it_exists(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for _ in range(2):
        files.delete_folder(tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_a_folder_that_cannot_be_deleted_is_reported(tmp_path, monkeypatch):
    def rmdir(*_, **__):
        raise PermissionError(errno.EACCES, "not allowed", str(tmp_path / "folder"))

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(os, "rmdir", rmdir)
    with pytest.raises(OSError, match=r"folder could not be written \(Permission denied\); choose"):
        files.delete_folder(tmp_path / "folder")


@pytest.mark.parametrize("unfinished", [b"", b'{"step": 2', b'{"step": 2, "text": "\xc3'])
def test_an_appended_line_replaces_one_that_was_not_finished(unfinished, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"step": 1}\n' + unfinished)
    files.append_json_line(path, {"step": 2})
    assert files.read_json_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_bytes(unfinished)  # the first line
    files.append_json_line(path, {"step": 3})
    assert files.read_json_lines(path) == [{"step": 3}]
