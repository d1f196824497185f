"""Data sets in HDF5 files, one file per layout."""
