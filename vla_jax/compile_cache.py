"""Damage in JAX's cache of compiled programs, `JAX_COMPILATION_CACHE_DIR`.

JAX compiles a program again if its file cannot be decompressed. zlib compares a checksum; zstd, as
JAX calls it, does not: one changed bit gave other results without an error, or ended the process.
JAX uses zstd wherever Python has it (3.14, or the package zstandard).
"""

import importlib
import os
import re
from collections.abc import Callable

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_PROBLEM = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL
)


def use_checksums() -> None:
    """Lets JAX compress compiled programs with zlib, if the environment sets a cache.

    The names are JAX's own (0.10 to 0.12); where one is missing, nothing is changed.
    """
    if os.environ.get(_VARIABLE):
        module = importlib.import_module("jax._src.compilation_cache")
        for name in ("zstd", "zstandard"):
            if hasattr(module, name):
                setattr(module, name, None)


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
