"""Recurrent vision-language-action policies in JAX; the modules are the interface."""

__version__ = "0.1.0"
