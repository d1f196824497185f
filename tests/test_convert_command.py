"""`python -m vla_jax.convert`: from a file to a folder, and back to an equal file."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import torch
from robovlms_heads import assert_same, robovlms_head

from vla_jax import config, convert
from vla_jax.convert import TensorFile
from vla_jax.convert.__main__ import main
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
PREFIX = "model."
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* to float32",
    "ignore:.*outside the head are left over",
    "ignore:assuming window_size 8",
)


def checkpoint_of(kind="lstm", dtype=np.float32, **sizes):
    """Tensors of a policy, with those of its head among others."""
    head = {PREFIX + name: x.astype(dtype) for name, x in robovlms_head(kind, **sizes).items()}
    vision = {"model.vision.weight": np.arange(6.0).reshape(2, 3), "model.step": np.array(3)}
    return {**vision, **head, "model.action_token": np.ones(4, jnp.bfloat16)}


def write(path, tensors, container="state_dict"):
    convert.write(path, TensorFile(tensors, container))


@pytest.mark.sampled
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_a_round_trip_restores_the_file(suffix, dtype, tmp_path, capsys):
    source, folder, again = (tmp_path / name for name in (f"a{suffix}", "out", f"b{suffix}"))
    write(source, checkpoint_of(dtype=dtype))
    main([str(source), str(folder), "--window-size", "6"])
    output = capsys.readouterr().out
    assert "used" in output
    assert "left over" in output
    assert ("cast to float32" in output) == (dtype is not np.float32)
    main([str(folder), str(again)])
    assert_same(convert.read(again).tensors, convert.read(source).tensors)
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "out", again.name}


@pytest.mark.parametrize("container", ["state_dict", "model_state_dict", ""])
@pytest.mark.parametrize("kind", ["fc", "gru"])
def test_a_round_trip_restores_the_container_and_the_order_of_names(kind, container, tmp_path):
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
    assert decoder == config.load(DecoderConfig, folder / "decoder.json")
    assert decoder.window_size == 6
    expected = convert.to_robovlms(*convert.from_robovlms(tensors))
    assert_same(convert.to_robovlms(decoder, params), expected)
    assert_same(convert.to_robovlms(decoder, checkpoint.restore_params(folder)), expected)
    report = json.loads((folder / "conversion.json").read_text())["report"]
    assert report["ignored"] == ["epoch"]
    assert len(report["used"]) == len(expected)
    left = convert.read(folder / "left_over.safetensors").tensors
    assert set(left) == set(report["left_over"]) == set(tensors) - set(report["used"])


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module._orig_mod."])
def test_names_of_wrappers_are_removed_and_restored(wrapper, tmp_path):
    plain = checkpoint_of()
    wrapped = {name.replace("rnn.", f"rnn.{wrapper}"): x for name, x in plain.items()}
    for name, tensors in (("plain.pt", plain), ("wrapped.pt", wrapped)):
        write(tmp_path / name, tensors)
        main([str(tmp_path / name), str(tmp_path / name[:-3])])
    params = [convert.read_params(tmp_path / name)[1] for name in ("plain", "wrapped")]
    jax.tree.map(np.testing.assert_array_equal, *params)
    main([str(tmp_path / "wrapped"), str(tmp_path / "back.pt")])
    back = torch.load(tmp_path / "back.pt")["state_dict"]
    assert list(back) == list(wrapped)
    assert any(wrapper in name for name in back)


def test_a_tensor_with_and_without_a_wrapper_is_refused(tmp_path):
    write(tmp_path / "a.pt", {"a.weight": np.ones(2), "a._orig_mod.weight": np.zeros(2)})
    with pytest.raises(ValueError, match=r"once, got a\.weight and a\._orig_mod\.weight; remove"):
        convert.read(tmp_path / "a.pt")


def test_values_that_trained_weights_do_not_have_are_named(tmp_path, capsys):
    tensors = {name: np.array(x, np.float32) for name, x in checkpoint_of().items()}
    names = [f"model.act_head.rnn.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih")]
    tensors[names[0]][0, 0] = np.nan
    tensors[names[1]][:] = 0
    tensors[names[2]][1] = -2e7
    write(tmp_path / "a.pt", tensors)
    with pytest.warns(UserWarning, match=rf"tensors with NaN or infinity \(1\): {names[0]}"):
        main([str(tmp_path / "a.pt"), str(tmp_path / "out")])
    report = json.loads((tmp_path / "out/conversion.json").read_text())["report"]
    expected = dict(
        zip(names, ("NaN or infinity", "all values 0", "values up to 2e+07"), strict=True)
    )
    assert report["unusual"] == expected
    assert "unusual values" in capsys.readouterr().out


def test_trained_params_replace_the_original_tensors(tmp_path):
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


def test_optional_tensors_that_are_missing_are_initialised_and_written_last(tmp_path, capsys):
    tensors = {name: x for name, x in checkpoint_of().items() if "gripper" not in name}
    write(tmp_path / "a.pt", tensors)
    src, out, again = (str(tmp_path / name) for name in ("a.pt", "out", "b.pt"))
    with pytest.warns(UserWarning, match="6 tensors missing, randomly initialised: act_head.gr"):
        main([src, out, "--allow-missing", "act_head.gripper.*", "act_head.x"])
    output = capsys.readouterr().out
    assert "missing, initialised" in output
    assert (
        len([name for name in robovlms_head("lstm") if "gripper" in name and name in output]) == 6
    )
    main([out, again])
    back = convert.read(again).tensors
    assert_same({name: back[name] for name in tensors}, tensors)
    assert all(name.startswith("model.act_head.gripper.") for name in list(back)[len(tensors) :])
    assert len(back) == len(tensors) + 6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_warning_names_trained_params_that_are_rounded_to_the_dtype_of_the_file(dtype, tmp_path):
    write(tmp_path / "a.pt", checkpoint_of(dtype=jnp.dtype(dtype)))
    main([str(tmp_path / "a.pt"), str(tmp_path / "out")])
    decoder, params = convert.read_params(tmp_path / "out")
    source = convert.read(tmp_path / "a.pt")
    report = convert.report_robovlms(source.tensors, decoder)
    params["recurrence"]["layers_0"]["forward"]["input_bias"] += 1e-5
    params["heads"]["arm"]["layers_0"]["bias"] += 1e30  # outside the range of float16
    params["heads"]["gripper"]["layers_0"]["bias"][0] = np.nan  # which float16 can represent
    convert.write_folder(tmp_path / "out", source, decoder, params, report, overwrite=True)
    names = "model.act_head.actions.mlp.0.bias, model.act_head.rnn.bias_ih_l0"
    with pytest.warns(UserWarning, match=f"2 tensors are rounded to the file's {dtype}: {names};"):
        main([str(tmp_path / "out"), str(tmp_path / "b.pt")])


# --- recurrences of torch.nn ------------------------------------------------------------------


def module_file(path, make=torch.nn.LSTM, prefix="", **options):
    """A file of a torch.nn recurrence; with a prefix, as a part of a larger model."""
    torch.manual_seed(0)
    tensors = {prefix + name: x for name, x in make(3, 5, 2, **options).state_dict().items()}
    if prefix:
        tensors = {"first": torch.arange(3)} | tensors | {"head.weight": torch.ones(2, 5)}
    convert.write(path, TensorFile({name: x.numpy() for name, x in tensors.items()}))


@pytest.mark.sampled
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "encoder.rnn."])
@pytest.mark.parametrize("make", [torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "bias": False}])
def test_a_round_trip_restores_a_torch_recurrence(options, make, prefix, suffix, tmp_path, capsys):
    source, folder, again = (tmp_path / name for name in (f"a{suffix}", "out", f"b{suffix}"))
    module_file(source, make, prefix, **options)
    main([str(source), str(folder), *(["--prefix", prefix] if prefix else [])])
    output = capsys.readouterr().out
    assert f"{make.__name__.lower()}, 2 layers of 5" in output
    assert ("left over" in output) == bool(prefix)
    config, params = convert.read_recurrence(folder)
    tensors = convert.read(source).tensors
    expected, own = convert.from_torch(tensors, prefix=prefix)
    assert config == expected
    assert jax.tree.all(jax.tree.map(np.array_equal, params, own))
    main([str(folder), str(again)])
    assert capsys.readouterr().out.startswith(f"wrote {len(tensors)} tensors, ")
    assert_same(convert.read(again).tensors, tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_round_trip_restores_a_torch_recurrence_in_half_precision(dtype, tmp_path):
    half = torch.nn.GRU(3, 5).to(getattr(torch, dtype)).state_dict()
    torch.save({"state_dict": half}, tmp_path / "a.pt")
    main([str(tmp_path / "a.pt"), str(tmp_path / "out")])
    main([str(tmp_path / "out"), str(tmp_path / "b.pt")])
    assert_same(*(convert.read(tmp_path / name).tensors for name in ("a.pt", "b.pt")))


def test_biases_that_a_file_lacks_are_written_once_they_are_trained(tmp_path):
    module_file(tmp_path / "a.pt", bias=False)
    source = convert.read(tmp_path / "a.pt")
    config, params = convert.from_torch(source.tensors)
    report = convert.report_torch(source.tensors, config)
    params["layers_1"]["forward"]["input_bias"] += 1.0
    convert.write_folder(tmp_path / "out", source, config, params, report)
    back = convert.read_folder(tmp_path / "out").tensors
    assert list(back) == [*source.tensors, "bias_ih_l1"]
    assert (back["bias_ih_l1"] == 1.0).all()


def test_an_incomplete_torch_recurrence_or_an_option_of_a_head_is_an_error_of_one_line(
    tmp_path, capsys
):
    module_file(tmp_path / "a.pt", prefix="rnn.")
    out, argv = tmp_path / "out", [tmp_path / "a.pt", tmp_path / "out", "--prefix"]
    assert "got 'lstm.' and first, rnn.weight_ih_l0" in fails([*argv, "lstm."], capsys)
    output = fails([*argv, "rnn.", "--window-size", "8"], capsys)
    assert "must be --prefix and --overwrite only" in output
    tensors = convert.read(tmp_path / "a.pt").tensors
    write(tmp_path / "b.pt", {name: tensors[name] for name in list(tensors)[::2]})
    assert "missing" in fails([tmp_path / "b.pt", out, "--prefix", "rnn."], capsys)
    assert not out.exists()


# --- errors ------------------------------------------------------------------------


def fails(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    output = capsys.readouterr().err
    assert stopped.value.code == 2
    assert output.count("\n") == 1
    return output


def test_only_an_earlier_conversion_is_overwritten_and_only_on_request(tmp_path, capsys):
    source, folder = tmp_path / "a.pt", tmp_path / "out"
    write(source, checkpoint_of())
    main([str(source), str(folder)])
    assert "out exists already; choose another name, or --over" in fails([source, folder], capsys)
    main([str(source), str(folder), "--window-size", "3", "--overwrite"])
    assert convert.read_params(folder)[0].window_size == 3
    assert "a.pt exists already" in fails([folder, source], capsys)
    main([str(folder), str(source), "--overwrite"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    output = fails([source, tmp_path / "mine", "--overwrite"], capsys)
    assert "mine exists already" in output
    assert (tmp_path / "mine/thesis.txt").exists()


def test_wrong_files_are_errors_of_one_line_and_write_nothing(tmp_path, capsys):
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
    assert "must contain conversion.json" in fails([tmp_path, out], capsys)
    write(tmp_path / "a.pt", head)
    assert "must be a folder" in fails([tmp_path / "a.pt", tmp_path / "b.pt"], capsys)
    assert not out.exists()
    assert not list(tmp_path.glob("*.part"))


def test_a_run_without_such_a_model_and_options_of_other_files_are_refused(tmp_path, capsys):
    run, out = tiny_run.write(tmp_path), tmp_path / "out"
    message = "must be of a vision-language model, got 'state'"
    assert message in fails([run, out, "--to", "huggingface"], capsys)
    message = "--to peft takes no option but --vlm"
    assert message in fails([run, out, "--to", "peft", "--num-heads", "4"], capsys)
    assert "none is missing; train first" in fails([tmp_path / "none", out, "--to", "peft"], capsys)
    assert not out.exists()


@pytest.mark.parametrize("name", ["conversion.json", "decoder.json", "0/state/manifest.ocdbt"])
def test_a_damaged_folder_is_an_error_of_one_line(name, tmp_path, capsys):
    write(tmp_path / "a.pt", checkpoint_of())
    main([str(tmp_path / "a.pt"), str(tmp_path / "out")])
    (tmp_path / "out" / name).write_text("{")
    fails([tmp_path / "out", tmp_path / "b.pt"], capsys)
    assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize("name", ["dtypes", "prefix", "container", "metadata", "wrapped", ""])
def test_a_record_of_a_conversion_with_another_type_is_refused(name, tmp_path):
    path = tmp_path / "out/conversion.json"
    write(tmp_path / "a.pt", checkpoint_of())
    main([str(tmp_path / "a.pt"), str(tmp_path / "out")])
    record = json.loads(path.read_text())
    wrong = {"": (None, 7), "dtypes": ({"x": "float32"}, {"x": "inf"}, {"x": []}, None)}
    for value in (*wrong.get(name, (3.5, {"x": 1})), [[]]):
        damaged = {**record["source"], name: value} if name else value
        path.write_text(json.dumps({**record, "source": damaged}))
        with pytest.raises(ValueError, match=r"conversion\.json is damaged .*; convert"):
            convert.read_folder(tmp_path / "out")


def test_a_kill_while_writing_leaves_the_earlier_folder(tmp_path, monkeypatch):
    write(tmp_path / "a.pt", checkpoint_of())
    argv = [str(tmp_path / "a.pt"), str(tmp_path / "out"), "--window-size"]
    main([*argv, "6"])

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(SystemExit, match="130"):
        main([*argv, "7", "--overwrite"])
    assert convert.read_params(tmp_path / "out")[0].window_size == 6
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "out"}


def test_the_help_names_the_command_and_the_function_for_flax(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "usage: python -m vla_jax.convert [-h]" in output
    assert "vla_jax.convert.from_flax" in output


@pytest.mark.slow
def test_the_command_runs_and_reports_in_single_lines(tmp_path):
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
        "warning: 20 tensors cast from float16 to float32\n"
        "warning: 3 tensors outside the head are left over\n"
    )
    assert "window 6" in done.stdout
    assert done.stdout.endswith("out\n")
