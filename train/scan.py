"""Training and test of an encoder-decoder on SCAN: commands to action sequences.

    python -m train.scan --split simple
    python -m train.scan --split addprim_jump --run-dir runs/jump
    python -m train.scan --preset bottleneck --run-dir runs/bottleneck
    python -m train.scan --preset one_by_one --split addprim_turn_left --run-dir runs/turn_left

Training uses teacher forcing, or scheduled sampling (`--schedule`). The test decodes
greedily and reports exact match: a command counts if all its actions and its end are right. The
same command line resumes an interrupted run, with bitwise identical results. Choose hyperparameters
with `--holdout 0.1`, not on the test set.
"""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax import config as configs
from vla_jax.command_line import run
from vla_jax.config import checked
from vla_jax.data import scan_commands
from vla_jax.data.buckets import Buckets
from vla_jax.data.scan_commands import Pair, Split
from vla_jax.evaluation import plots
from vla_jax.nn import scheduled_sampling, search, seq2seq
from vla_jax.nn.scheduled_sampling import SamplingConfig
from vla_jax.nn.search import SearchResult
from vla_jax.nn.seq2seq import Seq2SeqConfig
from vla_jax.runs import check_run, open_run, save_json
from vla_jax.training import loop, losses, optim, parallel
from vla_jax.training.distributed import together
from vla_jax.training.logs import read_metrics
from vla_jax.training.loop import LoopConfig, check_resume, fit, random_start
from vla_jax.training.malloc import keep_freed_memory
from vla_jax.training.optim import OptimConfig
from vla_jax.training.parallel import is_first_process, make_mesh, row_part
from vla_jax.training.run_lock import exclusive
from vla_jax.training.update import (
    Counted,
    LossFn,
    TrainState,
    averaged_params,
    init_train_state,
    make_update,
    with_count,
)
from vla_jax.types import Array, Key, Metrics, Params

MAX_STEPS = 64  # decoding steps at most; the longest target has 48 actions
TEST_BATCH_SIZE = 512  # commands decoded at a time
PLOTTED = "walk opposite left twice after run around right"  # command whose attention is plotted


@dataclass(frozen=True)
@checked(width_step=(0, MAX_STEPS))
class ScanConfig:
    """Config of one training on SCAN."""

    split: Split = "simple"  # division of the commands into training and test set
    holdout: float = 0.0  # test on this fraction of the training set, not on the test set; 0 = off
    run_dir: str = "runs/scan"  # folder of checkpoints, metrics and results
    batch_size: int = 128  # commands B per update
    width_step: int = 8  # targets are padded to a multiple of this many steps
    sampling: SamplingConfig = SamplingConfig()  # scheduled sampling; teacher forcing by default
    force_whole_targets: bool = False  # draw teacher forcing once per target, not at every step
    model: Seq2SeqConfig = Seq2SeqConfig()  # sizes of the encoder-decoder
    optim: OptimConfig = OptimConfig(  # learning rate, weight decay and EMA
        learning_rate=2e-3, end_factor=0.01, b2=0.99, weight_decay=0.0, ema_decay=0.999
    )
    loop: LoopConfig = LoopConfig(
        num_updates=4500, save_every=1500
    )  # number of updates, logs and checkpoints
    seed: int = 0  # seed of params, dropout, shuffling and the split
    overwrite: bool = False  # delete an earlier run in run_dir

    def __post_init__(self):
        """Checks the numbers."""
        for name in ("batch_size", "width_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout must be in [0, 1), got {self.holdout}.")
        _check_vocabulary("source", self.model.source, self.model.source_size, scan_commands.WORDS)
        _check_vocabulary(
            "target", self.model.target, self.model.target_size, scan_commands.ACTIONS
        )
        if self.force_whole_targets and self.sampling.schedule == "always":
            raise ValueError(
                "force_whole_targets must be False with schedule 'always', got True; choose a "
                "schedule of teacher forcing, such as --schedule linear."
            )


def _check_vocabulary(name: str, kind: str, size: int, words: Sequence[str]) -> None:
    """Raises a ValueError unless the model has an id for every word, and one for the end."""
    if kind != "tokens":
        raise ValueError(f"model.{name} must be 'tokens', since SCAN has words, got '{kind}'.")
    if size <= len(words):
        raise ValueError(
            f"model.{name}_size must be at least {1 + len(words)}, an id for each word of SCAN and "
            f"for the end, got {size}."
        )


def attention() -> ScanConfig:
    """Bidirectional LSTM encoder, attention, LSTM decoder.

    Exact match 99.8 % on split "simple", 6 minutes on 2 CPU cores.
    """
    return ScanConfig(model=_model(score="general"))


def bottleneck() -> ScanConfig:
    """Encoder-decoder without attention: one vector encodes the whole command.

    Exact match 99.0 % on split "simple" after 3,000 updates.
    """
    return ScanConfig(model=_model(score="none"))


def one_by_one() -> ScanConfig:
    """100,000 single commands without attention, as Lake & Baroni 2018 (arXiv:1711.00350) trained.

    Two LSTM layers of 200 units in one direction, dropout 0.5, teacher forcing of a command with
    probability 0.5, Adam with a constant learning rate. Differences: each epoch has every command
    once, the loss is the mean over a command's actions, decoding in training goes on after the end,
    and there is dropout before the output too. Exact match 63.2 % [46, 79] on split
    "addprim_turn_left", five seeds. Half an hour on one CPU core.
    """
    return ScanConfig(
        batch_size=1,
        sampling=SamplingConfig("linear", slope=1.0, min_rate=0.5),  # 0.5 after the first update
        force_whole_targets=True,
        model=replace(
            _model(score="none", bidirectional=False),
            num_layers=2, hidden_size=200, embed_size=200, dropout=0.5,
        ),
        optim=OptimConfig(
            learning_rate=1e-3, warmup_steps=0, end_factor=1.0, b2=0.999, weight_decay=0.0,
            max_grad_norm=5.0,
        ),
        loop=LoopConfig(num_updates=100_000, save_every=10_000, log_every=1000),
    )  # fmt: skip


PRESETS = {"attention": attention, "bottleneck": bottleneck, "one_by_one": one_by_one}


@together
@exclusive
def train(config: ScanConfig) -> pathlib.Path:
    """Trains and tests; returns the run's folder."""
    # Check the settings before anything slow starts.
    params_key, key = jax.random.split(jax.random.key(config.seed))
    shapes = jax.eval_shape(lambda key: seq2seq.init(key, config.model), params_key)
    loop.check(
        config.loop,
        config.optim,
        batch_size=config.batch_size,
        sharding_rules=seq2seq.SHARDING,
        params=shapes,
    )
    check_run(config.run_dir, config, overwrite=config.overwrite)

    # Data: pairs of strings, as ids.
    train_pairs, test_pairs = data_sets(config)
    index, count = row_part(make_mesh(config.loop.mesh))
    loader = Buckets(
        scan_commands.to_ids(train_pairs),
        batch_size=config.batch_size,
        width_step=config.width_step,
        seed=config.seed,
        process_index=index,
        process_count=count,
    )

    # Loss, update.
    num_updates = config.loop.num_updates
    optimizer = optim.make_optimizer(config.optim, num_updates, shapes)
    ema_decay = config.optim.ema_decay
    freeze, train = config.optim.freeze, config.optim.train
    update = make_update(
        make_loss(config),
        optimizer,
        ema_decay=ema_decay,
        freeze=freeze,
        train=train,
        skip_bad=config.loop.skip_bad_updates > 0,
    )

    def init_state(key: Key) -> TrainState:
        return init_train_state(
            seq2seq.init(key, config.model),
            optimizer,
            ema=ema_decay is not None,
            freeze=freeze,
            train=train,
        )

    # Loop, from the last checkpoint if there is one.
    metadata = {"config": configs.to_dict(config)}
    if not config.overwrite:
        check_resume(pathlib.Path(config.run_dir), loader, metadata)
    run_dir = open_run(config.run_dir, config, overwrite=config.overwrite)
    train_state = fit(
        config.loop,
        run_dir,
        with_count(update),
        random_start(init_state, params_key),
        loader,
        key,
        schedule=optim.make_schedule(config.optim, num_updates),
        metadata=metadata,
        name=run_dir.name,
        sharding_rules=seq2seq.SHARDING,
    )

    # Test: greedy decoding of every command.
    params = parallel.fetch(averaged_params(train_state), parallel.make_mesh(config.loop.mesh))
    if is_first_process():
        report(config, run_dir, params, test_pairs)
    return run_dir


def report(
    config: ScanConfig, run_dir: pathlib.Path, params: Params, test_pairs: Sequence[Pair]
) -> None:
    """Tests the params, and writes `test.json` and the plots."""
    result = test(params, config.model, test_pairs)
    metrics = read_metrics(run_dir / "metrics.jsonl")
    result |= {"split": config.split, "train_seconds": train_seconds(metrics)}
    save_json(result, run_dir / "test.json")
    plot(run_dir, params, config.model, metrics)
    print(f"{config.split}: exact match {result['exact_match']:.2%} of {result['commands']}")


def data_sets(config: ScanConfig) -> tuple[list[Pair], list[Pair]]:
    """Returns training and test set."""
    train_pairs, test_pairs = scan_commands.split(config.split, seed=config.seed)
    if config.holdout:
        return scan_commands.hold_out(train_pairs, config.holdout, seed=config.seed)
    return train_pairs, test_pairs


def make_loss(config: ScanConfig) -> LossFn:
    """Returns the loss function: cross-entropy of the actions and of the end after them."""
    model = config.model

    def loss_fn(params: Params, counted: Counted, key: Key) -> tuple[jax.Array, Metrics]:
        source, target = counted.batch
        encoder_key, decoder_key, choice_key = jax.random.split(key, 3)
        memory = seq2seq.encode(params, model, source, mask=source > 0, key=encoder_key)
        rate = scheduled_sampling.rate(config.sampling, counted.num_updates)
        if rate is None:
            decoded = seq2seq.teacher_forcing(params, model, memory, target, key=decoder_key)
        else:
            if config.force_whole_targets:
                rate = jax.random.bernoulli(choice_key, rate, source.shape[:1]).astype(jnp.float32)
            decoded = scheduled_sampling.scheduled_sampling(
                params, model, memory, target, rate, decoder_key
            )
        return losses.token_loss(decoded.outputs, target, seq2seq.target_mask(target))

    return loss_fn


@partial(jax.jit, static_argnums=1)
def decode(params: Params, model: Seq2SeqConfig, source: Array) -> SearchResult:
    """Returns greedily decoded actions for words `[B, S]`."""
    memory = seq2seq.encode(params, model, source, mask=source > 0)
    return search.greedy(params, model, memory, max_steps=MAX_STEPS)


def test(params: Params, model: Seq2SeqConfig, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Returns exact match, in total and by number of actions, and examples of errors."""
    ids = scan_commands.to_ids(pairs)
    expected = np.pad(ids.target, [(0, 0), (0, MAX_STEPS - ids.target.shape[1])])
    num_batches = -(-len(pairs) // TEST_BATCH_SIZE)
    batches = np.resize(np.arange(len(pairs)), (num_batches, TEST_BATCH_SIZE))
    decoded = np.concatenate([decode(params, model, ids.source[rows]).ids for rows in batches])
    decoded = decoded[: len(pairs)]
    is_correct = (decoded == expected).all(axis=1)
    lengths = np.count_nonzero(expected, axis=1)
    return {
        "exact_match": float(is_correct.mean()),
        "commands": len(pairs),
        "by_actions": {int(n): float(is_correct[lengths == n].mean()) for n in np.unique(lengths)},
        "wrong": [
            {
                **pairs[i]._asdict(),
                "decoded": scan_commands.to_text(decoded[i], scan_commands.ACTIONS),
            }
            for i in np.flatnonzero(~is_correct)[:20]
        ],
    }


def train_seconds(metrics: Sequence[Mapping[str, float]]) -> float:
    """Returns seconds of training, over all interruptions, compilation included."""
    steps = [0.0, *(line["step"] for line in metrics)]
    rates = [line["steps_per_second"] for line in metrics]
    return sum((b - a) / rate for a, b, rate in zip(steps, steps[1:], rates, strict=False))


def plot(
    run_dir: pathlib.Path,
    params: Params,
    model: Seq2SeqConfig,
    metrics: Sequence[Mapping[str, float]],
) -> None:
    """Plots the learning curves, and the attention weights for one command."""
    plots.training(run_dir / "training.png", metrics)
    source = scan_commands.to_ids(
        [pair for pair in scan_commands.commands() if pair.command == PLOTTED]
    ).source
    decoded = jax.device_get(decode(params, model, source))
    if decoded.weights is not None:
        actions = scan_commands.to_text(decoded.ids[0], scan_commands.ACTIONS).split()
        if len(actions) < MAX_STEPS:  # an untrained model may never end
            actions.append("end")
        plots.attention(
            run_dir / "attention.png",
            decoded.weights[0, : len(actions)],
            PLOTTED.split(),
            actions,
            title=PLOTTED,
        )


def _model(**changes: Any) -> Seq2SeqConfig:
    return Seq2SeqConfig(
        source_size=1 + len(scan_commands.WORDS),
        target_size=1 + len(scan_commands.ACTIONS),
        embed_size=64,
        dropout=0.1,
        **changes,
    )


if __name__ == "__main__":
    keep_freed_memory()
    run(train, PRESETS, description="Trains an encoder-decoder on SCAN.")
