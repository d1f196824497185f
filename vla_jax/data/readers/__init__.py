"""Data-set formats, one file or folder each."""
