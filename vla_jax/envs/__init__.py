"""Environments: pure JAX functions (`types.Env`) and Python simulators (`types.Simulator`)."""
