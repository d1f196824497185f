"""Heads, trunks, decoders and policies, over windows and one step at a time."""
