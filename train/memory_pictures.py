"""Memory suite from pictures: four tasks on the MuJoCo table, one of each suite.

    python -m train.memory_pictures
    python -m train.memory_pictures --tasks lit --decoders lstm fc
    python -m train.memory_pictures --features runs/table_lstm    # on another backbone's features

For each task: demonstrations are recorded as a LeRobot data set, an image encoder is pre-trained on
them, and every decoder is trained on its frozen tokens and evaluated on new episodes. Each step is
one of the other scripts; independent steps run in parallel, and finished steps are not repeated.
"""

import functools
import pathlib
import time
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from train import cache, configs, memory_pictures_page, memory_report
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
from train.memory_decoders import ACTION_HORIZON, HEAD_LAYERS
from train.pretrain import PretrainConfig
from train.record import RecordConfig
from vla_jax.backbones import registry
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.backbones.registry import BackboneConfig
from vla_jax.command_line import run
from vla_jax.config import check_names, checked, load
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.envs.demonstrations import WANDER_STEPS
from vla_jax.envs.memory_table import tasks
from vla_jax.envs.memory_table.memory_table_config import MAX_DELAY
from vla_jax.envs.memory_table.memory_task import INSTRUCTION_STEPS
from vla_jax.envs.memory_table.mujoco_memory import MujocoMemoryConfig
from vla_jax.evaluate import EvaluateConfig
from vla_jax.evaluation import report, results
from vla_jax.policies import policy, trunks
from vla_jax.runs import open_run, read_agent
from vla_jax.training.optim import OptimConfig
from vla_jax.training.run_lock import exclusive

_SECONDS_TO_ENCODE = 60.0  # for the estimate of the time left
_FIRST_SEED = 2_000_000  # of the test episodes


@dataclass(frozen=True)
@checked(
    delay=(0, MAX_DELAY), num_demonstrations=(2, 2**20), pretrain_updates=(1, 2**31 - 1),
    num_updates=(1, 2**31 - 1), hidden_size=(1, 2**16), num_episodes=(1, 2**20),
)  # fmt: skip
class MemoryPicturesConfig:
    """Tasks, policies and sizes of the memory suite from pictures."""

    tasks: tuple[str, ...] = ("blinks", "cups", "lit", "sequence")  # one of each suite
    decoders: tuple[str, ...] = ("lstm", "gru", "gpt", "fc")  # trunks to compare
    delay: int = 16  # mean steps between what is shown and the first action
    # run of train.imitate or train.pretrain whose frozen backbone gives the features; empty = an
    # image encoder is pre-trained on each task's demonstrations
    features: str = ""
    # episodes to record of each task; with 600 an LSTM overfits, as docs/memory.md shows
    num_demonstrations: int = 1800
    pretrain_updates: int = 1000  # updates of the image encoder of each task
    num_updates: int = 1000  # updates of each policy
    hidden_size: int = 128  # hidden units H of each policy
    learning_rate: float = 5e-3  # peak of the schedule
    transformer_learning_rate: float = 1e-3  # the same for transformers
    num_episodes: int = 120  # unseen episodes per evaluation
    num_videos: int = 2  # episodes to record as video in each evaluation
    seed: int = 0  # random seed of params and batches
    run_dir: str = "runs/memory_pictures"  # folder of data sets, runs and page

    def __post_init__(self):
        """Checks the names."""
        if not self.tasks or not self.decoders:
            raise ValueError("tasks and decoders must be at least one each, got none.")
        check_names("decoders", self.decoders, trunks.names())
        check_names("tasks", self.tasks, tasks.TASKS)
        for task in self.tasks:
            tasks.check(make_world(self, task))


@exclusive
def memory_pictures(config: MemoryPicturesConfig) -> pathlib.Path:
    """Runs all steps and prints a table; returns the page with the results."""
    began = time.perf_counter()
    steps = [step for task in config.tasks for step in make_steps(config, task)]
    run_dir = open_run(config.run_dir, config, overwrite=False)
    console = Console(stderr=True)
    run_steps(steps, run_dir / LOG, console=console, name="memory suite from pictures")
    evaluations = {
        task: {decoder: _evaluated(config, task, decoder) for decoder in config.decoders}
        for task in config.tasks
    }
    page = memory_pictures_page.write(
        run_dir,
        evaluations,
        chance=[_chance(config, task) for task in config.tasks],
        introduction=_introduction(config),
    )
    Console().print(make_table(config))
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    return page


def make_world(config: MemoryPicturesConfig, task: str) -> MujocoMemoryConfig:
    """Returns the world of a task, with images."""
    size = registry.image_size(read_backbone(config))
    return MujocoMemoryConfig(task=task, delay=config.delay, image_size=size)


def read_backbone(config: MemoryPicturesConfig) -> BackboneConfig:
    """Returns the config of the backbone that gives the features.

    Raises:
      FileNotFoundError: the run is missing.
      ValueError: a file of it is damaged.
    """
    folder = pathlib.Path(config.features)
    if not config.features:
        return PerceiverConfig()
    if (folder / "agent.json").is_file() or not (folder / "config.json").is_file():
        return read_agent(folder).policy.backbone
    return load(PretrainConfig, folder / "config.json").backbone


def make_steps(config: MemoryPicturesConfig, task: str) -> list[Step]:
    """Returns the steps of a task: recording, features, then trainings and evaluations."""
    folder = pathlib.Path(config.run_dir) / task
    dataset = DatasetConfig(str(folder / "demonstrations"), decode="whole")
    record = recording(
        RecordConfig(
            dataset.path,
            make_world(config, task),
            num_episodes=config.num_demonstrations,
            wander_steps=WANDER_STEPS,
        )
    )._replace(name=f"{task}: record")
    pretrain = PretrainConfig(dataset=dataset, run_dir=str(folder / "encoder"), seed=config.seed)
    pretrain = replace(
        pretrain,
        loader=replace(pretrain.loader, seed=config.seed),
        optim=_with_warmup(pretrain.optim, config.pretrain_updates),
        loop=replace(
            pretrain.loop, num_updates=config.pretrain_updates, save_every=config.pretrain_updates
        ),
    )
    source = config.features or pretrain.run_dir
    policies = [
        replace(make_policy(config, task, decoder), dataset=dataset, backbone_from=source)
        for decoder in config.decoders
    ]
    if config.features:
        encode = functools.partial(cache.cache, policies[0])
        tokens = Step(f"{task}: features", encode, lambda: 0.0, _SECONDS_TO_ENCODE, [record.name])
    else:
        tokens = pretraining(pretrain, policies[0], after=[record.name])
    steps = [record, tokens]
    for decoder, training_config in zip(config.decoders, policies, strict=True):
        trained = training(Policy(training_config, {}), after=[step.name for step in steps[:2]])
        options = EvaluateConfig(
            name=decoder, num_episodes=config.num_episodes, first_seed=_FIRST_SEED,
            num_videos=config.num_videos,
        )  # fmt: skip
        steps += [trained, evaluation(folder / decoder, options, after=[trained.name])]
    return steps


def make_policy(config: MemoryPicturesConfig, task: str, decoder: str) -> ImitateConfig:
    """Returns the training of a decoder: `table_lstm`, with what memory needs to be learned.

    A window holds a whole episode; gates start with time constants up to it, and chunks of actions
    reach from the delay into the acting part.
    """
    base, trunk = configs.table_lstm(), trunks.get(decoder)
    world = make_world(config, task)
    window_size = tasks.max_steps(world)
    connected = policy.connect(read_backbone(config), base.agent.policy.decoder)
    base = replace(base, agent=replace(base.agent, policy=connected))
    base = configs.with_decoder(
        base,
        kind=decoder,
        window_size=window_size,
        action_horizon=ACTION_HORIZON,
        hidden_size=config.hidden_size,
        num_layers=2 if trunk.is_transformer else 1,
        num_heads=4,
        head_sizes=(config.hidden_size,) * HEAD_LAYERS,
        gate_span=window_size,
    )
    mode = "persistent" if trunk.has_memory and "persistent" in trunk.modes else "refresh"
    return replace(
        base,
        run_dir=str(pathlib.Path(config.run_dir) / task / decoder),
        world=world,
        agent=replace(base.agent, mode=mode, instruction_steps=INSTRUCTION_STEPS),
        loader=replace(base.loader, seed=config.seed),
        optim=replace(
            _with_warmup(base.optim, config.num_updates),
            learning_rate=(
                config.transformer_learning_rate if trunk.is_transformer else config.learning_rate
            ),
        ),
        loop=replace(base.loop, num_updates=config.num_updates, save_every=config.num_updates),
        seed=config.seed,
    )


def _with_warmup(optim: OptimConfig, num_updates: int) -> OptimConfig:
    """Returns the config with a warm-up of at most a tenth of the training."""
    return replace(optim, warmup_steps=min(optim.warmup_steps, num_updates // 10))


def make_table(config: MemoryPicturesConfig) -> Table:
    """Returns the success rate of every decoder on every task, with its 95 % interval."""
    table = Table(title="Success on unseen episodes, from pictures", title_justify="left")
    for name in ("suite", "task", "chance"):
        table.add_column(name, no_wrap=True)  # a narrow terminal wraps the rates instead
    for name in config.decoders:
        table.add_column(name)
    for task in config.tasks:
        rates = [_rate(config, task, decoder) for decoder in config.decoders]
        table.add_row(tasks.get(task).suite, task, _chance(config, task), *rates)
    return table


def _introduction(config: MemoryPicturesConfig) -> str:
    size = registry.image_size(read_backbone(config))
    encoder = f"that of {config.features}" if config.features else "pre-trained on them"
    return (
        f"MuJoCo table, two images of {size} × {size} pixels, {config.num_demonstrations} "
        f"demonstrations of each task, image encoder {encoder} and frozen, {config.num_updates} "
        f"updates of each policy, seed {config.seed}, {config.num_episodes} unseen episodes."
    )


def _chance(config: MemoryPicturesConfig, task: str) -> str:
    return memory_report.small_percent(tasks.chance(make_world(config, task)))


def _evaluated(config: MemoryPicturesConfig, task: str, decoder: str) -> pathlib.Path:
    return pathlib.Path(config.run_dir) / task / decoder / "evaluation" / decoder


def _rate(config: MemoryPicturesConfig, task: str, decoder: str) -> str:
    total = report.read_evaluation(_evaluated(config, task, decoder)).summary.total
    return f"{results.percent(total.rate)} [{results.percent_interval(total.interval)}]"


def four_tasks() -> MemoryPicturesConfig:
    """One task of each suite, four decoders, one seed."""
    return MemoryPicturesConfig()


PRESETS = {"four_tasks": four_tasks}
if __name__ == "__main__":
    run(memory_pictures, PRESETS, description="Measures what policies remember from pictures.")
