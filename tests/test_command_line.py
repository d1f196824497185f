"""The command line: flat options over a preset; an error is one message and exit code 2."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import typing
import warnings
from typing import Literal

import pytest

from train import (
    configs,
    deep_sarsa,
    demo,
    finetune,
    memory,
    ppo,
    pretrain,
    record,
    reinforce,
    scan,
    tabular,
)
from train.benchmark import __main__ as benchmark
from train.benchmark import throughput
from train.presets import IMITATE
from vla_jax import evaluate
from vla_jax.command_line import command_line, comments, run
from vla_jax.convert import converters
from vla_jax.data.readers.dataset_config import DatasetConfig

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    kind: Literal["patch"] = "patch"
    patch_size: int = 8  # pixels
    dropout: float = 0.0  # probability


@dataclasses.dataclass(frozen=True)
class StateConfig:
    kind: Literal["state"] = "state"
    hidden_size: int = 64  # units of the only layer


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    kind: Literal["lstm", "gru"] = "lstm"  # cell
    head: Literal["one", "two"] = "one"  # outputs
    window_size: int = 8  # environment steps
    max_dropout: float = 1.0  # probability
    dropout: float = 0.1  # probability

    def __post_init__(self):
        if self.window_size < 1:
            raise ValueError(f"window_size must be positive, got {self.window_size}.")


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    backbone: PatchConfig | StateConfig = PatchConfig()  # encoder of observations
    decoder: DecoderConfig = DecoderConfig()  # memory of the policy


@dataclasses.dataclass(frozen=True)
class MainConfig:
    seed: int = 0  # of all random numbers
    freeze: tuple[str, ...] = ()  # path globs
    factors: tuple[tuple[str, float], ...] = ()  # glob and factor
    decay: float | None = None  # None = no average
    max_dropout: float = 0.5  # probability
    overwrite: bool = False  # what is there
    policy: PolicyConfig = PolicyConfig()  # actor
    critic: StateConfig | None = None  # estimates the value


def images():
    """From images: two minutes on a laptop. More to read."""
    return MainConfig()


def state():
    """From the state: ten seconds."""
    return MainConfig(policy=PolicyConfig(StateConfig(hidden_size=32)))


def parse(*argv):
    return command_line({"images": images, "state": state}, argv, description="Imitates.")


def test_the_first_preset_is_the_default():
    assert parse() == images()


@pytest.mark.parametrize("argv", [("--preset", "state"), ("--preset=state",)], ids=["two", "one"])
def test_a_preset_is_selected_by_name(argv):
    assert parse(*argv) == state()


def test_options_are_flat_and_override_the_preset():
    chosen = parse(
        *("--preset", "state", "--hidden-size", "16", "--window-size", "4", "--seed", "7"),
        *("--freeze", "a/*", "b", "--factors", "a/*", "0.1", "b", "2", "--decay", "0.9"),
    )
    assert chosen == MainConfig(
        seed=7,
        freeze=("a/*", "b"),
        factors=(("a/*", 0.1), ("b", 2.0)),
        decay=0.9,
        policy=PolicyConfig(StateConfig(hidden_size=16), DecoderConfig(window_size=4)),
    )
    assert type(chosen.policy.backbone) is StateConfig


def test_an_option_of_two_parts_is_prefixed_with_the_name_of_its_part():
    chosen = parse("--backbone.dropout", "0.3", "--decoder.dropout", "0.4").policy
    assert (chosen.backbone.dropout, chosen.decoder.dropout) == (0.3, 0.4)
    chosen = parse("--decoder.max-dropout", "0.3", "--max-dropout", "0.4")
    assert (chosen.policy.decoder.max_dropout, chosen.max_dropout) == (0.3, 0.4)


def test_all_options_of_some_parts_are_prefixed_with_the_name_of_the_part():
    chosen = command_line(
        IMITATE,
        ["--preset", "table_jax_state", "--dataset", "demos/a", "--loss.gripper", "0.3",
         "--dataset.gripper", "closed_positive", "--loss.caption", "2", "--auxiliary.caption",
         "--auxiliary.forward-horizon", "1"],
        description="Imitates.",
    )  # fmt: skip
    assert chosen.dataset == DatasetConfig("demos/a", gripper="closed_positive", decode="whole")
    assert (chosen.loss.gripper, chosen.loss.caption) == (0.3, 2.0)
    assert (chosen.auxiliary.caption, chosen.auxiliary.forward_horizon) == (True, 1)


def test_the_path_of_a_part_can_be_given_by_the_name_of_the_part():
    for option in ("--dataset", "--dataset.path"):
        chosen = command_line(IMITATE, [option, "demos/a"], description="Imitates.")
        assert chosen.dataset == DatasetConfig("demos/a", decode="whole")


@pytest.mark.parametrize("prefix", ["", "dataset."])
@pytest.mark.parametrize(
    ("presets", "name"),
    [(IMITATE, "table_jax_state"), (IMITATE, "tiny_vlm"), (pretrain.PRESETS, "table")],
)
def test_options_of_the_data_set_have_their_bare_names_too(presets, name, prefix):
    cameras = ("primary=observation.images.top", "wrist=observation.images.hand")
    argv = [f"--{prefix}cameras", *cameras, f"--{prefix}skip-bad-episodes", "--dataset", "demos/a"]
    argv += [f"--{prefix}grippers", "-1", f"--{prefix}gripper-range", "0", "100"]
    chosen = command_line(presets, ["--preset", name, *argv], description="Imitates.")
    default = presets[name]()
    assert chosen.dataset == dataclasses.replace(
        default.dataset, path="demos/a", cameras=cameras, skip_bad_episodes=True, grippers=(-1,),
        gripper_range=(0.0, 100.0),
    )  # fmt: skip
    assert dataclasses.replace(chosen, dataset=default.dataset) == default


def test_a_kind_or_head_with_choices_is_an_option_of_its_part():
    decoder = parse("--decoder.kind", "gru", "--decoder.head", "two").policy.decoder
    assert (decoder.kind, decoder.head) == ("gru", "two")


def test_help_shows_the_presets_and_the_comment_of_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--preset", "state", "--help")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for text in [
        "Imitates.",
        "images  From images: two minutes on a laptop.",
        "memory of the policy",
    ]:
        assert text in shown
    for text in ["units of the only layer (default: 32)", "environment steps (default: 8)"]:
        assert text in shown
    assert "--decoder.kind {lstm,gru}" in shown
    assert "--backbone.kind" not in shown
    assert "critic" not in shown


MISTAKES = {
    "preset": (("--preset", "stat"), "unknown preset 'stat'.*Did you mean 'state'"),
    "option": (("--windw-size", "3"), "Unrecognized options: --windw-size.*--window-size INT"),
    "flag": (("--overwrite", "text"), r"Unrecognized options: text; --overwrite takes no value\.$"),
    "empty": (("--seed", "1", "--overwrite", ""), "--overwrite takes no value"),
    "two values": (("--seed", "1", "1"), r"Unrecognized options: 1\.?$"),
    "value": (("--seed", "x"), "invalid literal for int"),
    "range": (("--window-size", "0"), "window_size must be positive, got 0"),
    "other member": (("--hidden-size", "3"), "Unrecognized options: --hidden-size"),
}


@pytest.mark.parametrize(("argv", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_with_code_2_and_one_line_that_explains_it(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    stderr = capsys.readouterr().err
    assert re.match(f"error: .*{sentence}", stderr)
    assert stderr.count("\n") == 1


def test_a_value_that_is_too_long_to_read_is_shortened(capsys):
    for argv in (("--seed", "x" * 5000), ("--decoder.kind", "lstm" * 2000)):
        with pytest.raises(SystemExit):
            parse(*argv)
        assert len(capsys.readouterr().err) < 600


def start(function, *argv):
    run(function, {"images": images}, argv, description="Imitates.")


@pytest.fixture(autouse=True)
def plain_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.delenv("VLA_JAX_TRACEBACK", raising=False)


def test_run_calls_the_script_with_the_config_and_prints_what_it_returns(capsys):
    start(lambda config: f"runs/{config.seed}", "--seed", "3")
    assert capsys.readouterr().out == "runs/3\n"


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, ImportError, RuntimeError])
def test_an_error_of_the_script_is_one_line_with_code_2(kind, capsys):
    def script(config):
        raise kind("dataset is missing;\n  record one.")

    with pytest.raises(SystemExit) as stopped:
        start(script)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: dataset is missing; record one.\n"


def test_an_error_of_the_system_names_the_file_and_a_remedy(capsys, tmp_path):
    with pytest.raises(SystemExit):
        start(lambda config: tmp_path.read_text())
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: Is a directory; give another")


def test_an_option_shows_the_traceback(monkeypatch):
    def script(config):
        raise ValueError("deep inside")

    monkeypatch.setenv("VLA_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="deep inside"):
        start(script)


def test_ctrl_c_prints_nothing_and_exits_with_code_130(capsys):
    def script(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        start(script)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == ""


def test_a_warning_of_the_script_is_one_line(capsys):
    def script(config):
        print(warnings.formatwarning("left out 1 episode", UserWarning, "a.py", 1))

    start(script)
    assert capsys.readouterr().out.startswith("warning: left out 1 episode\n")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("module", "argv", "sentence"),
    [
        ("record", ("--num-episodes", "0"), "num_episodes must be at least 1"),
        ("pretrain", ("--dataset", "nowhere"), "nowhere"),
        ("imitate", ("--dataset", "nowhere"), "nowhere"),
        ("cache", ("--dataset", "nowhere"), "nowhere"),
        ("benchmark", ("--cases", "recurrences"), "cases.*recurrence"),
        ("imitate", ("--preset", "table_lsmt"), "unknown preset .* Did you mean 'table_lstm'"),
    ],
)
def test_every_script_reports_a_mistake_in_one_line(module, argv, sentence, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"train.{module}", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.match(f"error: .*{sentence}", done.stderr)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


UNREAD = """
import os, signal, sys
from vla_jax.command_line import exit_codes
event = sys.argv[1]
with exit_codes():
    print("a line")
    if event == "print":
        print("lines " * 10**5)
    if event == "wrong":
        raise ValueError("wrong input.")
    if event == "stopped":
        raise SystemExit(143)
    if event == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
    if event == "socket":
        raise BrokenPipeError("the robot has left.")
"""


@pytest.mark.parametrize(
    ("event", "code", "message"),
    [
        ("done", 141, b""), ("print", 141, b""), ("wrong", 2, b"error: wrong input.\n"),
        ("stopped", 143, b""), ("terminated", 143, b""),
    ],
)  # fmt: skip
def test_output_that_nobody_reads_is_dropped(event, code, message):
    """As in `python -m train.record --help | true`; other exit codes stay as they are."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", UNREAD, event],
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, message)


def test_a_broken_pipe_of_a_socket_is_an_error():
    done = subprocess.run([sys.executable, "-c", UNREAD, "socket"], capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, b"error: the robot has left.\n")


# --- help texts -------------------------------------------------------------------------------

COMMANDS = (
    configs, pretrain, record, demo, scan, memory, finetune, deep_sarsa, reinforce, ppo,
    tabular,
    benchmark, throughput, evaluate, converters,
)  # fmt: skip


def config_classes():
    """Every config class of a command, including parts and members of unions."""
    found = {}

    def walk(cls):
        if cls not in found:
            found[cls] = hints = typing.get_type_hints(cls)
            for hint in hints.values():
                for part in (hint, *typing.get_args(hint)):
                    if dataclasses.is_dataclass(part):
                        walk(part)

    for module in COMMANDS:
        for value in vars(module).values():
            if isinstance(value, type) and value.__name__.endswith("Config"):
                walk(value)
    return found


def test_every_option_of_every_command_has_a_help_text():
    classes = config_classes()
    assert len(classes) > 30
    for cls, hints in classes.items():
        for field in dataclasses.fields(cls):
            is_mark = typing.get_origin(hints[field.name]) is typing.Literal
            if is_mark and len(typing.get_args(hints[field.name])) == 1:
                continue  # the kind of a member of a union
            text = comments(cls)[field.name]
            assert len(text.split()) >= 3, f"{cls.__name__}.{field.name}: {text!r}"
            assert "see there" not in text


def test_the_help_of_a_field_is_the_comment_above_it_or_on_several_lines():
    @dataclasses.dataclass
    class Options:
        one: int = 1  # behind the field
        # above the field,
        # on two lines
        two: int = 2
        three: tuple[int, ...] = (
            1,  # inside the value
        )

    expected = {"one": "behind the field", "two": "above the field, on two lines"}
    assert comments(Options) == {**expected, "three": "inside the value"}
