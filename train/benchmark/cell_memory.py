"""Memory of the parallel form of every cell that has one, and of its steps."""

from collections.abc import Iterator

from train.benchmark import cell_runs, jax_runs
from train.benchmark.cases import BenchmarkSizes
from train.benchmark.system import Measurement, measured
from vla_jax.nn.recurrence import RecurrenceConfig


def parallel_forms(sizes: BenchmarkSizes) -> Iterator[Measurement]:
    """Yields the temporary memory of each program of `cell_runs.parallel_forms`."""
    hidden_size, batch_size, num_steps = sizes.parallel
    setting = f"H {hidden_size}, B {batch_size}, T {num_steps}, forward and backward"
    for cell, loops in cell_runs.parallel_loops().items():
        for loop in loops:
            config = RecurrenceConfig(
                cell, 1, hidden_size, dtype=sizes.decoder.dtype, implementation=loop
            )
            num_bytes = jax_runs.temporary_bytes(
                config, *cell_runs.draw(config, batch_size, num_steps)
            )
            yield measured("parallel", setting, f"{cell}, {loop}", [num_bytes / 1e6], "MB")
