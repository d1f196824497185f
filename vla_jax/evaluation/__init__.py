"""Closed-loop results: reference players, intervals, plots, videos, report pages."""
