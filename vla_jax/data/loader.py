"""Endless shuffled batches on grain, with a position that can be saved and resumed exactly.

What grain shuffles, shards and prefetches are batches of window *indices*; all windows of a
batch are cut by one NumPy indexing call, which is what keeps the cost per window small.
"""

import contextlib
import functools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vla_jax.config import differences
from vla_jax.data import image_augment as augmentation
from vla_jax.data.image_augment import AugmentConfig
from vla_jax.data.packing import Packed
from vla_jax.data.windows import Windows
from vla_jax.types import Batch


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made."""

    batch_size: int = 64  # B, windows per update over all processes
    num_workers: int = 0  # worker processes; 0 = threads only, best on few cores
    num_threads: int = 1  # threads that cut batches, per process; 0 = when asked
    prefetch: int = 2  # batches made ahead, per process
    seed: int = 0  # of the shuffling and the augmentation
    shuffle: bool = True  # a new order in every epoch; False = in order

    def __post_init__(self) -> None:
        """Checks the sizes."""
        least = {"batch_size": 1, "prefetch": 1}
        for name, value in asdict(self).items():
            if value < least.get(name, 0):
                raise ValueError(f"{name} must be at least {least.get(name, 0)}, got {value}.")


class Loader:
    """An endless iterator of batches; its whole state is the number of batches given.

    Close it, or use it in a `with` statement, so that threads and processes end.
    """

    def __init__(self, dataset: Any, config: LoaderConfig, pipeline: dict[str, Any]) -> None:
        """Takes a grain `MapDataset` of batches; `make_loader` builds it."""
        self._dataset = dataset
        self._config = config
        self._pipeline = pipeline
        self._num_batches = 0
        self._iterator: Any = None

    def __iter__(self) -> "Loader":
        """The loader itself: a position is shared by all who iterate."""
        return self

    def __next__(self) -> Batch:
        """The next batch."""
        if self._iterator is None:
            self._iterator = _start(self._dataset, self._config, self._num_batches)
        batch = next(self._iterator)
        self._num_batches += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Position and pipeline, JSON-able."""
        return {"num_batches": self._num_batches, "pipeline": dict(self._pipeline)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `get_state` was called, to the bit, in this or another process.

        Args:
          state: from `get_state` of a loader with the same pipeline. Threads, workers and
            prefetching may differ: they do not change the batches.

        Raises:
          ValueError: the state belongs to another pipeline.
        """
        _check_pipeline(state["pipeline"], self._pipeline)
        self.close()
        self._num_batches = int(state["num_batches"])

    def close(self) -> None:
        """Ends threads and worker processes; the position is kept."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def __enter__(self) -> "Loader":
        """The loader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the loader."""
        self.close()


def make_loader(
    source: Windows | Packed,
    config: LoaderConfig,
    *,
    augment: AugmentConfig | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """An endless iterator over batches of `source`.

    Every epoch is shuffled anew, alike in all processes, and dealt out to them in turn: batch n
    of all processes together is batch n of a single one. What does not divide among the
    processes is left out of that epoch.

    Args:
      source: the windows, or the rows of packed episodes.
      config: batch size over all processes, seed, workers.
      augment: image augmentation; None means none.
      process_index: this process, 0 … process_count - 1.
      process_count: processes that train together.

    Returns:
      A loader of `Batch` with leading axis `B = batch_size / process_count`.

    Raises:
      ValueError: the batch does not divide among the processes; fewer windows than processes.
      ImportError: grain is missing.
    """
    if config.batch_size % process_count:
        raise ValueError(
            f"batch_size must divide among {process_count} processes, got {config.batch_size}."
        )
    if len(source) < process_count:
        raise ValueError(
            f"source must hold at least one window for each of {process_count} processes, "
            f"got {len(source)}; use fewer processes or a smaller stride."
        )
    grain = _import_grain()
    dataset = grain.MapDataset.range(len(source)).seed(config.seed)
    if config.shuffle:
        dataset = dataset.shuffle()
    share = len(source) // process_count * process_count
    dataset = dataset[process_index:share:process_count].repeat()
    dataset = dataset.batch(config.batch_size // process_count, batch_fn=np.asarray)
    dataset = dataset.map(functools.partial(_read, source))
    if augment is not None:
        dataset = dataset.random_map(functools.partial(_augment, augment))
    pipeline = _pipeline(source, config, augment, process_count)
    return Loader(dataset, config, pipeline)


def _start(dataset: Any, config: LoaderConfig, num_batches: int) -> Any:
    grain = _import_grain()
    options = grain.ReadOptions(
        num_threads=config.num_threads,
        prefetch_buffer_size=config.prefetch if config.num_threads else 0,
    )
    batches = dataset[num_batches:].to_iter_dataset(options)
    if config.num_workers:
        _mark_flags_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.num_workers, per_worker_buffer_size=config.prefetch
            )
        )
    return iter(batches)


def _read(source: Windows | Packed, indices: np.ndarray) -> Batch:
    return source[indices]


def _augment(config: AugmentConfig, batch: Batch, rng: np.random.Generator) -> Batch:
    return augmentation.apply(batch, config, rng)


def _pipeline(
    source: Windows | Packed,
    config: LoaderConfig,
    augment: AugmentConfig | None,
    process_count: int,
) -> dict[str, Any]:
    """All that decides which batches come, flat and JSON-able."""
    changes = asdict(augment) if augment else {}
    return {
        **source.identity,
        "num_windows": len(source),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "shuffle": config.shuffle,
        "process_count": process_count,
        **{f"augment_{name}": value for name, value in changes.items()},
    }


def _check_pipeline(saved: dict[str, Any], current: dict[str, Any]) -> None:
    differing = differences(saved, current)
    if differing:
        raise ValueError(
            f"loader state must come from the same pipeline, but {'; '.join(differing)}; "
            "restore the old settings, or start a new run."
        )


def _mark_flags_as_parsed() -> None:
    # grain's worker processes read absl flags, which no program outside absl.app ever parses.
    from absl import flags

    with contextlib.suppress(flags.Error):
        flags.FLAGS.mark_as_parsed()


def _import_grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "loading batches needs grain; install it with `pip install 'vla-jax[data]'`."
        ) from error
    return grain
