"""JAX's cache of compiled programs: atomic writes, checksums, and damage in one sentence.

JAX compiles a program again if its file cannot be decompressed. zlib compares a checksum; zstd, as
JAX calls it, does not: one changed bit gave other results without an error, or ended the process.
JAX uses zstd wherever Python has it (3.14, or the package zstandard). It also writes a file in
place: another process can read a partial file, and a killed process leaves one behind.
"""

import importlib
import os
import pathlib
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_PROBLEM = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL
)


def protect(folder: pathlib.Path | None = None) -> None:
    """Makes JAX's compile cache write atomically and with checksums, in this process.

    Any number of processes that call this may share a cache. Without a cache nothing is changed.

    Args:
      folder: of the compiled programs, unless the environment names one; None = that one alone.
    """
    if folder is not None and _VARIABLE not in os.environ:
        importlib.import_module("jax").config.update("jax_compilation_cache_dir", str(folder))
    elif not os.environ.get(_VARIABLE):
        return  # without importing JAX
    # The names are JAX's own (0.10 to 0.12); where one is missing, that part is left out.
    module = importlib.import_module("jax._src.compilation_cache")
    for name in ("zstd", "zstandard"):
        if hasattr(module, name):
            setattr(module, name, None)
    cache = getattr(module, "LRUCache", None)
    put = getattr(cache, "put", None)
    if cache is not None and put is not None and put.__module__ != __name__:  # not yet replaced
        cache.put = _atomic(put)


def _atomic(put: Callable[[Any, str, bytes], None]) -> Callable[[Any, str, bytes], None]:
    """Returns JAX's `put`, which stores a program by its key, with atomic writes."""

    def put_atomically(cache: Any, key: str, program: bytes) -> None:
        folder = str(getattr(cache, "path", "://"))
        # A bounded cache has a lock; an address with a scheme is no file of this machine.
        if getattr(cache, "eviction_enabled", True) or "://" in folder:
            put(cache, key, program)
            return
        path = pathlib.Path(folder, f"{key}-cache")
        # Not `files.replacing`: it lists the folder, which may hold thousands, at every write.
        owner = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
        part = path.with_name(f"{path.name}.{owner}.part")
        if not path.exists():
            try:
                part.write_bytes(program)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    return put_atomically


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
