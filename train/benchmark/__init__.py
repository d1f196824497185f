"""Benchmarks: `python -m train.benchmark` and `python -m train.benchmark.throughput`."""
