"""End-to-end demonstration: record, pre-train, imitate, evaluate, and one page with the results.

    python -m train.demo                             # the MuJoCo table, from images
    python -m train.demo --world table_jax           # the JAX table, which needs no OpenGL
    python -m train.demo --preset table_jax_state    # LSTM, GRU, RNN, FC; no images: 3 minutes
    python -m train.demo --preset table_jax_family   # GPT and encoder-decoder as well
    python -m train.demo --num-trainings 5           # mean and range over five trainings

Every step is one of the other scripts with a preset. Independent steps run in parallel processes;
finished steps are not repeated. The steps' output is written to `RUN_DIR/log.txt`.
"""

import pathlib
import time
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from train import configs, record
from train.configs import ImitateConfig
from train.demo_steps import (
    LOG,
    Policy,
    Step,
    evaluation,
    pretraining,
    recording,
    run_steps,
    training,
)
from train.pretrain import PretrainConfig
from train.record import RecordConfig
from vla_jax.command_line import run
from vla_jax.config import MAX_LENGTH, checked
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.envs.worlds import WorldConfig
from vla_jax.evaluate import EvaluateConfig
from vla_jax.evaluation import report, results
from vla_jax.policies import trunks
from vla_jax.runs import open_run
from vla_jax.training.run_lock import exclusive

Decoder = Literal["lstm", "gru", "rnn", "encoder_decoder", "gpt", "fc"]
TITLES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "rnn": "RNN",
    "encoder_decoder": "encoder-decoder",
    "gpt": "GPT",
    "fc": "memoryless (FC)",
}
EXPERT = "expert that ignores the colour"


@dataclass(frozen=True)
@checked(num_demonstrations=(1, MAX_LENGTH), num_episodes=(1, MAX_LENGTH), num_trainings=(0, 1000))
class DemoConfig:
    """Options of the demonstration."""

    show: Literal["images", "state"] = "images"  # input of the policies
    world: Literal["table_mujoco", "table_jax"] = (
        "table_mujoco"  # environment to record and evaluate in
    )
    run_dir: str = "runs/demo"  # folder to write to
    dataset: str = "demos/table"  # folder of the demonstrations
    num_demonstrations: int = 3500  # episodes to record
    num_trainings: int = 1  # trainings of each policy; seeds 0, 1, … on the same demonstrations
    num_episodes: int = 120  # unseen episodes per evaluation
    # Tune settings on other seeds, such as those of `evaluate`, which start at 1,000,000:
    # results on the seeds used for tuning are biased upwards.
    first_seed: int = 2_000_000  # seed of the first of these episodes
    num_videos: int = 3  # episodes to record as video in each evaluation of a policy on images
    # decoders to compare, with show "state" only
    decoders: tuple[Decoder, ...] = ("lstm", "gru", "rnn", "fc")

    MAY_CHANGE: ClassVar[tuple[str, ...]] = (  # every step checks its own part
        "dataset", "num_trainings", "num_episodes", "first_seed", "num_videos", "decoders",
    )  # fmt: skip

    def __post_init__(self):
        """Checks the decoders and the counts."""
        if not self.decoders:
            raise ValueError("decoders must name at least one, got none; omit the option.")
        if self.num_trainings < 1:
            raise ValueError(f"num_trainings must be at least 1, got {self.num_trainings}.")


def table() -> DemoConfig:
    """Images and instructions to actions: LSTM and memoryless policy on the MuJoCo table."""
    return DemoConfig()


def table_jax_state() -> DemoConfig:
    """Simulator state to actions on the JAX table: LSTM, GRU, RNN and memoryless, 3 minutes."""
    return DemoConfig(
        show="state",
        world="table_jax",
        run_dir="runs/demo_state",
        dataset="demos/table_jax_state",
        num_demonstrations=16000,
        num_episodes=600,
        num_videos=0,
    )


def table_jax_family() -> DemoConfig:
    """`table_jax_state` with all decoders, also encoder-decoder and GPT: 10 minutes of CPU time."""
    return replace(table_jax_state(), decoders=get_args(Decoder))


PRESETS = {
    "table": table,
    "table_jax_state": table_jax_state,
    "table_jax_family": table_jax_family,
}


@exclusive
def demo(config: DemoConfig) -> pathlib.Path:
    """Runs all steps and prints a table; returns the page with the results."""
    began = time.perf_counter()
    steps, evaluations = make_steps(config)
    run_dir = open_run(config.run_dir, config, overwrite=False)
    run_steps(steps, run_dir / LOG, console=Console(stderr=True))
    first = {title: folders[0] for title, folders in evaluations.items()}
    page = report.write_index(run_dir, evaluations=first, title="vla_jax demo")
    Console().print(make_table(evaluations))
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes; open {page}")
    return page


def make_steps(config: DemoConfig) -> tuple[list[Step], dict[str, list[pathlib.Path]]]:
    """Returns the steps, and the folders of every evaluation by title, one per training."""
    on_images = config.show == "images"
    make = _on_images if on_images else _on_state
    world = replace(record.PRESETS[config.world]().world, image_size=64 if on_images else 0)
    demonstrations = RecordConfig(config.dataset, world, num_episodes=config.num_demonstrations)
    steps = [recording(demonstrations)]
    evaluations: dict[str, list[pathlib.Path]] = {}
    for seed in range(config.num_trainings):
        root = pathlib.Path(config.run_dir) / (f"seed{seed}" if seed else "")
        before, policies = make(config, world, root, seed)
        after = [step.name for step in (*steps[:1], *before)]
        steps += before
        for policy in policies:
            trained = training(policy, after=after)
            steps.append(trained)
            for title, options in policy.evaluations.items():
                folder = pathlib.Path(policy.config.run_dir)
                steps.append(evaluation(folder, options, after=[trained.name]))
                evaluations.setdefault(title, []).append(folder / "evaluation" / str(options.name))
    return steps, evaluations


def _on_images(
    config: DemoConfig, world: WorldConfig, root: pathlib.Path, seed: int
) -> tuple[list[Step], list[Policy]]:
    """Returns the pre-training step, and the policies on its frozen image encoder."""
    pretrain = PretrainConfig(
        dataset=_demonstrations(config), run_dir=str(root / "pretrain"), seed=seed
    )
    pretrain = replace(pretrain, loader=replace(pretrain.loader, seed=seed))
    lstm, fc = (
        replace(
            _imitation(preset(), config, world, root / name, seed),
            backbone_from=pretrain.run_dir,
        )
        for name, preset in (("lstm", configs.table_lstm), ("memoryless", configs.table_fc))
    )
    with_videos = _evaluation(config, num_videos=config.num_videos)
    policies = [
        Policy(
            lstm,
            {
                "LSTM": replace(with_videos, name="lstm", mode="persistent"),
                "LSTM, last 4 steps only": replace(
                    with_videos, name="lstm-last-4", mode="refresh", window_size=4
                ),
            },
        ),
        Policy(fc, {"memoryless (FC)": replace(with_videos, name="memoryless")}),
    ]
    policies[1].evaluations[EXPERT] = _expert(config)
    return [pretraining(pretrain, lstm, after=["record"])], policies


def _on_state(
    config: DemoConfig, world: WorldConfig, root: pathlib.Path, seed: int
) -> tuple[list[Step], list[Policy]]:
    """Returns the policies on the simulator's state, which need no pre-training."""
    policies = []
    for decoder in config.decoders:
        base = _imitation(_state_preset(decoder), config, world, root / decoder, seed)
        trunk = trunks.get(base.agent.policy.decoder.kind)
        mode = "persistent" if trunk.has_memory and "persistent" in trunk.modes else None
        options = replace(_evaluation(config), name=decoder, mode=mode)
        policies.append(Policy(base, {TITLES[decoder]: options}))
    policies[0].evaluations[EXPERT] = _expert(config)
    return [], policies


def _imitation(
    base: ImitateConfig, config: DemoConfig, world: WorldConfig, run_dir: pathlib.Path, seed: int
) -> ImitateConfig:
    return replace(
        base,
        dataset=_demonstrations(config),
        world=world,
        run_dir=str(run_dir),
        seed=seed,
        loader=replace(base.loader, seed=seed),
    )


def _demonstrations(config: DemoConfig) -> DatasetConfig:
    return DatasetConfig(config.dataset, decode="whole")  # small, and read thousands of times


def _evaluation(config: DemoConfig, num_videos: int = 0) -> EvaluateConfig:
    return EvaluateConfig(
        num_episodes=config.num_episodes, first_seed=config.first_seed, num_videos=num_videos
    )


def _expert(config: DemoConfig) -> EvaluateConfig:
    return replace(_evaluation(config), name="expert", reference="expert_ignoring_colour")


def _state_preset(decoder: Decoder) -> ImitateConfig:
    if decoder == "encoder_decoder":
        return configs.table_jax_encoder_decoder()
    if decoder == "gpt":
        return configs.table_jax_gpt()
    return configs.with_kind(configs.table_jax_state(), decoder)


def make_table(evaluations: dict[str, list[pathlib.Path]]) -> Table:
    """Returns success rates by policy, with the interval of one training or range of several."""
    tasks = ("touch", "lift", "place")
    num_trainings = max(len(folders) for folders in evaluations.values())
    spread = "95 % interval" if num_trainings == 1 else f"range of {num_trainings} trainings"
    table = Table(title="success on unseen layouts, instruction shown at the first step only")
    for column in ("policy", "mean over tasks", spread, *tasks):
        table.add_column(column)
    for title, folders in evaluations.items():
        summaries = [report.read_evaluation(folder).summary for folder in folders]
        # NaN where no episode of a task was completed: it has no rate, nor has the mean.
        rates = np.array([[_rate(s, task) for task in tasks] for s in summaries], np.float64)
        means = rates.mean(axis=1)
        row = [float(rate) for rate in (means.mean(), *rates.mean(axis=0))]
        mean, *by_task = (results.percent(None if np.isnan(rate) else rate) for rate in row)
        interval = (float(means.min()), float(means.max()))
        if num_trainings == 1:
            interval = summaries[0].task_mean_interval
        shown = "–" if np.isnan(row[0]) else results.percent_interval(interval)
        table.add_row(title, mean, shown, *by_task)
    return table


def _rate(summary: results.Summary, task: str) -> float | None:
    return summary.tasks[task].rate if task in summary.tasks else None


if __name__ == "__main__":
    run(
        demo,
        PRESETS,
        description="Runs recording, training and evaluation; writes one page with results.",
    )
