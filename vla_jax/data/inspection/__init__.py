"""Inspection of a data set: one pass over its episodes, and what looks wrong in them."""
