"""Chains of five instructions on the JAX table: success of 1 … 5 in a row and average length.

    python -m train.chains                                                 # six policies
    python -m train.chains --all-at-start --policies lstm rotary_gpt       # all given at the start
    python -m train.chains --run runs/table_jax_state --mode persistent    # tests a trained run

The policies clone the table's expert from its chains; the seeds are trained in one program.
Results are appended to the run folder policy by policy, and an interrupted run continues.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from train import memory_cloning, memory_grid
from train.memory_cloning import Clones
from train.memory_decoders import Variant
from train.memory_grid import CloningConfig
from vla_jax import files, records
from vla_jax.acting.observation_spec import observation_spec
from vla_jax.command_line import run
from vla_jax.config import check_names, checked
from vla_jax.data.dataset import digest
from vla_jax.envs.table import chain_env
from vla_jax.envs.table.chain_env import ChainConfig
from vla_jax.policies.trunk import Mode
from vla_jax.runs import Run, check_run, load_run, open_run
from vla_jax.training.progress import progress_bar
from vla_jax.training.run_lock import exclusive
from vla_jax.types import Env

RESULTS = "results.jsonl"
_WHOLE, _WINDOW = 96, 24  # steps of most chains of the expert, and of most of its instructions
# Policies that share a training have the same kind and window.
POLICIES = {
    "fc": Variant("fc", "refresh", _WINDOW),
    "lstm": Variant("lstm", "persistent", _WHOLE),
    "lstm_refresh": Variant("lstm", "refresh", _WINDOW),
    "lstm_periodic": Variant("lstm", "periodic", _WINDOW),
    "gpt_refresh": Variant("gpt", "refresh", _WINDOW),
    "rotary_gpt": Variant("rotary_gpt", "persistent", _WHOLE),
}


@dataclass(frozen=True)
@checked(num_chains=(1, 2**20), length=(1, 100))
class ChainsConfig:
    """Policies and chains."""

    policies: tuple[str, ...] = tuple(POLICIES)  # policies to train and test
    num_chains: int = 1000  # chains of each seed
    length: int = 5  # instructions of a chain
    all_at_start: bool = False  # whether all instructions are given in the first steps
    # training of each policy; num_episodes is not used
    cloning: CloningConfig = CloningConfig(
        num_demonstrations=8000,
        num_updates=2000,
        batch_size=16,
        hidden_size=128,
        recall_weight=0.0,
    )
    run: str = ""  # run folder of train.imitate to test in place of the policies; empty = none
    mode: Mode | None = None  # streaming mode of that run; None = as in training
    run_dir: str = "runs/chains"  # folder of results and table
    overwrite: bool = False  # whether to delete earlier results in the folder

    def __post_init__(self):
        """Checks the names."""
        check_names("policies", self.policies, POLICIES)
        if self.cloning.recall_weight:
            raise ValueError(
                "recall_weight must be 0, since chains have no recall, got "
                f"{self.cloning.recall_weight}; set it to 0."
            )
        if not self.policies:
            raise ValueError(f"policies must be one or more of {', '.join(POLICIES)}, got none.")
        if self.mode is not None and not self.run:
            raise ValueError(f"mode must be None without run, got '{self.mode}'; omit it.")


class ChainScore(NamedTuple):
    """Chains of one policy; a line of the results."""

    policy: str
    all_at_start: bool
    in_a_row: list[list[float]]  # [S, length] rate of chains with at least 1, 2, … done
    average: list[float]  # [S] average length: instructions done per chain, the sum of the rates
    seconds: float  # training and test
    of: dict[str, Any]  # settings that the result depends on


def in_a_row(done: np.ndarray, length: int) -> np.ndarray:
    """Returns the rates `[S, length]` of chains in which at least 1, 2, … instructions were done.

    Args:
      done: `[S, num_chains]`, instructions done in each chain.
      length: of the chains.
    """
    return np.mean(done[:, :, None] >= np.arange(1, length + 1), axis=1)


@exclusive
def chain_suite(config: ChainsConfig) -> pathlib.Path:
    """Trains and tests the policies; returns the run folder."""
    # Everything is checked before the folder is changed.
    check_run(config.run_dir, config, overwrite=config.overwrite)
    env = chain_env.make(ChainConfig(length=config.length, all_at_start=config.all_at_start))
    loaded = _load(env, config) if config.run else None
    settings = _settings(config, loaded)
    scores = [] if config.overwrite else _read(pathlib.Path(config.run_dir), config, settings)
    run_dir = open_run(config.run_dir, config, overwrite=config.overwrite)
    names = (config.run,) if config.run else config.policies
    trained: dict[tuple[str, int], Clones] = {}
    console = Console(stderr=True)
    for name in names:
        if name in {score.policy for score in scores}:
            continue
        start = time.monotonic()
        done = (
            _play_policy(env, name, config, trained, console)
            if loaded is None
            else _play_run(env, loaded, config)
        )
        score = ChainScore(
            name,
            config.all_at_start,
            in_a_row(done, config.length).tolist(),
            done.mean(axis=1).tolist(),
            time.monotonic() - start,
            settings,
        )
        files.append_json_line(run_dir / RESULTS, score._asdict())
        scores.append(score)
        console.print(f"{name}: average length {_mean_and_range(score.average)}", soft_wrap=True)
    console.print(table(scores))
    return run_dir


def _play_policy(
    env: Env,
    name: str,
    config: ChainsConfig,
    trained: dict[tuple[str, int], Clones],
    console: Console,
) -> np.ndarray:
    """Trains a policy, unless one of the same training is there, and returns what it did `[S, n]`.

    Args:
      env: of chains.
      name: of the policy.
      config: of the script.
      trained: clones by kind and window; a new one is added.
      console: shows the progress of the training.
    """
    variant, cloning = POLICIES[name], config.cloning
    keys = jax.vmap(jax.random.key)(cloning.seed + np.arange(cloning.num_seeds))
    same = variant.kind, variant.window_size
    if same not in trained:
        total, seeds = cloning.num_updates, f"seeds: {cloning.num_seeds}"
        with progress_bar(name, total, unit="updates", console=console) as show:
            trained[same] = memory_cloning.clone(
                env,
                variant,
                keys=keys,
                num_demonstrations=cloning.num_demonstrations,
                num_updates=total,
                batch_size=cloning.batch_size,
                hidden_size=cloning.hidden_size,
                joint_sizes=cloning.joint_sizes,
                recall_weight=cloning.recall_weight,
                learning_rate=memory_grid.learning_rate(cloning, variant.kind),
                progress=lambda done: show(min(done, total), seeds),
            )
    clones = trained[same]
    clones = clones._replace(agent=dataclasses.replace(clones.agent, mode=variant.mode))
    key = jax.random.fold_in(keys[0], 2)
    return np.asarray(memory_cloning.play(env, variant, clones, key, config.num_chains).return_)


def _load(env: Env, config: ChainsConfig) -> Run:
    """Returns the run to test, in the mode of the config.

    Raises:
      FileNotFoundError: the run, or one of its files, is missing.
      ValueError: a file is damaged; the policy has no such mode, or was not trained for this table.
    """
    loaded = load_run(config.run)
    if config.mode is not None:
        loaded = loaded._replace(agent=dataclasses.replace(loaded.agent, mode=config.mode))
    assert env.expert is not None
    state, observation = jax.eval_shape(env.reset, jax.random.key(0))
    given = {name: part.shape for name, part in observation._asdict().items() if part is not None}
    needed = observation_spec(loaded.agent, loaded.norm_stats)
    action = jax.eval_shape(env.expert, state)
    taken = {name: part.shape for name, part in needed.items() if name != "instruction"}
    sizes = {**taken, "action": (loaded.agent.policy.decoder.action_dim,)}
    expected = {**{name: given.get(name) for name in taken}, "action": action.shape}
    if sizes != expected:
        raise ValueError(
            f"run must be a policy of the JAX table's state, with {expected}, got {sizes} in "
            f"{config.run}; train one with python -m train.imitate --preset table_jax_state."
        )
    return loaded


def _play_run(env: Env, loaded: Run, config: ChainsConfig) -> np.ndarray:
    """Returns the instructions that the policy of a run did in each chain, `[1, num_chains]`."""
    agent = loaded.agent
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], loaded.params)
    clones = Clones(agent, loaded.norm_stats, params, np.zeros((0, 1)))
    variant = Variant(agent.policy.decoder.kind, agent.mode)
    key = jax.random.key(config.cloning.seed)
    return np.asarray(memory_cloning.play(env, variant, clones, key, config.num_chains).return_)


def table(scores: list[ChainScore]) -> Table:
    """Returns the scores as a table: means over the seeds, and of the length also its range."""
    length = max((len(score.in_a_row[0]) for score in scores), default=0)
    average = Column("average length", no_wrap=True)
    drawn = Table("policy", *map(str, range(1, length + 1)), average)
    for score in scores:
        rates = [f"{100 * rate:.0f} %" for rate in np.mean(score.in_a_row, axis=0)]
        drawn.add_row(score.policy, *rates, _mean_and_range(score.average))
    return drawn


def _mean_and_range(values: list[float]) -> str:
    return f"{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def _settings(config: ChainsConfig, loaded: Run | None) -> dict[str, Any]:
    """Returns everything that a result depends on, as JSON has it."""
    own = {"num_chains": config.num_chains, "length": config.length, "mode": config.mode or ""}
    of_run = {} if loaded is None else _of_run(loaded)
    return {**own, **memory_grid.of_network(config.cloning), **of_run}


def _of_run(run: Run) -> dict[str, Any]:
    """Returns what distinguishes a run from one of the same folder that was trained further."""
    acting = run.agent, run.norm_stats, jax.tree.map(np.asarray, run.params)
    return {"step": run.step, "policy": digest(*acting)}


def _read(
    run_dir: pathlib.Path, config: ChainsConfig, settings: Mapping[str, Any]
) -> list[ChainScore]:
    """Returns the earlier results of the same settings."""
    num_seeds = 1 if config.run else config.cloning.num_seeds

    def select(line: Mapping[str, Any]) -> bool:
        all_at_start = records.get(line, "all_at_start", bool)
        return records.get(line, "of", dict) == settings and all_at_start == config.all_at_start

    def fault(score: ChainScore) -> str:
        shape = [len(rates) for rates in score.in_a_row], len(score.average)
        return (
            ""
            if shape == ([config.length] * num_seeds, num_seeds)
            else f"it must be of {num_seeds} seeds and {config.length} instructions"
        )

    bounds = {"in_a_row": (0, 1), "average": (0, config.length)}
    path = run_dir / RESULTS
    return list(records.read_lines(ChainScore, path, bounds=bounds, select=select, fault=fault))


def full() -> ChainsConfig:
    """Six policies, three seeds, 1,000 chains of five each: hours on 2 CPU cores."""
    return ChainsConfig()


CHAINS = {preset.__name__: preset for preset in (full,)}
if __name__ == "__main__":
    run(chain_suite, CHAINS, description="Measures chains of instructions.")
