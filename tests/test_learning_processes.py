"""Learning from reward in two processes equals one process, and only the first one writes."""

import pathlib

import numpy as np
import pytest
from processes import run_together

from train.reinforce import ReinforceConfig, make_reinforce
from vla_jax.envs.grid import GridConfig
from vla_jax.rl.learner import SeedsConfig
from vla_jax.rl.learning_loop import learn
from vla_jax.rl.network import NetworkConfig
from vla_jax.training.logs import read_metrics
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig

SEEDS = SeedsConfig(
    num_seeds=2, num_envs=8, num_steps=6, eval_episodes=4, report_episodes=6, solved_at=2.0
)
PROGRAM = """
from test_learning_processes import train
first, resumed = (train(args[0], num_devices=4) for _ in range(2))
assert first.report["return"].tolist() == resumed.report["return"].tolist()
"""


def train(directory, num_devices):
    loop = LoopConfig(num_updates=4, log_every=2, save_every=2, mesh=f"data={num_devices}")
    config = ReinforceConfig(
        world=GridConfig(size=3, num_obstacles=1, max_steps=8),
        network=NetworkConfig(kind="gru", hidden_sizes=(8,), memory_size=8),
        optim=OptimConfig(warmup_steps=0, learning_rate=3e-3),
        loop=loop,
    )
    return learn(SEEDS, loop, pathlib.Path(directory), make_reinforce(config), 0, name="run")


@pytest.mark.slow
def test_two_processes_equal_one_and_the_first_one_writes(tmp_path):
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    stderr = [errors for _, errors in run_together(PROGRAM, shared)]
    assert ["run 4/4" in errors for errors in stderr] == [True, False]
    train(alone, num_devices=1)
    one, other = (read_metrics(folder / "metrics.jsonl") for folder in (shared, alone))
    assert [line["step"] for line in one] == [2, 4]
    for name in ("loss", "grad_norm", "reward", "return/00", "success/01"):
        np.testing.assert_allclose(
            [line[name] for line in one], [line[name] for line in other], atol=1e-4, err_msg=name
        )
