"""Measurements of vla_jax alone: memory, start-up, checkpointing, data loading."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from train.benchmark import jax_runs
from train.benchmark.cases import BenchmarkSizes
from train.benchmark.timing import Comparison, Spread, check, spread
from train.configs import ImitateConfig, gpu_end_to_end
from train.imitate import make_batches, make_loss
from train.setup import compute_norm_stats, init_params, make_windows
from vla_jax import config as configs
from vla_jax.backbones import registry
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.data import dataset
from vla_jax.data.dataset import Dataset, Episode
from vla_jax.data.loader import Loader
from vla_jax.data.packing import Packed
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.recurrent_trunk import recurrence_config
from vla_jax.training import checkpoint, optim, parallel
from vla_jax.training.update import init_train_state, make_update, with_count
from vla_jax.types import Batch, Metrics, Tokens

NUM_UPDATES = 6  # checkpoints saved, and updates timed before each


class Measurement(NamedTuple):
    """One measured quantity."""

    case: str
    setting: str  # sizes, as text
    quantity: str
    value: Spread
    unit: str


def memory(sizes: BenchmarkSizes) -> Iterator[Measurement]:
    """Yields temporary memory without rematerialisation, and with chunks of √T steps.

    Measured are the recurrence, forward and backward, and the whole training step. Gradients are
    compared for the recurrence alone: a head's ReLU may amplify a rounding error.

    Raises:
      ValueError: the gradients differ.
    """
    for batch_size, num_steps in sizes.long_sequences:
        decoder = replace(sizes.decoder, window_size=num_steps)
        remat = replace(decoder, remat_chunk=math.isqrt(num_steps))
        setting = f"{jax_runs.describe_sizes(decoder, batch_size)}, remat_chunk {remat.remat_chunk}"
        _check_gradients(setting, (decoder, remat), batch_size)
        for part, count in (("recurrence", _recurrence_bytes), ("training step", _step_bytes)):
            without, with_remat = count(decoder, batch_size), count(remat, batch_size)
            yield measured("memory", setting, f"{part} without remat", [without / 1e6], "MB")
            yield measured("memory", setting, f"{part} with remat", [with_remat / 1e6], "MB")
            yield measured(
                "memory", setting, f"{part}, with / without", [100 * with_remat / without], "%"
            )


def _check_gradients(setting: str, decoders: Sequence[DecoderConfig], batch_size: int) -> None:
    recurrences = [recurrence_config(decoder) for decoder in decoders]
    drawn = jax_runs.draw_sequence(recurrences[0], batch_size, decoders[0].window_size)
    implementations = [
        jax_runs.run_recurrence(f"remat_chunk {config.remat_chunk}", config, *drawn)
        for config in recurrences
    ]
    check(Comparison("memory", setting, 0.0, implementations))


def _recurrence_bytes(decoder: DecoderConfig, batch_size: int) -> int:
    config = recurrence_config(decoder)
    drawn = jax_runs.draw_sequence(config, batch_size, decoder.window_size)
    return jax_runs.temporary_bytes(config, *drawn)


def _step_bytes(decoder: DecoderConfig, batch_size: int) -> int:
    update, _ = jax_runs.compile_update(decoder, *jax_runs.draw_demonstrations(decoder, batch_size))
    return update.memory_analysis().temp_size_in_bytes


# Program of a new process: imports, compilation and the first update.
_START = """
import time
began = time.perf_counter()
import json, sys
import jax
from train.benchmark import jax_runs
from vla_jax import config
from vla_jax.policies.decoder_config import DecoderConfig
imported = time.perf_counter()
decoder = config.from_dict(DecoderConfig, json.loads(sys.argv[1]))
params, *batch = jax_runs.draw_demonstrations(decoder, int(sys.argv[2]))
update, begin = jax_runs.compile_update(decoder, params, *batch)
jax.block_until_ready(update(begin(params), *batch))
print(json.dumps([imported - began, time.perf_counter() - imported]))
"""


def start(sizes: BenchmarkSizes) -> Iterator[Measurement]:
    """Yields seconds to the first update of a new process, with empty and filled compile cache."""
    setting = jax_runs.describe_sizes(sizes.decoder, sizes.batch_size)
    cold, warm = [], []
    for _ in range(sizes.num_starts):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(_start(sizes, folder))
            warm.append(_start(sizes, folder))
    yield measured("start", setting, "imports", [seconds for seconds, _ in cold + warm], "s")
    yield measured("start", setting, "first update, cache empty", [s for _, s in cold], "s")
    yield measured("start", setting, "first update, cache filled", [s for _, s in warm], "s")


def _start(sizes: BenchmarkSizes, folder: str) -> tuple[float, float]:
    """Returns seconds of the imports, and of compilation and the first update."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process holds most of a GPU's memory
    }
    arguments = json.dumps(configs.to_dict(sizes.decoder)), str(sizes.batch_size)
    done = subprocess.run(
        [sys.executable, "-c", _START, *arguments],
        env=os.environ | cache, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the new process failed: {done.stderr.splitlines()[-1:]}")
    imports, update = json.loads(done.stdout)
    return imports, update


def checkpoints(sizes: BenchmarkSizes) -> Iterator[Measurement]:
    """Yields the time to save params and Adam's moments, and the slowdown of the updates."""
    config, batch_size = sizes.decoder, sizes.batch_size
    params, *batch = jax_runs.draw_demonstrations(config, batch_size)
    update, begin = jax_runs.compile_update(config, params, *batch)
    state = begin(params)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def seconds() -> float:
        nonlocal state
        began = time.perf_counter()
        state, _ = jax.block_until_ready(update(state, *batch))
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        manager = checkpoint.open_checkpoints(folder, keep=1)
        seconds()
        alone, blocked, on_disk, during_save, lost = [], [], [], [], []
        for step in range(1, NUM_UPDATES + 1):
            alone += [seconds() for _ in range(NUM_UPDATES)]
            began = time.perf_counter()
            checkpoint.save(manager, step, state, {})
            blocked.append(time.perf_counter() - began)
            slow_seconds = []
            while checkpoint.latest_step(folder) != step:
                slow_seconds.append(seconds())
            on_disk.append(time.perf_counter() - began)
            expected = len(slow_seconds) * float(np.median(alone))
            lost.append(blocked[-1] + sum(slow_seconds) - expected)
            during_save += slow_seconds
        checkpoint.close(manager)
    setting = f"{jax_runs.describe_sizes(config, batch_size)}, {num_bytes / 1e6:.0f} MB of state"
    yield measured("checkpoints", setting, "save blocks the loop", blocked, "s")
    yield measured("checkpoints", setting, "until it is on disk", on_disk, "s")
    yield measured("checkpoints", setting, "an update alone", alone, "s")
    yield measured("checkpoints", setting, "an update during the save", during_save, "s")
    yield measured("checkpoints", setting, "time lost per save", lost, "s")


def loader(sizes: BenchmarkSizes) -> Iterator[Measurement]:
    """Yields windows per second of the loader and of the updates, and the time waited for data."""
    augment = gpu_end_to_end().augment
    demonstrations = _draw_demonstrations(sizes.imitation)
    from_tokens, from_images = sizes.num_updates
    frozen = replace(sizes.imitation, frozen_backbone=True)
    end_to_end = replace(sizes.imitation, frozen_backbone=False)
    for setting, config, num_updates in (
        ("tokens of a frozen encoder", frozen, from_tokens),
        ("images", end_to_end, from_images),
        ("images, augmented on the host", replace(end_to_end, augment=augment), from_images),
        (
            "images, augmented on the device",
            replace(end_to_end, augment=augment, augment_on="device"),
            from_images,
        ),
    ):
        decoder = config.agent.policy.decoder
        setting = f"B {config.loader.batch_size}, W {decoder.window_size}, {setting}"
        yield from _loader(setting, config, demonstrations, num_updates)


def _loader(
    setting: str, config: ImitateConfig, demonstrations: Dataset, num_updates: int
) -> Iterator[Measurement]:
    train, waited = _compile_training(config), 0.0
    with _draw_batches(config, demonstrations) as batches:
        batch = next(batches)
        jax.block_until_ready(train(batch))
        for _ in range(config.loader.prefetch + 1):  # batches prefetched before the clock started
            next(batches)
        load_seconds = _seconds(lambda: next(batches), num_updates)
        update_seconds = _seconds(lambda: train(batch), num_updates)

        def both() -> Any:
            nonlocal waited
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began
            return train(batch)

        total = num_updates * _seconds(both, num_updates)
    size = config.loader.batch_size
    yield measured("loader", setting, "loader alone", [size / load_seconds], "windows/s")
    yield measured("loader", setting, "updates alone", [size / update_seconds], "windows/s")
    yield measured("loader", setting, "both, time waited for data", [100 * waited / total], "%")


def _compile_training(config: ImitateConfig) -> Callable[[Batch], Metrics]:
    """Returns a function that dispatches one update of `train.imitate` without blocking."""
    key, mesh = jax.random.key(0), parallel.make_mesh("data=1")
    freeze = ("backbone/*",) if config.frozen_backbone else ()
    params = init_params(key, config)
    settings = replace(config.optim, freeze=freeze)
    optimizer = optim.make_optimizer(settings, config.loop.num_updates, params)
    update = with_count(make_update(make_loss(config), optimizer, freeze=freeze))
    update = parallel.jit_update(update, mesh)
    state = parallel.replicate(init_train_state(params, optimizer), mesh)

    def train(batch: Batch) -> Metrics:
        nonlocal state
        state, metrics = update(state, parallel.shard_batch(batch, mesh), key)
        return metrics

    return train


def _draw_batches(config: ImitateConfig, demonstrations: Dataset) -> Loader:
    decoder, backbone = config.agent.policy.decoder, config.agent.policy.backbone
    num_frames = len(demonstrations.columns["action"])
    shape = (num_frames, backbone.num_tokens, backbone.token_dim)
    tokens = Tokens(np.ones(shape, np.float32), np.ones(shape[:-1], bool))
    windows = make_windows(
        config,
        demonstrations,
        compute_norm_stats(config, demonstrations),
        window_size=decoder.window_size,
        action_horizon=decoder.action_horizon,
        tokens=tokens if config.frozen_backbone else None,
    )
    return make_batches(config, Packed(windows) if config.pack else windows)


def _draw_demonstrations(config: ImitateConfig) -> Dataset:
    """Returns random episodes of two images and proprio, at most one window long."""
    rng, policy_config = np.random.default_rng(0), config.agent.policy
    spec = registry.get(policy_config.backbone).image_spec(policy_config.backbone)
    size = spec.height if spec else 0
    window_size = policy_config.decoder.window_size
    episodes = []
    for length in rng.integers(window_size // 3, window_size + 1, 2 * config.loader.batch_size):
        images = rng.integers(0, 256, (2, length, size, size, 3), np.uint8)
        observation = {
            "image_primary": images[0],
            "image_wrist": images[1],
            "proprio": rng.normal(size=(length, PerceiverConfig.proprio_dim)).astype(np.float32),
        }
        action = rng.uniform(-1, 1, (length, policy_config.decoder.action_dim)).astype(np.float32)
        episodes.append(Episode(observation, action, "lift the red block"))
    return dataset.from_episodes(episodes, fps=10)


def _seconds(run: Callable[[], Any], times: int) -> float:
    """Returns seconds per run, until the last result is ready."""
    began, result = time.perf_counter(), None
    for _ in range(times):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / times


def measured(case: str, setting: str, quantity: str, values: Any, unit: str) -> Measurement:
    """Returns the measurement of one quantity, from one value or several."""
    return Measurement(case, setting, quantity, spread(np.asarray(values)), unit)


MEASUREMENTS: dict[str, Callable[[BenchmarkSizes], Iterator[Measurement]]] = {
    "memory": memory,
    "start": start,
    "checkpoints": checkpoints,
    "loader": loader,
}
