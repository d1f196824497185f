"""Strict JAX on four simulated devices, with one compile cache for the whole suite."""

import os
import pathlib

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# In the environment, so that the processes that tests start do not compile it all again.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parents[1] / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# Most of the suite's time is compilation, and a law holds in slower programs too; 0 tests the fast.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def golden():
    """Folder of reference values made by the original systems."""
    return pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Forgets compiled programs in time: each takes a dozen of a process's 65,530 memory maps."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
