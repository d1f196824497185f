"""Strict JAX on four simulated devices, one compile cache, and the choice of the fast tests."""

import collections
import ctypes
import gc
import os
import pathlib
import signal
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Environment variables, since processes that tests start inherit them. Set
# JAX_COMPILATION_CACHE_DIR to another folder to time the tests with a cold cache.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
# Also the smallest programs: most are compiled again by the other worker, after `clear_caches`,
# in processes that tests start, and by `make test-slow`. A write takes 2 ms of CPU time, a hit
# saves half of the time that compilation takes.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Compilation takes most of the time, and the laws hold in unoptimised programs too; `make test-
# optimised` sets this to 0. On a GPU the programs are those of a training.
os.environ.setdefault(
    "JAX_DISABLE_MOST_OPTIMIZATIONS", "1" if os.environ["JAX_PLATFORMS"] == "cpu" else "0"
)
# XLA's older code generators compile these programs in half the time. A jaxlib that does not know a
# flag ends the process, so it is set only for versions that are known to have it.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib").startswith("0.10."):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
# These versions print an error for every program that they read from the cache.
if version("jaxlib") in ("0.10.0", "0.10.1"):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

from tests import sampling
from vla_jax import compile_cache

# Processes in the background of a shell script ignore Ctrl-C, and hand that on to those that they
# start; tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
compile_cache.protect()  # the other worker reads a program while this one writes it
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

MARKS = {"fast": (), "slow": ("slow",), "exhaustive": ("slow", "exhaustive")}
MAX_MAPS = 20_000  # memory maps of a process; Linux allows 65,530, a compiled program takes ~12
MAX_PAGES = 200_000  # resident memory of a process, pages of 4 kB


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks cases of sampled tests as slow, and as exhaustive if TEST_SAMPLE leaves them out."""
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled"):
            is_long = item.get_closest_marker("slow") is not None
            cases[item.nodeid.partition("[")[0], is_long].append(item)
    sample = os.environ.get("TEST_SAMPLE", "")
    for (name, is_long), group in cases.items():
        chosen = sampling.tiers(name, len(group), sample, is_long=is_long)
        for item, tier in zip(group, chosen, strict=True):
            for mark in MARKS[tier]:
                item.add_marker(mark)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Stops the garbage collection, which takes a fifth of the time that collecting tests takes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()  # later collections leave out the objects of the tests
        gc.enable()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def golden():
    """Folder of reference values made by the original systems."""
    return pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def wheel_python(tmp_path_factory):
    """Python of an environment with the library installed from its wheel, without the clone."""
    root, folder = pathlib.Path(__file__).parents[1], tmp_path_factory.mktemp("wheel")
    pip, python = [sys.executable, "-m", "pip"], folder / "venv/bin/python"
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, root]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    venv.create(folder / "venv", with_pip=False)
    # makes the dependencies importable, but not the clone: .pth files there are not processed
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = folder.glob("vla_jax-*.whl")
    install = ["--python", python, "install", "--no-deps", wheel]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    return python


@pytest.fixture(scope="module", autouse=True)
def limited_memory():
    """Drops the compiled programs of earlier modules before memory or memory maps run out."""
    yield
    process = pathlib.Path("/proc/self")
    if process.exists():
        num_maps = (process / "maps").read_bytes().count(b"\n")
        num_pages = int((process / "statm").read_text().split()[1])
        if num_maps > MAX_MAPS or num_pages > MAX_PAGES:
            jax.clear_caches()
            gc.collect()
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
            if trim:
                trim(0)
