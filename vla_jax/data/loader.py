"""Endless shuffled batches with grain; the position can be saved and resumed exactly.

grain shuffles, shards and prefetches batches of window *indices*. One NumPy indexing call then
gathers all windows of a batch, which keeps the cost per window small.
"""

import contextlib
import functools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from vla_jax import workers
from vla_jax.config import checked, differences
from vla_jax.data import image_augment as augmentation
from vla_jax.data.image_augment import AugmentConfig
from vla_jax.types import Batch

_MAX_REPEATS = 100  # times that a window may be in one batch
_AUGMENT_DRAWS = 2  # version of the random numbers of augmentation; the first had none


@dataclass(frozen=True)
@checked()
class LoaderConfig:
    """Batch size, parallelism and shuffling of a loader."""

    batch_size: int = 64  # B, windows per update, summed over all processes
    num_workers: int = 0  # worker processes; 0 = threads only, best with few cores
    num_threads: int = 1  # threads that assemble batches, per process; 0 = no prefetching
    prefetch: int = 2  # batches assembled ahead of time, per process
    seed: int = 0  # random seed of shuffling and augmentation
    shuffle: bool = True  # a new random order in every epoch; False = the order of the data

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("num_workers", "num_threads", "prefetch")

    def __post_init__(self) -> None:
        """Checks the sizes."""
        least = {"batch_size": 1, "prefetch": 1}
        for name, value in asdict(self).items():
            if value < least.get(name, 0):
                raise ValueError(f"{name} must be at least {least.get(name, 0)}, got {value}.")


class WindowSource(Protocol):
    """Windows that can be indexed in any order: `Windows`, `Packed` or `Mixed`."""

    identity: dict[str, Any]  # everything that the windows depend on, as flat JSON values
    names: tuple[str, ...]  # of the parts of a mixture; empty if there is only one data set
    sizes: tuple[int, ...]  # windows of each part, one after the other
    weights: tuple[float, ...]  # share of each part in the batches

    def __len__(self) -> int:
        """Returns the number of windows of all parts."""
        ...

    def __getitem__(self, index: Any, /) -> Batch:
        """Returns the batch of windows at an array of indices."""
        ...


class Loader:
    """Endless iterator of batches; its only state is the number of batches returned.

    Close it, or use it in a `with` statement, to end its threads and processes.
    """

    def __init__(
        self,
        dataset: Any,
        config: LoaderConfig,
        pipeline: dict[str, Any],
        passes: Mapping[str, float],
    ) -> None:
        """Wraps a grain `MapDataset` of batches; called by `make_loader`.

        Args:
          dataset: of the batches.
          config: of the loader.
          pipeline: everything that determines the batches.
          passes: part of a mixture -> share of its windows that one batch takes.
        """
        self._passes = passes
        self._dataset = dataset
        self._config = config
        self._pipeline = pipeline
        self._num_batches = 0
        self._iterator: Any = None

    def __iter__(self) -> "Loader":
        """Returns the loader itself: all iterators share one position."""
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
          ChildProcessError: a worker process was killed.
        """
        try:
            batch = self._next()
        except RuntimeError as error:
            killed = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            if killed is None:
                raise
            raise ChildProcessError(
                f"a process that loads batches ended with code {killed[1]}, perhaps for lack of "
                "memory; run the same command again to resume, with fewer --num-workers."
            ) from error
        self._num_batches += 1
        return batch

    def _next(self) -> Batch:
        if self._iterator is not None:
            return next(self._iterator)
        self._iterator = _start(self._dataset, self._config, self._num_batches)
        if not self._config.num_workers:
            return next(self._iterator)
        with workers.shielded():  # grain starts its processes now
            return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns position and pipeline, as JSON values."""
        return {"num_batches": self._num_batches, "pipeline": dict(self._pipeline)}

    def metrics(self) -> dict[str, float]:
        """Returns how often the windows of each part of a mixture were drawn, for the log."""
        return {f"epochs {name}": self._num_batches * part for name, part in self._passes.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues exactly from the position of `get_state`, in this or another process.

        Args:
          state: from `get_state` of a loader with the same pipeline. Threads, workers and
            prefetching may differ, since they do not change the batches.

        Raises:
          ValueError: the state belongs to another pipeline.
        """
        _check_pipeline(dict(state["pipeline"]), self._pipeline)
        self.close()
        self._num_batches = int(state["num_batches"])

    def close(self) -> None:
        """Ends threads and worker processes; keeps the position."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def __enter__(self) -> "Loader":
        """Returns the loader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the loader."""
        self.close()


def make_loader(
    source: WindowSource,
    config: LoaderConfig,
    *,
    augment: AugmentConfig | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Returns an endless iterator over batches of `source`.

    The n-th batches of all processes, one after the other, are the n-th batch of a single
    process, augmentation included.

    Args:
      source: windows, rows of packed episodes, or a mixture of either.
      config: total batch size, seed, workers.
      augment: image augmentation; None means none.
      process_index: place of this process's rows in a batch, 0 … process_count - 1.
      process_count: number of processes that train together.

    Returns:
      A loader of `Batch` with leading axis `B = batch_size / process_count`.

    Raises:
      ValueError: the batch size is not a multiple of the number of processes, or is far above the
        number of windows.
      ImportError: grain is missing.
    """
    if config.batch_size % process_count:
        raise ValueError(
            f"batch_size must be a multiple of the {process_count} processes, got "
            f"{config.batch_size}."
        )
    if config.batch_size > _MAX_REPEATS * sum(source.sizes):
        raise ValueError(
            f"batch_size must be at most {_MAX_REPEATS} times the {sum(source.sizes)} windows, got "
            f"{config.batch_size}."
        )
    dataset = _order(source, config)
    dataset = dataset.batch(config.batch_size // process_count, batch_fn=np.asarray)
    dataset = dataset[process_index::process_count]
    dataset = dataset.map(functools.partial(_read, source))
    if augment is not None:
        part = (process_index, process_count)
        # Without a seed, grain derives one from the number of transformations before this one.
        dataset = dataset.random_map(functools.partial(_augment, augment, part), seed=config.seed)
    pipeline = _pipeline(source, config, augment)
    total = sum(source.weights)
    passes = {
        name: config.batch_size * weight / total / size
        for name, weight, size in zip(source.names, source.weights, source.sizes, strict=False)
    }
    return Loader(dataset, config, pipeline, passes)


def _order(source: WindowSource, config: LoaderConfig) -> Any:
    """Returns the endless order of the window indices of all processes together."""
    grain, offset, parts = _import_grain(), 0, []
    for number, size in enumerate(source.sizes):
        part = grain.MapDataset.range(offset, offset + size).seed(config.seed + number)
        part = part.shuffle() if config.shuffle else part
        parts.append(part.repeat())
        offset += size
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, source.weights).seed(config.seed)


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
            ),
            worker_init_fn=_init_worker,
        )
    return iter(batches)


def _init_worker(index: int, count: int) -> None:
    del index, count
    workers.end_with_parent()


def _read(source: WindowSource, indices: np.ndarray) -> Batch:
    return source[indices]


def _augment(
    config: AugmentConfig, part: tuple[int, int], batch: Batch, rng: np.random.Generator
) -> Batch:
    return augmentation.apply(batch, config, rng, part=part)


def _pipeline(
    source: WindowSource,
    config: LoaderConfig,
    augment: AugmentConfig | None,
) -> dict[str, Any]:
    """Returns everything that determines the batches, as a flat dict of JSON values."""
    augment_fields = asdict(augment) if augment else {}
    if augment not in (None, AugmentConfig()):
        augment_fields["draws"] = _AUGMENT_DRAWS
    return {
        **source.identity,
        "num_windows": len(source),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "shuffle": config.shuffle,
        **{f"augment_{name}": value for name, value in augment_fields.items()},
    }


def _check_pipeline(saved: dict[str, Any], current: dict[str, Any]) -> None:
    # Earlier versions stored it; process p then took every process_count-th window.
    count = saved.pop("process_count", 1)
    if count > 1:
        raise ValueError(
            f"loader state must not come from several processes of an earlier version, got {count} "
            "processes, which took the windows in another order; start a new run."
        )
    differing = differences(saved, current)
    if differing:
        raise ValueError(
            f"loader state must come from the same pipeline, but {'; '.join(differing)}; "
            "restore the old settings, or start a new run."
        )


def _mark_flags_as_parsed() -> None:
    # grain's worker processes read absl flags, which only absl.app parses.
    from absl import flags

    with contextlib.suppress(flags.Error):  # parsed already, or a flag is required
        flags.FLAGS.mark_as_parsed()


def _import_grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "loading batches needs grain; install it with `pip install 'vla-jax[data]'`."
        ) from error
    return grain
