"""A mistake on the command line of `evaluate` or `convert` is one sentence with exit code 2."""

import importlib

import pytest

COMMANDS = {
    "evaluate": ("vla_jax.evaluate", ["run"]),
    "export": ("vla_jax.export", ["run", "out"]),
    "convert": ("vla_jax.convert.__main__", ["model.pt", "out"]),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("extra", "word"),
    [(["--no-such-option", "3"], "--no-such-option"), (["--window-size", "many"], "many")],
    ids=["unknown option", "wrong value"],
)
def test_a_mistake_is_one_line_and_exit_code_2(name, extra, word, capsys):
    module, argv = COMMANDS[name]
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main([*argv, *extra])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert word in printed.err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_how_to_start_the_module_and_exits_with_code_0(name, capsys):
    module, _ = COMMANDS[name]
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main(["--help"])
    assert stopped.value.code == 0
    assert f"python -m vla_jax.{name}" in capsys.readouterr().out
