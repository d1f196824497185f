"""Data-set formats, one file or folder each."""

from vla_jax.data.readers.reader import open_source as open

__all__ = ["open"]
