"""Processes that train the cells of the memory suite, several cells at a time.

The programs of a cell are small and use about one core each, so that as many cells as there are
cores run side by side.
"""

import contextlib
import functools
import os
import pathlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from train.memory_grid import CloningConfig, GridCell, Score
from vla_jax import compile_cache, workers
from vla_jax.training.malloc import keep_freed_memory

RunCell = Callable[..., Score]  # as `memory_grid.run_cell`
Progress = Callable[[int, float], None]  # (number of the cell, share of its updates so far)


class _Message(NamedTuple):
    """Message of a worker about its cell."""

    share: float = 1.0  # of its updates
    score: Score | None = None  # of a finished cell
    error: Exception | None = None  # of a failed one


class _Job(NamedTuple):
    """Arguments of a cell's function besides the cell."""

    run_cell: RunCell
    config: CloningConfig
    clones: pathlib.Path | None
    compiled: pathlib.Path | None


class _Worker(NamedTuple):
    """A process, and the cell that it trains."""

    process: SpawnProcess
    number: int  # of the cell


def run_cells(
    cells: Sequence[GridCell],
    config: CloningConfig,
    *,
    run_cell: RunCell,
    num_workers: int,
    progress: Progress,
    clones: pathlib.Path | None = None,
    compiled: pathlib.Path | None = None,
) -> Generator[Score, None, None]:
    """Yields the score of every cell, in the order in which they finish.

    Closing the generator, or an error in it, ends the workers; `contextlib.closing` does so.

    Args:
      cells: in the order in which they start.
      config: sizes of training and test.
      run_cell: `memory_grid.run_cell`; processes import it by its name.
      num_workers: processes; with one the cells run in this process.
      progress: is called after every block of updates.
      clones: folder for the trained policies; None = they are not kept.
      compiled: folder in which the processes share compiled programs, if the environment variable
        `JAX_COMPILATION_CACHE_DIR` names none; None = they do not.

    Raises:
      Exception: error of a cell.
      RuntimeError: a process was killed.
    """
    job = _Job(run_cell, config, clones, compiled)
    if min(num_workers, len(cells)) > 1:
        yield from _in_processes(cells, job, num_workers, progress)
        return
    for number, cell in enumerate(cells):
        yield _train(job, cell, functools.partial(progress, number))


def _in_processes(
    cells: Sequence[GridCell], job: _Job, num_workers: int, progress: Progress
) -> Generator[Score, None, None]:
    waiting, running = deque(range(len(cells))), dict[Connection, _Worker]()
    try:
        for _ in range(min(num_workers, len(cells))):
            connection, process = _start(job)
            running[connection] = _Worker(process, number := waiting.popleft())
            connection.send(cells[number])
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)  # so are all that it waits for
                worker = running[connection]
                message = _receive(connection, cells[worker.number])
                if message.error is not None:
                    raise message.error
                progress(worker.number, message.share)
                if message.score is None:
                    continue
                if waiting:
                    running[connection] = worker._replace(number=(number := waiting.popleft()))
                    connection.send(cells[number])
                else:
                    del running[connection]
                    connection.close()  # the worker then ends by itself
                yield message.score
    finally:
        for connection, worker in running.items():
            worker.process.kill()
            worker.process.join()
            connection.close()


def _start(job: _Job) -> tuple[Connection, SpawnProcess]:
    ours, theirs = workers.CONTEXT.Pipe()
    process = workers.CONTEXT.Process(target=_work, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()  # else the end of the worker would not end the stream
    return ours, process


def _receive(connection: Connection, cell: GridCell) -> _Message:
    try:
        return connection.recv()
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(
            f"the process that trained {cell.decoder} on {cell.world.task} was killed, perhaps for "
            "lack of memory; start again with fewer --num-workers, finished cells are kept."
        ) from error


def _work(connection: Connection, job: _Job) -> None:
    """Trains the cells that arrive, until the parent closes the connection or is gone."""
    keep_freed_memory()
    # Several processes share the memory of an accelerator.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # The expert's program is the same for all policies of a task: 15 s of CPU time each.
    compile_cache.protect(job.compiled)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent closed it, or is gone
        while True:
            cell = connection.recv()
            try:
                score = _train(job, cell, lambda share: connection.send(_Message(share)))
                message = _Message(score=score)
            except Exception as error:  # sent to the parent, which raises it
                message = _Message(error=error)
            connection.send(message)


def _train(job: _Job, cell: GridCell, progress: Callable[[float], None]) -> Score:
    num_updates = job.config.num_updates
    return job.run_cell(
        cell, job.config, lambda done: progress(min(done / num_updates, 1.0)), clones=job.clones
    )
