"""The rest of the path of a training: its memory, its start, its checkpoints, its data.

These are no contests: each work gives figures of ours.
"""

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

from train.benchmark import baselines, jax_runs
from train.benchmark.cases import Sizes
from train.benchmark.timing import Contest, Spread, check, spread
from train.configs import ImitateConfig, gpu_end_to_end
from train.imitate import make_batches, make_loss
from train.setup import compute_norm_stats, init_params, make_windows
from vla_jax import config as configs
from vla_jax.data import dataset
from vla_jax.data.dataset import Dataset, Episode
from vla_jax.data.loader import Loader
from vla_jax.nn import recurrence
from vla_jax.policies.decoders import DecoderConfig, recurrence_config
from vla_jax.training import checkpoint, optim, parallel
from vla_jax.training.update import init_train_state, make_update, with_count
from vla_jax.types import Batch, Metrics

NUM_UPDATES = 6  # timed beside the saving


class Figure(NamedTuple):
    """One thing that was measured."""

    work: str
    case: str  # its sizes, in words
    what: str
    value: Spread
    unit: str


def memory(sizes: Sizes) -> Iterator[Figure]:
    """What is needed beside arguments and results, without remat and with chunks of √T steps.

    Of the recurrence forward and backward, and of the training step around it. That both give the
    same gradients is checked on the recurrence: a head's ReLU may turn a rounding error into more.

    Raises:
      ValueError: the gradients differ.
    """
    for batch_size, num_steps in sizes.long:
        decoder = replace(sizes.decoder, window_size=num_steps)
        remat = replace(decoder, remat_chunk=math.isqrt(num_steps))
        case = f"{jax_runs.decoder_case(decoder, batch_size)}, remat_chunk {remat.remat_chunk}"
        _check_alike(case, (decoder, remat), batch_size)
        for what, needed in (("recurrence", _recurrence_bytes), ("training step", _step_bytes)):
            without, with_remat = needed(decoder, batch_size), needed(remat, batch_size)
            yield _figure("memory", case, f"{what} without remat", [without / 1e6], "MB")
            yield _figure("memory", case, f"{what} with remat", [with_remat / 1e6], "MB")
            yield _figure("memory", case, f"{what}, share", [100 * with_remat / without], "%")


def _check_alike(case: str, decoders: Sequence[DecoderConfig], batch_size: int) -> None:
    kinds = [recurrence_config(decoder) for decoder in decoders]
    drawn = jax_runs.draw_sequence(kinds[0], batch_size, decoders[0].window_size)
    contestants = [
        jax_runs.run_recurrence(f"remat_chunk {kind.remat_chunk}", kind, *drawn) for kind in kinds
    ]
    check(Contest("memory", case, 0.0, contestants))


def _recurrence_bytes(decoder: DecoderConfig, batch_size: int) -> int:
    config = recurrence_config(decoder)
    drawn = jax_runs.draw_sequence(config, batch_size, decoder.window_size)
    run = baselines.both_ways(lambda own, inputs: recurrence.apply(own, config, inputs)[1])
    return run.lower(*drawn).compile().memory_analysis().temp_size_in_bytes


def _step_bytes(decoder: DecoderConfig, batch_size: int) -> int:
    update, _ = jax_runs.compile_update(decoder, *jax_runs.draw_demonstrations(decoder, batch_size))
    return update.memory_analysis().temp_size_in_bytes


# What a fresh process does until its first update is done.
_START = """
import time
began = time.perf_counter()
import json, sys
import jax
from train import ours
from vla_jax import config
from vla_jax.decoders import DecoderConfig
imported = time.perf_counter()
decoder = config.from_dict(DecoderConfig, json.loads(sys.argv[1]))
params, *batch = ours.draw_demonstrations(decoder, int(sys.argv[2]))
update, begin = ours.compile_update(decoder, params, *batch)
jax.block_until_ready(update(begin(params), *batch))
print(json.dumps([imported - began, time.perf_counter() - imported]))
"""


def start(sizes: Sizes) -> Iterator[Figure]:
    """How long a fresh process takes to its first update, compile cache empty and filled."""
    case = jax_runs.decoder_case(sizes.decoder, sizes.batch_size)
    cold, warm = [], []
    for _ in range(sizes.starts):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(_start(sizes, folder))
            warm.append(_start(sizes, folder))
    yield _figure("start", case, "imports", [seconds for seconds, _ in cold + warm], "s")
    yield _figure("start", case, "first update, cache empty", [s for _, s in cold], "s")
    yield _figure("start", case, "first update, cache filled", [s for _, s in warm], "s")


def _start(sizes: Sizes, folder: str) -> tuple[float, float]:
    """Seconds of the imports, and from there to the first update."""
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
        raise RuntimeError(f"a fresh process could not train: {done.stderr.splitlines()[-1:]}")
    imports, update = json.loads(done.stdout)
    return imports, update


def checkpoints(sizes: Sizes) -> Iterator[Figure]:
    """What saving the params and Adam's moments costs the updates around it."""
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
        saving = checkpoint.open_checkpoints(folder, keep=1)
        seconds()
        alone, blocked, on_disk, meanwhile, lost = [], [], [], [], []
        for step in range(1, NUM_UPDATES + 1):
            alone += [seconds() for _ in range(NUM_UPDATES)]
            began = time.perf_counter()
            checkpoint.save(saving, step, state, {})
            blocked.append(time.perf_counter() - began)
            slowed = []
            while checkpoint.latest_step(folder) != step:
                slowed.append(seconds())
            on_disk.append(time.perf_counter() - began)
            lost.append(blocked[-1] + sum(slowed) - len(slowed) * float(np.median(alone)))
            meanwhile += slowed
        checkpoint.close(saving)
    case = f"{jax_runs.decoder_case(config, batch_size)}, {num_bytes / 1e6:.0f} MB of state"
    yield _figure("checkpoints", case, "save blocks the loop", blocked, "s")
    yield _figure("checkpoints", case, "until it is on disk", on_disk, "s")
    yield _figure("checkpoints", case, "an update alone", alone, "s")
    yield _figure("checkpoints", case, "an update meanwhile", meanwhile, "s")
    yield _figure("checkpoints", case, "lost per save", lost, "s")


def loader(sizes: Sizes) -> Iterator[Figure]:
    """Windows per second that the loader gives and that an update takes, and who waits."""
    wild = gpu_end_to_end().augment
    demonstrations = _draw_demonstrations(sizes.imitation)
    from_tokens, from_pictures = sizes.updates
    frozen = replace(sizes.imitation, frozen_backbone=True)
    seeing = replace(sizes.imitation, frozen_backbone=False)
    for case, config, num_updates in (
        ("tokens of a frozen encoder", frozen, from_tokens),
        ("pictures", seeing, from_pictures),
        ("pictures, changed on the host", replace(seeing, augment=wild), from_pictures),
        (
            "pictures, changed on the device",
            replace(seeing, augment=wild, augment_on="device"),
            from_pictures,
        ),
    ):
        decoder = config.agent.policy.decoder
        case = f"B {config.loader.batch_size}, W {decoder.window_size}, {case}"
        yield from _loader(case, config, demonstrations, num_updates)


def _loader(
    case: str, config: ImitateConfig, demonstrations: Dataset, num_updates: int
) -> Iterator[Figure]:
    train, waited = _compile_training(config), 0.0
    with _draw_batches(config, demonstrations) as batches:
        batch = next(batches)
        jax.block_until_ready(train(batch))
        for _ in range(config.loader.prefetch + 1):  # those were made while nobody looked
            next(batches)
        giving = _seconds(lambda: next(batches), num_updates)
        taking = _seconds(lambda: train(batch), num_updates)

        def both() -> Any:
            nonlocal waited
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began
            return train(batch)

        whole = num_updates * _seconds(both, num_updates)
    size = config.loader.batch_size
    yield _figure("loader", case, "the loader alone gives", [size / giving], "windows/s")
    yield _figure("loader", case, "updates alone take", [size / taking], "windows/s")
    yield _figure("loader", case, "together, time waited for data", [100 * waited / whole], "%")


def _compile_training(config: ImitateConfig) -> Callable[[Batch], Metrics]:
    """One update of `train.imitate` after the other, not waited for."""
    key, mesh = jax.random.key(0), parallel.make_mesh(1)
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
    windows = make_windows(
        config,
        demonstrations,
        compute_norm_stats(config, demonstrations),
        window_size=decoder.window_size,
        action_horizon=decoder.action_horizon,
        tokens=np.ones(shape, np.float32) if config.frozen_backbone else None,
    )
    return make_batches(config, windows)


def _draw_demonstrations(config: ImitateConfig) -> Dataset:
    """Two pictures and proprio in episodes that are no longer than a window, as in the demo."""
    rng, parts = np.random.default_rng(0), config.agent.policy
    size: int = getattr(parts.backbone, "image_size", 0)
    window_size = parts.decoder.window_size
    episodes = []
    for length in rng.integers(window_size // 3, window_size + 1, 2 * config.loader.batch_size):
        pictures = rng.integers(0, 256, (2, length, size, size, 3), np.uint8)
        observation = {
            "image_primary": pictures[0],
            "image_wrist": pictures[1],
            "proprio": rng.normal(size=(length, parts.backbone.proprio_dim)).astype(np.float32),
        }
        action = rng.uniform(-1, 1, (length, parts.decoder.action_dim)).astype(np.float32)
        episodes.append(Episode(observation, action, "lift the red block"))
    return dataset.from_episodes(episodes, fps=10)


def _seconds(run: Callable[[], Any], times: int) -> float:
    """Of one run; what the last gives is waited for."""
    began, last = time.perf_counter(), None
    for _ in range(times):
        last = run()
    jax.block_until_ready(last)
    return (time.perf_counter() - began) / times


def _figure(work: str, case: str, what: str, values: Any, unit: str) -> Figure:
    return Figure(work, case, what, spread(np.asarray(values)), unit)


FIGURES: dict[str, Callable[[Sizes], Iterator[Figure]]] = {
    "memory": memory,
    "start": start,
    "checkpoints": checkpoints,
    "loader": loader,
}
