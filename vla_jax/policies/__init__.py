"""Policies: trunks, heads and decoders, over windows and one step at a time."""
