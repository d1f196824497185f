"""Training scripts to read and edit: `python -m train.NAME --help`."""
