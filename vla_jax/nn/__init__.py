"""Recurrent cells, the scan over time, attention: arrays in, arrays out."""
