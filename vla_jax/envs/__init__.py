"""Worlds to act in: pure-JAX ones behind `types.Env`, Python ones behind `types.Simulator`."""
