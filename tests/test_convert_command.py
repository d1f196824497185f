"""python -m vla_jax.convert: a file to a folder, and the same file again."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from robovlms_heads import assert_same, their_head

from vla_jax import config, convert
from vla_jax.convert import TensorFile
from vla_jax.convert.__main__ import main
from vla_jax.policies import decoders
from vla_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
PREFIX = "model."
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*became float32",
    "ignore:.*beside the head are left over",
    "ignore:window_size 8 is assumed",
)


def checkpoint_of(kind="lstm", dtype=np.float32, **sizes):
    """A policy's tensors: its head in the midst of others."""
    head = {PREFIX + name: x.astype(dtype) for name, x in their_head(kind, **sizes).items()}
    vision = {"model.vision.weight": np.arange(6.0).reshape(2, 3), "model.step": np.array(3)}
    return {**vision, **head, "model.action_token": np.ones(4, jnp.bfloat16)}


def write(path, tensors, container="state_dict"):
    convert.write(path, TensorFile(tensors, container))


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_there_and_back_is_the_same_file(suffix, dtype, tmp_path, capsys):
    source, folder, again = (tmp_path / name for name in (f"a{suffix}", "out", f"b{suffix}"))
    write(source, checkpoint_of(dtype=dtype))
    main([str(source), str(folder), "--window-size", "6"])
    told = capsys.readouterr().out
    assert "used" in told
    assert "left over" in told
    assert ("cast to float32" in told) == (dtype is not np.float32)
    main([str(folder), str(again)])
    assert_same(convert.read(again).tensors, convert.read(source).tensors)
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "out", again.name}


@pytest.mark.parametrize("container", ["state_dict", "model_state_dict", ""])
@pytest.mark.parametrize("kind", ["fc", "gru"])
def test_the_container_comes_back_and_the_order_of_the_names(kind, container, tmp_path):
    write(tmp_path / "a.pt", checkpoint_of(kind, latent=2), container)
    main([str(tmp_path / "a.pt"), str(tmp_path / "out"), "--num-latents", "2"])
    main([str(tmp_path / "out"), str(tmp_path / "b.pt")])
    one, other = (convert.read(tmp_path / name) for name in ("a.pt", "b.pt"))
    assert one.container == other.container == container
    assert_same(other.tensors, one.tensors)


def test_the_folder_is_a_decoder_with_its_params_and_a_report(tmp_path):
    tensors, folder = checkpoint_of(), tmp_path / "out"
    content = {name: torch.from_numpy(np.array(x, np.float32)) for name, x in tensors.items()}
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "a.ckpt")
    main([str(tmp_path / "a.ckpt"), str(folder), "--window-size", "6"])
    decoder, params = convert.read_params(folder)
    assert decoder == config.load(decoders.DecoderConfig, folder / "decoder.json")
    assert decoder.window_size == 6
    expected = convert.to_robovlms(*convert.from_robovlms(tensors))
    assert_same(convert.to_robovlms(decoder, params), expected)
    assert_same(convert.to_robovlms(decoder, checkpoint.restore_params(folder)), expected)
    report = json.loads((folder / "conversion.json").read_text())["report"]
    assert report["ignored"] == ["epoch"]
    assert len(report["used"]) == len(expected)
    left = convert.read(folder / "left_over.safetensors").tensors
    assert set(left) == set(report["left_over"]) == set(tensors) - set(report["used"])


def test_params_that_were_trained_go_back_in_the_place_of_the_old(tmp_path):
    write(tmp_path / "a.pt", checkpoint_of())
    main([str(tmp_path / "a.pt"), str(tmp_path / "out")])
    decoder, params = convert.read_params(tmp_path / "out")
    source = convert.read(tmp_path / "a.pt")
    report = convert.report_robovlms(source.tensors, decoder)
    params["recurrence"]["layers_0"]["forward"]["input_bias"] += 1.0
    convert.write_folder(tmp_path / "out", source, decoder, params, report, overwrite=True)
    back = convert.read_folder(tmp_path / "out").tensors
    changed = {name for name in back if (back[name] != source.tensors[name]).any()}
    assert changed == {"model.act_head.rnn.bias_ih_l0"}


def test_what_is_allowed_to_be_missing_is_drawn_and_written_at_the_end(tmp_path, capsys):
    tensors = {name: x for name, x in checkpoint_of().items() if "gripper" not in name}
    write(tmp_path / "a.pt", tensors)
    src, out, again = (str(tmp_path / name) for name in ("a.pt", "out", "b.pt"))
    with pytest.warns(UserWarning, match="6 tensors are missing and drawn at random: act_head.gr"):
        main([src, out, "--allow-missing", "act_head.gripper.*", "act_head.x"])
    told = capsys.readouterr().out
    assert "missing, drawn" in told
    assert len([name for name in their_head("lstm") if "gripper" in name and name in told]) == 6
    main([out, again])
    back = convert.read(again).tensors
    assert_same({name: back[name] for name in tensors}, tensors)
    assert all(name.startswith("model.act_head.gripper.") for name in list(back)[len(tensors) :])
    assert len(back) == len(tensors) + 6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_line_says_where_trained_params_lose_digits_on_the_way_back(dtype, tmp_path):
    write(tmp_path / "a.pt", checkpoint_of(dtype=jnp.dtype(dtype)))
    main([str(tmp_path / "a.pt"), str(tmp_path / "out")])
    decoder, params = convert.read_params(tmp_path / "out")
    source = convert.read(tmp_path / "a.pt")
    report = convert.report_robovlms(source.tensors, decoder)
    params["recurrence"]["layers_0"]["forward"]["input_bias"] += 1e-5
    params["heads"]["arm"]["layers_0"]["bias"] += 1e30  # more than float16 has
    params["heads"]["gripper"]["layers_0"]["bias"][0] = np.nan  # which it has
    convert.write_folder(tmp_path / "out", source, decoder, params, report, overwrite=True)
    names = "model.act_head.actions.mlp.0.bias, model.act_head.rnn.bias_ih_l0"
    with pytest.warns(UserWarning, match=f"2 tensors lose digits in the file's {dtype}: {names};"):
        main([str(tmp_path / "out"), str(tmp_path / "b.pt")])


# --- recurrences of torch.nn ------------------------------------------------------------------


def module_file(path, make=torch.nn.LSTM, prefix="", **options):
    """A torch.nn recurrence, in a model of more where it has a prefix."""
    torch.manual_seed(0)
    tensors = {prefix + name: x for name, x in make(3, 5, 2, **options).state_dict().items()}
    if prefix:
        tensors = {"first": torch.arange(3)} | tensors | {"head.weight": torch.ones(2, 5)}
    convert.write(path, TensorFile({name: x.numpy() for name, x in tensors.items()}))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "encoder.rnn."])
@pytest.mark.parametrize("make", [torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "bias": False}])
def test_a_torch_recurrence_goes_there_and_back(options, make, prefix, suffix, tmp_path, capsys):
    source, folder, again = (tmp_path / name for name in (f"a{suffix}", "out", f"b{suffix}"))
    module_file(source, make, prefix, **options)
    main([str(source), str(folder), *(["--prefix", prefix] if prefix else [])])
    told = capsys.readouterr().out
    assert f"{make.__name__.lower()}, 2 layers of 5" in told
    assert ("left over" in told) == bool(prefix)
    config, params = convert.read_recurrence(folder)
    tensors = convert.read(source).tensors
    expected, own = convert.from_torch(tensors, prefix=prefix)
    assert config == expected
    assert jax.tree.all(jax.tree.map(np.array_equal, params, own))
    main([str(folder), str(again)])
    assert capsys.readouterr().out.startswith(f"{len(tensors)} tensors, ")
    assert_same(convert.read(again).tensors, tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_torch_recurrence_in_half_precision_goes_there_and_back(dtype, tmp_path):
    half = torch.nn.GRU(3, 5).to(getattr(torch, dtype)).state_dict()
    torch.save({"state_dict": half}, tmp_path / "a.pt")
    main([str(tmp_path / "a.pt"), str(tmp_path / "out")])
    main([str(tmp_path / "out"), str(tmp_path / "b.pt")])
    assert_same(*(convert.read(tmp_path / name).tensors for name in ("a.pt", "b.pt")))


def test_biases_that_a_file_had_not_come_back_once_they_are_trained(tmp_path):
    module_file(tmp_path / "a.pt", bias=False)
    source = convert.read(tmp_path / "a.pt")
    config, params = convert.from_torch(source.tensors)
    report = convert.report_torch(source.tensors, config)
    params["layers_1"]["forward"]["input_bias"] += 1.0
    convert.write_folder(tmp_path / "out", source, config, params, report)
    back = convert.read_folder(tmp_path / "out").tensors
    assert list(back) == [*source.tensors, "bias_ih_l1"]
    assert (back["bias_ih_l1"] == 1.0).all()


def test_a_torch_recurrence_that_is_not_whole_or_gets_a_heads_options_is_one_line(tmp_path, capsys):
    module_file(tmp_path / "a.pt", prefix="rnn.")
    out, argv = tmp_path / "out", [tmp_path / "a.pt", tmp_path / "out", "--prefix"]
    assert "got 'lstm.' and first, rnn.weight_ih_l0" in fails([*argv, "lstm."], capsys)
    told = fails([*argv, "rnn.", "--window-size", "8"], capsys)
    assert "takes --prefix and --overwrite alone" in told
    tensors = convert.read(tmp_path / "a.pt").tensors
    write(tmp_path / "b.pt", {name: tensors[name] for name in list(tensors)[::2]})
    assert "missing" in fails([tmp_path / "b.pt", out, "--prefix", "rnn."], capsys)
    assert not out.exists()


# --- what does not fit ------------------------------------------------------------------------


def fails(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    told = capsys.readouterr().err
    assert stopped.value.code == 1
    assert told.count("\n") == 1
    return told


def test_what_is_there_is_replaced_only_on_demand_and_only_a_conversion(tmp_path, capsys):
    source, folder = tmp_path / "a.pt", tmp_path / "out"
    write(source, checkpoint_of())
    main([str(source), str(folder)])
    assert "out is there already; choose another name, or --over" in fails([source, folder], capsys)
    main([str(source), str(folder), "--window-size", "3", "--overwrite"])
    assert convert.read_params(folder)[0].window_size == 3
    assert "a.pt is there already" in fails([folder, source], capsys)
    main([str(folder), str(source), "--overwrite"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    told = fails([source, tmp_path / "mine", "--overwrite"], capsys)
    assert "mine is there already" in told
    assert (tmp_path / "mine/thesis.txt").exists()


def test_wrong_files_are_one_line_and_leave_nothing(tmp_path, capsys):
    head, out = checkpoint_of(), tmp_path / "out"
    half = {name: head[name] for name in list(head)[::2]}
    foreign = {"model.vision.weight": np.zeros(3)}
    for name, tensors, sentence in (
        ("half", half, "missing"),
        ("foreign", foreign, "must hold 'act_head.…'"),
        ("more", head | {"model.act_head.x": np.zeros(3)}, "1 left over: model.act_head.x"),
    ):
        write(tmp_path / f"{name}.pt", tensors)
        assert sentence in fails([tmp_path / f"{name}.pt", out], capsys)
    assert "nowhere.pt is not a file" in fails([tmp_path / "nowhere.pt", out], capsys)
    assert "holds no conversion.json" in fails([tmp_path, out], capsys)
    write(tmp_path / "a.pt", head)
    assert "must be a folder's name" in fails([tmp_path / "a.pt", tmp_path / "b.pt"], capsys)
    assert not out.exists()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", ["conversion.json", "decoder.json", "0/state/manifest.ocdbt"])
def test_a_damaged_folder_is_one_line(name, tmp_path, capsys):
    write(tmp_path / "a.pt", checkpoint_of())
    main([str(tmp_path / "a.pt"), str(tmp_path / "out")])
    (tmp_path / "out" / name).write_text("{")
    fails([tmp_path / "out", tmp_path / "b.pt"], capsys)
    assert not (tmp_path / "b.pt").exists()


def test_a_kill_while_writing_leaves_the_folder_of_before(tmp_path, monkeypatch):
    write(tmp_path / "a.pt", checkpoint_of())
    argv = [str(tmp_path / "a.pt"), str(tmp_path / "out"), "--window-size"]
    main([*argv, "6"])

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(SystemExit, match="nothing was written"):
        main([*argv, "7", "--overwrite"])
    assert convert.read_params(tmp_path / "out")[0].window_size == 6
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "out"}


def test_the_help_names_the_command_and_what_is_converted_in_code_alone(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "usage: python -m vla_jax.convert [-h]" in told
    assert "vla_jax.convert.from_flax" in told


def test_the_command_runs_and_says_what_it_did_in_lines(tmp_path):
    write(tmp_path / "a.pt", checkpoint_of(dtype=np.float16))
    done = subprocess.run(
        [sys.executable, "-m", "vla_jax.convert", "a.pt", "out", "--window-size", "6"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stderr == (
        "warning: 20 tensors became float32, from float16\n"
        "warning: 3 tensors beside the head are left over\n"
    )
    assert "window 6" in done.stdout
    assert done.stdout.endswith("out\n")
