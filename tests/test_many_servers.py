"""Servers behind a proxy: a killed one comes back with its sessions."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))

import many_servers


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("haproxy") is None, reason="haproxy is missing; Debian: apt-get install haproxy"
)
def test_named_sessions_go_on_after_their_server_was_killed(tmp_path):
    result = many_servers.run(4, 60, tmp_path)
    assert sum(result.robots_per_server) == 4
    assert result.longest_wait > many_servers.DOWN
    assert result.difference < 1e-5
