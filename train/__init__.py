"""Scripts that a researcher reads and edits: `python -m train.NAME --help`."""
