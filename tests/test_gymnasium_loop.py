"""Learning in Gymnasium environments: returns, checkpoints, errors of an environment."""

import gymnasium
import jax
import numpy as np
import pytest

from train import deep_sarsa, reinforce
from train.deep_sarsa import SarsaConfig
from train.reinforce import ReinforceConfig
from vla_jax.command_line import command_line
from vla_jax.envs.discrete_worlds import DiscreteGymnasiumConfig
from vla_jax.rl.gymnasium_loop import learn
from vla_jax.rl.learner import SeedsConfig
from vla_jax.rl.network import NetworkConfig
from vla_jax.training import checkpoint
from vla_jax.training.logs import read_metrics
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig

SEEDS = SeedsConfig(
    num_seeds=1, num_envs=4, num_steps=8, eval_episodes=6, report_episodes=6, solved_by="return",
    solved_at=1e9,
)  # fmt: skip
LOOP = LoopConfig(num_updates=4, log_every=2, save_every=2)
TWO = LoopConfig(num_updates=2, log_every=2, save_every=2)
PARTS = {
    "seeds": SEEDS,
    "loop": LOOP,
    "optim": OptimConfig(warmup_steps=0, learning_rate=1e-2, ema_decay=0.9),
    "network": NetworkConfig(hidden_sizes=(8,)),
}
ALGORITHMS = {"sarsa": (SarsaConfig, deep_sarsa), "reinforce": (ReinforceConfig, reinforce)}


class Lever(gymnasium.Env):
    """The second of two levers is rewarded; an episode has one or two steps."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    fault, calls = None, 0  # type of the injected error, and number of steps of all levers

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.length = 0, int(self.np_random.integers(1, 3))
        return np.zeros(1, np.float32), {}

    def step(self, action):
        Lever.calls, self.steps = Lever.calls + 1, self.steps + 1
        if Lever.calls >= 100 and Lever.fault == "raises":
            raise ZeroDivisionError("the lever broke")
        reward = np.nan if Lever.calls >= 100 and Lever.fault == "nan" else float(action)
        return np.ones(1, np.float32), reward, self.steps >= self.length, False, {}


class Crane(Lever):
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)


for name, env in {"Lever-v0": Lever, "Crane-v0": Crane}.items():
    gymnasium.register(name, env, max_episode_steps=10, disable_env_checker=True)


@pytest.fixture(autouse=True)
def _whole_levers(monkeypatch):
    monkeypatch.setattr(Lever, "fault", None)
    monkeypatch.setattr(Lever, "calls", 0)


def run(run_dir, algorithm="reinforce", *, seeds=SEEDS, loop=LOOP, env_id="Lever-v0"):
    config_type, script = ALGORITHMS[algorithm]
    config = config_type(world=DiscreteGymnasiumConfig(env_id=env_id), **{**PARTS, "seeds": seeds})
    algorithm = script.make_algorithm(config)
    return learn(seeds, loop, run_dir, config.world, algorithm, config.optim, 0, name="run")


def saved(run_dir, step):
    """Paths of the files of a checkpoint."""
    folder = run_dir / "checkpoints" / str(step)
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_script_learns_to_choose_the_rewarded_lever(algorithm, tmp_path, capsys):
    config_type, script = ALGORITHMS[algorithm]
    parts = {**PARTS, "loop": LoopConfig(num_updates=60, log_every=20, save_every=60)}
    config = config_type(str(tmp_path / "run"), DiscreteGymnasiumConfig(env_id="Lever-v0"), **parts)
    run_dir = script.train(config)
    left = {path.name for path in run_dir.iterdir()}
    assert {"config.json", "metrics.jsonl", "curve.png", "report.json"} <= left
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["env_steps"] for line in lines] == [20 * 32, 40 * 32, 60 * 32]
    assert lines[-1]["return/00"] > 1.2  # 1 or 2 steps with a reward of 1 each
    assert "of 1 seeds" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_training_continues_with_its_params_and_new_episodes(tmp_path, capsys):
    first = run(tmp_path, loop=TWO)
    assert "new episodes" not in capsys.readouterr().out
    same = run(tmp_path, loop=TWO)  # all updates are done already
    jax.tree.map(np.testing.assert_array_equal, same.params, first.params)
    result = run(tmp_path)
    assert "run resumes after update 2, with new episodes." in capsys.readouterr().out
    assert (result.num_updates.tolist(), result.env_steps) == ([4], 4 * 4 * 8)
    assert np.any(
        result.params["mlp"]["layers_0"]["kernel"] != first.params["mlp"]["layers_0"]["kernel"]
    )


def test_equal_seeds_give_equal_results(tmp_path):
    one, other = (run(tmp_path / name).params for name in ("one", "other"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (
            "raises",
            RuntimeError,
            r"env Lever-v0 raised in mid-episode \(ZeroDivisionError: the lever broke\); fix the "
            "environment; the last checkpoint, at update 2, is kept",
        ),
        (
            "nan",
            ValueError,
            "reward must be finite, got nan in seed 0 at update [34]; .* is kept: fix the env",
        ),
    ],
)
def test_an_error_of_the_environment_is_reported_and_the_last_checkpoint_is_kept(
    fault, error, message, tmp_path, monkeypatch
):
    run(tmp_path, loop=TWO)
    before = saved(tmp_path, 2)
    assert before
    monkeypatch.setattr(Lever, "calls", 70)  # the error then occurs between two updates
    monkeypatch.setattr(Lever, "fault", fault)
    with pytest.raises(error, match=message):
        run(tmp_path)
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 2
    assert saved(tmp_path, 2) == before
    monkeypatch.setattr(Lever, "fault", None)
    assert run(tmp_path).num_updates.tolist() == [4]  # resumes without the error


def test_an_error_before_the_first_checkpoint_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(Lever, "calls", 100)
    monkeypatch.setattr(Lever, "fault", "raises")
    with pytest.raises(RuntimeError, match=r"the lever broke\); .* no checkpoint was saved"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"env_id": "Crane-v0"}, r"action_space of Crane-v0 must be Discrete, got Box\(-1.0"),
        ({"env_id": "Levr-v0"}, "env 'Levr-v0' is not registered in gymnasium"),
        ({"env_id": ""}, "env '' cannot be made by gymnasium: Malformed environment ID"),
        ({"seeds": SeedsConfig()}, "num_seeds must be 1 in a Gymnasium environment, .* got 16"),
        ({"loop": LoopConfig(mesh="fsdp=2")}, "mesh must be left out in a Gymnasium .* got fsdp=2"),
    ],
)
def test_an_unsupported_environment_is_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **wrong)


def test_a_gymnasium_environment_cannot_be_partially_observed():
    with pytest.raises(ValueError, match="partially_observed must be False in a Gymnasium"):
        ReinforceConfig(world=DiscreteGymnasiumConfig(), partially_observed=True)


@pytest.mark.parametrize("presets", [reinforce.REINFORCE, deep_sarsa.SARSA])
def test_the_environment_is_an_option(presets):
    argv = ["--preset", "gymnasium", "--env-id", "Acrobot-v1", "--num-seeds", "1"]
    config = command_line(presets, argv, description="")
    assert config.world == DiscreteGymnasiumConfig(env_id="Acrobot-v1")
