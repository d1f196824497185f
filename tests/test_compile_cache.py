"""Damaged files of JAX's cache of compiled programs."""

import os
import subprocess
import sys

import pytest

from vla_jax import compile_cache

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
