"""JAX's cache of compiled programs: files that are whole, and their damage in one sentence.

JAX compiles a program again if its file cannot be decompressed. zlib compares a checksum; zstd, as
JAX calls it, does not: one changed bit gave other results without an error, or ended the process.
JAX uses zstd wherever Python has it (3.14, or the package zstandard). It also writes a file in
place, so that another process reads the half of it, and a kill leaves that half for good.
"""

import functools
import importlib
import os
import pathlib
import re
import threading
from collections.abc import Callable
from typing import Any

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_PROBLEM = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL
)


def use(folder: pathlib.Path) -> None:
    """Lets JAX keep compiled programs in a folder, unless the environment names another one.

    Args:
      folder: any number of processes may use it at the same time.
    """
    if _VARIABLE not in os.environ:
        importlib.import_module("jax").config.update("jax_compilation_cache_dir", str(folder))
    _protect()


def protect() -> None:
    """Lets JAX store compiled programs as `use` does, if the environment names a folder."""
    if os.environ.get(_VARIABLE):
        _protect()


def _protect() -> None:
    """Replaces parts of JAX: zlib in place of zstd, and a file that gets its name when it is whole.

    The names are JAX's own (0.10 to 0.12); where one is missing, nothing is changed.
    """
    module = importlib.import_module("jax._src.compilation_cache")
    for name in ("zstd", "zstandard"):
        if hasattr(module, name):
            setattr(module, name, None)
    cache = getattr(module, "LRUCache", None)
    if cache is not None and cache.put.__module__ != __name__:
        cache.put = _whole(cache.put)


def _whole(put: Callable[[Any, str, bytes], None]) -> Callable[[Any, str, bytes], None]:
    """Returns JAX's `put`, which stores a program by its key, without the partial files."""

    @functools.wraps(put, assigned=("__name__", "__doc__"))
    def put_whole(cache: Any, key: str, program: bytes) -> None:
        folder = str(cache.path)
        if cache.eviction_enabled or "://" in folder:  # under a lock; not a file of this machine
            put(cache, key, program)
            return
        path = pathlib.Path(folder, f"{key}-cache")
        part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        if not path.exists():
            try:
                part.write_bytes(program)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    return put_whole


def make_line() -> Callable[[object], str | None]:
    """Returns a function of a warning: one sentence for the first program that is damaged.

    The function returns None for a warning about anything else, and "" for further programs.
    """
    reported: set[str] = set()

    def line(message: object) -> str | None:
        problem = _PROBLEM.match(str(message))
        if problem is None:
            return None
        verb, name, reason = problem.groups()
        if verb in reported:
            return ""
        reported.add(verb)
        files = os.path.join(os.environ.get(_VARIABLE, "the cache"), f"{name}-*-cache")
        reason = " ".join(reason.split())[:200]
        if verb == "writing":
            return f"compiled programs cannot be stored as {files} ({reason}); free some space."
        return (
            f"damaged compiled programs are compiled again, the first one is {files} ({reason}); "
            "delete the files in its folder, and the next run stores them anew."
        )

    return line
