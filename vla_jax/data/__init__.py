"""Episode files -> windows -> batches. NumPy only: worker processes must not touch the device."""
