"""The whole road on a laptop: demonstrations, eyes, memory, evaluation, one page to look at.

    python -m train.demo                             # the MuJoCo table from pictures
    python -m train.demo --world table_jax           # its JAX twin, without OpenGL
    python -m train.demo --preset table_jax_state    # LSTM, GRU, RNN, none: 3 minutes, no pictures
    python -m train.demo --preset table_jax_family   # GPT and encoder-decoder too

Every step is one of the other scripts, with a preset; what is finished is not done again.
"""

import pathlib
import time
from dataclasses import dataclass, replace
from typing import Literal, get_args

from rich.console import Console
from rich.table import Table

from train import configs
from train.configs import ImitateConfig
from train.imitate import imitate
from train.pretrain import PretrainConfig, pretrain
from train.record import RecordConfig, record
from vla_jax.command_line import run
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.envs.worlds import WORLDS, WorldConfig
from vla_jax.evaluate import EvaluateConfig, evaluate
from vla_jax.evaluation import report, results
from vla_jax.training.malloc import keep_freed_memory

Decoder = Literal["lstm", "gru", "rnn", "encoder_decoder", "gpt", "fc"]
SHOWN = {  # by decoder: its name in the table, and what it remembers there
    "lstm": ("LSTM", "persistent"),
    "gru": ("GRU", "persistent"),
    "rnn": ("RNN", "persistent"),
    "encoder_decoder": ("encoder-decoder", "persistent"),
    "gpt": ("GPT", "refresh"),
    "fc": ("memoryless (FC)", None),
}


@dataclass(frozen=True)
class DemoConfig:
    """What to show."""

    show: Literal["pictures", "state"] = "pictures"  # what the policies see
    world: Literal["table_mujoco", "table_jax"] = "table_mujoco"  # where
    run_dir: str = "runs/demo"  # folder to write to
    dataset: str = "demos/table"  # folder of the demonstrations
    num_demonstrations: int = 5000  # episodes to record
    num_episodes: int = 120  # unseen episodes to evaluate each policy on
    # Choose settings on other seeds, such as those of `evaluate`, which start at 1,000,000: a
    # figure from the seeds that a setting was chosen on would flatter it.
    first_seed: int = 2_000_000  # of these episodes
    num_videos: int = 4  # episodes to record of a policy that is recorded
    decoders: tuple[Decoder, ...] = ("lstm", "gru", "rnn", "fc")  # what is compared on the state

    def __post_init__(self):
        """Checks that something is compared."""
        if not self.decoders:
            raise ValueError("decoders must name at least one, got none; leave the option out.")


def table() -> DemoConfig:
    """Pictures and words to actions: LSTM against memoryless on the MuJoCo table, 12 minutes."""
    return DemoConfig()


def table_jax_state() -> DemoConfig:
    """From the state of the JAX twin: LSTM, GRU, RNN against memoryless, 3 minutes."""
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
    """The same with every decoder there is, an encoder-decoder and a GPT among them.

    10 minutes of CPU time; what to expect is in README.
    """
    return replace(table_jax_state(), decoders=get_args(Decoder))


PRESETS = {
    "table": table,
    "table_jax_state": table_jax_state,
    "table_jax_family": table_jax_family,
}
console = Console(stderr=True)


def demo(config: DemoConfig) -> pathlib.Path:
    """Does everything; returns the page."""
    began = time.perf_counter()
    run_dir = pathlib.Path(config.run_dir)
    world = WORLDS[config.world].config(image_size=64 if config.show == "pictures" else 0)
    dataset = pathlib.Path(config.dataset)
    if not (dataset / "meta" / "info.json").exists():
        console.rule(f"demonstrations: {config.num_demonstrations} episodes by the expert")
        record(RecordConfig(str(dataset), world, num_episodes=config.num_demonstrations))
    runs = _train_on_pictures if config.show == "pictures" else _train_on_state
    evaluations = _evaluate(config, runs(config, world))
    page = report.write_index(run_dir, evaluations=evaluations, title="vla_jax demo")
    _show(evaluations, time.perf_counter() - began, page)
    return page


def _demonstrations(config: DemoConfig) -> DatasetConfig:
    return DatasetConfig(config.dataset, decode="whole")  # small, and read thousands of times


def _train_on_pictures(config: DemoConfig, world: WorldConfig) -> dict:
    """Policies by name, with the options of each one's evaluation."""
    run_dir = pathlib.Path(config.run_dir)
    console.rule("pre-training: the encoder learns to see, from the simulator's block positions")
    dataset = _demonstrations(config)
    eyes = pretrain(PretrainConfig(dataset=dataset, run_dir=str(run_dir / "pretrain")))
    trained = {}
    for name, preset in (("lstm", configs.table_lstm), ("memoryless", configs.table_fc)):
        console.rule(f"imitation: {name}")
        base = replace(preset(), dataset=dataset, world=world, backbone_from=str(eyes))
        trained[name] = imitate(replace(base, run_dir=str(run_dir / name)))
    return {
        "LSTM, window spans the episode": (trained["lstm"], {"mode": "refresh"}),
        "LSTM, carry never reset": (trained["lstm"], {"mode": "persistent"}),
        "LSTM, last 4 steps only": (trained["lstm"], {"mode": "refresh", "window_size": 4}),
        "memoryless (FC)": (trained["memoryless"], {}),
        "expert that ignores the colour": (
            trained["lstm"], {"reference": "expert_ignoring_colour"},
        ),
    }  # fmt: skip


def _train_on_state(config: DemoConfig, world: WorldConfig) -> dict:
    run_dir = pathlib.Path(config.run_dir)
    evaluations = {}
    for decoder in config.decoders:
        console.rule(f"imitation: {decoder}")
        base = replace(_state_preset(decoder), dataset=_demonstrations(config), world=world)
        trained = imitate(replace(base, run_dir=str(run_dir / decoder)))
        name, mode = SHOWN[decoder]
        evaluations[name] = (trained, {"mode": mode} if mode else {})
    expert = (run_dir / config.decoders[0], {"reference": "expert_ignoring_colour"})
    return evaluations | {"expert that ignores the colour": expert}


def _state_preset(decoder: Decoder) -> ImitateConfig:
    if decoder == "encoder_decoder":
        return configs.table_jax_encoder_decoder()
    if decoder == "gpt":
        return configs.table_jax_gpt()
    return configs.with_kind(configs.table_jax_state(), decoder)


def _evaluate(config: DemoConfig, policies: dict) -> dict[str, pathlib.Path]:
    console.rule(f"evaluation: {config.num_episodes} unseen episodes each")
    evaluations = {}
    for name, (folder, options) in policies.items():
        recorded = "reference" not in options and "persistent" not in options.values()
        chosen = EvaluateConfig(
            name=_folder(name),
            num_episodes=config.num_episodes,
            first_seed=config.first_seed,
            num_videos=config.num_videos * recorded,
            **options,
        )
        evaluate(folder, chosen, console=console)
        evaluations[name] = folder / "evaluation" / _folder(name)
    return evaluations


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-").replace("--", "-")


def _show(evaluations: dict[str, pathlib.Path], seconds: float, page: pathlib.Path) -> None:
    table = Table(title="success on unseen layouts, instruction shown at the first step only")
    for column in ("policy", "mean over tasks", "95 % interval", "touch", "lift", "place"):
        table.add_column(column)
    for name, folder in evaluations.items():
        summary = report.read_evaluation(folder).summary
        tasks = [results.percent(summary.tasks[task].rate) for task in ("touch", "lift", "place")]
        mean = results.percent(summary.task_mean)
        table.add_row(name, mean, results.percent_interval(summary.task_mean_interval), *tasks)
    Console().print(table)
    print(f"{seconds / 60:.1f} minutes; open {page}")


if __name__ == "__main__":
    keep_freed_memory()
    run(demo, PRESETS, description="Shows the whole road, from demonstrations to videos.")
