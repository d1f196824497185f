"""Atomic writes and damaged files of JAX's cache of compiled programs."""

import os
import pathlib
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import jax
import pytest
from jax._src.lru_cache import LRUCache

from train import record
from vla_jax import compile_cache, workers

PROGRAM = """
import sys, types
sys.modules["zstandard"] = types.ModuleType("zstandard")  # as where JAX would use zstd
import jax
from jax import numpy as jnp
from vla_jax.command_line import exit_codes
with exit_codes():
    print(float(jax.jit(lambda x: jnp.cumsum(x * 3.7).sum() + 5)(jnp.arange(64.0))))
"""


def run(folder):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


@pytest.mark.slow
def test_a_changed_bit_is_noticed_and_the_program_compiled_again(tmp_path):
    expected, messages = run(tmp_path)
    assert messages == ""
    assert run(tmp_path) == (expected, "")
    for path in tmp_path.glob("*-cache"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    result, messages = run(tmp_path)
    assert result == expected
    assert messages.startswith("warning: damaged compiled programs are compiled again, the first")
    assert str(tmp_path) in messages
    assert messages.count("\n") == 1


def test_one_sentence_for_all_damaged_programs(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "programs")
    line = compile_cache.make_line()
    text = "Error {} persistent compilation cache entry for 'jit_step': OSError: {}"
    assert "programs/jit_step-*-cache (OSError: cut)" in str(line(text.format("reading", "cut")))
    assert line(text.format("reading", "cut too")) == ""
    assert str(line(text.format("writing", "full"))).endswith("(OSError: full); free some space.")
    assert line("left out 1 episode") is None


def test_a_program_is_written_atomically(tmp_path, monkeypatch):
    compile_cache.protect()
    programs, write, names = LRUCache(str(tmp_path), max_size=-1), pathlib.Path.write_bytes, []

    def write_half(path, content):
        write(path, content[: len(content) // 2])
        names.extend(os.listdir(tmp_path))
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", write_half)
        with pytest.raises(OSError, match="full"):
            programs.put("step", b"program")
    assert names != ["step-cache"]
    assert len(names) == 1
    assert os.listdir(tmp_path) == []
    programs.put("step", b"program")
    programs.put("step", b"another")  # the first one stays, as in JAX
    assert os.listdir(tmp_path) == ["step-cache"]
    assert programs.get("step") == b"program"


def test_a_bounded_cache_is_left_to_jax(tmp_path):
    pytest.importorskip("filelock")
    compile_cache.protect()
    programs = LRUCache(str(tmp_path), max_size=20)
    for name in ("first", "second", "third"):
        programs.put(name, 10 * b"p")
    assert programs.get("first") is None
    assert programs.get("third") == 10 * b"p"


def test_the_folder_of_the_environment_comes_first(tmp_path, monkeypatch):
    folder = jax.config.jax_compilation_cache_dir
    compile_cache.protect(tmp_path)  # the tests set the variable
    assert jax.config.jax_compilation_cache_dir == folder
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    try:
        compile_cache.protect(tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)


def writer():
    return LRUCache.put.__module__


@pytest.mark.slow
def test_processes_that_record_write_atomically():
    with ProcessPoolExecutor(1, workers.CONTEXT, record._start_process) as pool:
        assert pool.submit(writer).result() == compile_cache.__name__
