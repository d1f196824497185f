"""An evaluation plays every seed once, resumes after interruptions, and ends with a summary."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from rich.console import Console

from vla_jax import evaluate as module
from vla_jax import folder_lock, runs
from vla_jax.envs.table.jax_simulator import JaxTable
from vla_jax.envs.worlds import GymnasiumConfig
from vla_jax.evaluate import EvaluateConfig, evaluate, main
from vla_jax.evaluation import results
from vla_jax.policies.heads import HEADS
from vla_jax.policies.policy import connect

CONFIG = EvaluateConfig(num_episodes=5, num_videos=1, num_simulators=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return tiny_run.write(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def quiet(run, config=CONFIG):
    return evaluate(run, config, console=Console(file=io.StringIO()))


def read(folder, name="refresh-4"):
    outcomes = results.read_outcomes(folder / "evaluation" / name / "episodes.jsonl")
    return sorted(outcomes)


def crashing(monkeypatch, seeds):
    """Makes worlds that raise an error during the episodes of `seeds`."""

    class Crashing(JaxTable):
        def reset(self, seed):
            self.breaks = seed in seeds
            return super().reset(seed)

        def step(self, action):
            if self.breaks:
                raise OSError("the cable came off")
            return super().step(action)

    monkeypatch.setattr(module, "make_simulator", Crashing)


def test_an_evaluation_writes_outcomes_videos_and_a_summary(folder):
    summary = quiet(folder)
    seeds = range(1_000_000, 1_000_005)  # demonstrations have seeds from 0
    assert [outcome.seed for outcome in read(folder)] == list(seeds)
    assert summary == results.summarize(read(folder), latency=summary.latency)
    assert summary.latency is not None
    place = folder / "evaluation" / "refresh-4"
    (video,) = place.glob("*.mp4")
    first = read(folder)[0]
    assert video.name == f"1000000_{first.task}_{'success' if first.success else 'failure'}.mp4"
    data = json.loads((place / "summary.json").read_text())
    assert results.from_json(data["summary"]) == summary
    assert data["settings"]["checkpoint"] == 10
    assert data["command"].endswith("--num-episodes 5 --num-simulators 2 --num-videos 1")


@pytest.mark.slow
def test_a_run_that_is_already_loaded_is_evaluated_the_same(folder):
    run = runs.load_run(folder)
    quiet(run)
    outcomes = read(folder)
    quiet(folder, dataclasses.replace(CONFIG, overwrite=True))
    assert read(folder) == outcomes


@pytest.mark.slow
def test_a_resumed_evaluation_has_the_results_of_an_uninterrupted_one(folder, monkeypatch):
    whole = quiet(folder, dataclasses.replace(CONFIG, name="whole"))
    monkeypatch.setattr(module.results, "append_outcome", fail_after(3, results.append_outcome))
    with pytest.raises(KeyboardInterrupt):
        quiet(folder)
    monkeypatch.undo()
    assert len(read(folder)) == 3
    with (folder / "evaluation" / "refresh-4" / "episodes.jsonl").open("a") as file:
        file.write('{"seed": 1000')  # a kill in the middle of a line
    again = quiet(folder)
    assert read(folder) == read(folder, "whole")
    assert again == whole._replace(latency=again.latency)


def fail_after(count, function):
    calls = []

    def wrapped(*arguments):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(arguments)
        return function(*arguments)

    return wrapped


@pytest.mark.slow
def test_finished_episodes_are_not_played_again(folder, monkeypatch):
    first = quiet(folder)
    crashing(monkeypatch, range(1_000_000, 1_000_005))  # they would be counted as crashed
    assert quiet(folder).total == first.total
    assert quiet(folder, dataclasses.replace(CONFIG, num_episodes=3)).total.episodes == 3


@pytest.mark.slow
def test_other_settings_under_the_same_name_are_refused(folder):
    named = dataclasses.replace(CONFIG, name="mine")
    quiet(folder, named)
    other = dataclasses.replace(named, mode="persistent")
    with pytest.raises(
        ValueError, match=r"agent\.mode was 'refresh' and is 'persistent'; choose another --name"
    ):
        quiet(folder, other)
    quiet(folder, dataclasses.replace(other, overwrite=True))
    settings = json.loads((folder / "evaluation" / "mine" / "settings.json").read_text())
    assert settings["agent"]["mode"] == "persistent"


def test_the_folder_of_an_evaluation_is_changed_under_its_lock(folder, monkeypatch):
    place, opened = folder / "evaluation" / "mine", []

    def is_held():
        with pytest.raises(BlockingIOError):
            folder_lock.check(place / ".lock", "evaluation", "wait")
        return True

    def merge(changed):  # the last step of opening
        opened.append((is_held(), sorted(path.name for path in changed.iterdir())))
        raise KeyboardInterrupt

    place.mkdir(parents=True)
    (place / "episodes.jsonl").touch()
    monkeypatch.setattr(module, "_probe", lambda *_: None)
    monkeypatch.setattr(module, "_merge", merge)
    with pytest.raises(KeyboardInterrupt):
        quiet(folder, dataclasses.replace(CONFIG, name="mine", overwrite=True))
    assert opened == [(True, [".lock", "settings.json"])]
    assert [path.name for path in place.iterdir()] == ["settings.json"]


@pytest.mark.slow
def test_an_evaluation_with_earlier_names_of_settings_is_resumed(folder):
    quiet(folder)
    path = folder / "evaluation" / "refresh-4" / "settings.json"
    settings = json.loads(path.read_text())
    settings["agent"]["execution"]["gripper_rule"] = "as_wanted"
    path.write_text(json.dumps(settings))
    quiet(folder)
    assert json.loads(path.read_text())["agent"]["execution"]["gripper_rule"] == "target"


def test_damaged_settings_raise_one_sentence(folder):
    (folder / "evaluation" / "refresh-4").mkdir(parents=True)
    (folder / "evaluation" / "refresh-4" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is not valid JSON"):
        quiet(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"mode": "persistent"}, "persistent"),
        ({"mode": "periodic", "window_size": 2}, "periodic-2"),
        ({"instruction_steps": 2, "exec_kind": "first"}, "refresh-4-instruction2-first"),
        ({"world": "table_jax", "step": 10}, "refresh-4-table_jax-10"),
        ({"reference": "expert"}, "expert"),
        ({"reference": "expert", "world": "table_jax"}, "expert-table_jax"),
    ],
)  # fmt: skip
def test_each_set_of_options_has_its_own_folder(folder, options, name):
    quiet(folder, EvaluateConfig(num_episodes=2, num_videos=0, **options))
    assert len(read(folder, name)) == 2


def test_crashed_episodes_are_counted_separately_and_the_others_are_played(folder, monkeypatch):
    crashing(monkeypatch, {1_000_001})
    reference = dataclasses.replace(CONFIG, reference="expert", num_videos=2)
    summary = quiet(folder, reference)
    assert (summary.total.episodes, summary.total.crashed) == (4, 1)
    assert read(folder, "expert")[1].error == "OSError: the cable came off"
    assert len(list((folder / "evaluation" / "expert").glob("*.mp4"))) == 1


def test_a_world_that_always_crashes_raises_one_sentence(folder, monkeypatch):
    crashing(monkeypatch, range(2_000_000))
    with pytest.raises(RuntimeError, match=r"crashed in every episode, .*the cable came off"):
        quiet(folder, dataclasses.replace(CONFIG, reference="expert"))


@pytest.mark.slow
def test_a_reference_needs_no_checkpoint(tmp_path):
    config = dataclasses.replace(CONFIG, reference="expert", world="table_jax")
    summary = quiet(tmp_path / "new", config)
    assert summary.total.rate == 1.0
    assert summary.latency is None


@pytest.mark.slow
def test_the_world_renders_images_of_the_size_that_the_policy_takes(folder):
    painted = dataclasses.replace(tiny_run.WORLD, image_size=64, step_size=0.02)
    module.configs.save(painted, folder / "world.json")
    quiet(folder, dataclasses.replace(CONFIG, num_videos=0))
    settings = json.loads((folder / "evaluation" / "refresh-4" / "settings.json").read_text())
    world = {"kind": "table_jax", "image_size": 0, "step_size": 0.02, "max_steps": 5}
    assert settings["world"].items() >= world.items()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_episodes": 0}, "num_episodes must be at least 1, got 0"),
        ({"num_simulators": 0}, "num_simulators must be at least 1, got 0"),
        ({"num_videos": -1}, "num_videos must be at least 0, got -1"),
        ({"first_seed": -1}, "first_seed must be at least 0, got -1"),
        ({"first_seed": 2**31 - 1}, r"first_seed must be below 2\^31 - num_episodes, got 21474"),
        (
            {"reference": "expert", "mode": "persistent"},
            "mode must be None with reference 'expert', .* got persistent; omit it",
        ),
        ({"name": "../up"}, r"name must be letters, .* got '\.\./up'"),
    ],
)
def test_an_inconsistent_config_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        EvaluateConfig(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"exec_horizon": 2}, "exec_horizon must be 1 with kind='first'"),
        ({"env_id": "Pendulum-v1"}, "env_id must be None in table_jax"),
        (
            {"reference": "expert", "world": "gymnasium"},
            r"that gymnasium provides \(random\)",
        ),
        ({"step": 5}, "no step 5"),
    ],
)
def test_an_option_that_does_not_fit_the_run_is_refused_and_creates_no_folder(
    folder, options, sentence
):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        quiet(folder, EvaluateConfig(**options))
    assert not (folder / "evaluation").exists()


@pytest.mark.slow
def test_a_loaded_run_is_refused_with_another_step(folder):
    with pytest.raises(ValueError, match="step must be 10 as in the loaded run, got 5"):
        quiet(runs.load_run(folder), EvaluateConfig(step=5))


@pytest.mark.filterwarnings("ignore:videos of Pendulum-v1 are grey")
def test_a_world_without_the_inputs_of_the_policy_is_refused(folder):
    module.configs.save(GymnasiumConfig(), folder / "world.json")
    with pytest.raises(ValueError, match="proprio must have 8 numbers as in training, got 3"):
        quiet(folder)


def test_a_run_without_a_world_requires_one_as_an_option(folder):
    (folder / "world.json").unlink()
    with pytest.raises(ValueError, match=r"no world\.json; choose with --world from table_mujoco"):
        quiet(folder)


@pytest.mark.slow
def test_the_command_prints_the_table_and_the_path_of_the_page(folder, capsys):
    main([str(folder), "--num-episodes", "3", "--num-videos", "0", "--mode", "persistent"])
    printed = capsys.readouterr()
    assert "mean over tasks" in printed.out
    assert printed.out.rstrip().endswith("index.html")
    assert "persistent 3/3 episodes" in printed.err
    assert (folder / "index.html").is_file()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "run folder nowhere is missing"),
        (["{run}", "--num-episodes", "0"], "num_episodes must be at least 1"),
        (["{run}", "--window-size", "0"], "window_size must be at least 1"),
        (["{run}", "--mode", "persistant"], "persistent"),
        (["{run}", "--windowsize", "3"], "--window-size"),
    ],
)
def test_a_mistake_at_the_command_line_is_reported_without_a_traceback(folder, capsys, argv, words):
    with pytest.raises(SystemExit) as caught:
        main([word.format(run=folder) for word in argv])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    "head",
    ["discrete", *(pytest.param(h, marks=pytest.mark.slow) for h in HEADS if h != "discrete")],
)
def test_a_policy_of_nan_alone_ends_the_command_with_2_and_the_reason(
    head, tmp_path, capsys, monkeypatch
):
    decoder = dataclasses.replace(tiny_run.DECODER, head=head)
    connected = connect(tiny_run.AGENT.policy.backbone, decoder)
    monkeypatch.setattr(tiny_run, "AGENT", dataclasses.replace(tiny_run.AGENT, policy=connected))
    weights = jax.tree.map(lambda leaf: leaf + np.nan, tiny_run.params())
    monkeypatch.setattr(tiny_run, "params", lambda seed=0: weights)
    folder = tiny_run.write(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([str(folder), "--num-episodes", "2", "--num-videos", "0"])
    assert caught.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert "crashed in every episode" in line
    assert "not finite" in line
    assert not (folder / "evaluation" / "refresh-4" / "summary.json").exists()


@pytest.mark.slow
def test_an_interruption_at_the_command_line_says_how_to_resume(folder, monkeypatch):
    monkeypatch.setattr(module.results, "append_outcome", fail_after(0, results.append_outcome))
    with pytest.raises(SystemExit, match="130"):
        main([str(folder), "--num-episodes", "3", "--num-videos", "0"])
