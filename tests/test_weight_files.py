"""Weight files of other libraries: read without executing code, written atomically."""

import collections
import json
import os
import pathlib
import pickle
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from robovlms_heads import assert_same

from vla_jax import convert
from vla_jax.convert import TensorFile, sizes, weight_files

TENSORS = {
    "z.last": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "a.half": np.linspace(-3, 3, 8).astype(np.float16),
    "b.brain": np.linspace(-3, 3, 8).astype(jnp.bfloat16),
    "count": np.array(7),
    "mask": np.array([[True, False]]),
    "none": np.zeros((0, 3), np.float32),
}
each_suffix = pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".safetensors"])


@each_suffix
def test_written_tensors_are_read_back(suffix, tmp_path):
    path = tmp_path / f"deep/file{suffix}"
    convert.write(path, TensorFile(TENSORS, metadata={"format": "pt"}))
    content = convert.read(path)
    by_name = suffix == ".safetensors"  # safetensors has its own order
    assert_same(content.tensors, dict(sorted(TENSORS.items())) if by_name else TENSORS)
    assert content.metadata == ({"format": "pt"} if by_name else {})
    assert [child.name for child in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("container", ["state_dict", "model_state_dict", ""])
def test_a_torch_file_can_have_its_tensors_in_a_container(container, tmp_path):
    convert.write(tmp_path / "a.pt", TensorFile(TENSORS, container))
    stored = torch.load(tmp_path / "a.pt", weights_only=True)
    stored = stored[container] if container else stored
    assert list(stored) == list(TENSORS)
    assert stored["b.brain"].dtype == torch.bfloat16
    assert convert.read(tmp_path / "a.pt").container == container


def test_other_entries_of_a_lightning_file_are_ignored_and_named(tmp_path):
    content = {
        "epoch": 3,
        "state_dict": collections.OrderedDict(a=torch.ones(2, requires_grad=True)),
        "optimizer_states": [{"step": torch.zeros(2)}],
    }
    torch.save(content, tmp_path / "a.ckpt")
    content = convert.read(tmp_path / "a.ckpt")
    assert_same(content.tensors, {"a": np.ones(2, np.float32)})
    assert content.ignored == ("epoch", "optimizer_states")


class Attack:
    """A pickle that creates a file when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


class Command:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_executes_code_is_refused_and_not_executed(zipped, tmp_path):
    ran = tmp_path / "ran"
    content = {"state_dict": {"a": torch.ones(2)}, "callbacks": Attack(str(ran))}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"a\.pt would import \S+, which can execute code"
    ) as caught:
        convert.read(tmp_path / "a.pt")
    assert "save its state_dict alone" in str(caught.value)
    torch.save({"state_dict": Command()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=rf"would import {os.system.__module__}\.system"):
        convert.read(tmp_path / "b.pt")
    assert not ran.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_is_not_a_torch_file_is_refused_and_not_executed(protocol, tmp_path):
    ran, path = tmp_path / "ran", tmp_path / "a.pt"
    path.write_bytes(pickle.dumps(Attack(str(ran)), protocol))
    with pytest.raises(ValueError, match=r"a\.pt would import \S+, .* executed: if") as caught:
        convert.read(path)
    assert "\n" not in str(caught.value)
    assert not ran.exists()
    path.write_bytes(pickle.dumps({"state_dict": Command()}, protocol))
    with pytest.raises(ValueError, match=rf"would import {os.system.__module__}\.system, which"):
        convert.read(path)


def test_an_unknown_class_is_refused_by_name(tmp_path):
    content = {"state_dict": {"a": torch.ones(2)}, "hyper_parameters": pathlib.PurePosixPath("x")}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"would import pathlib\S*PurePosixPath"):
        convert.read(tmp_path / "a.ckpt")


@each_suffix
def test_a_truncated_file_is_refused(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    convert.write(path, TensorFile({"a": np.zeros(2000, np.float32)}))
    whole = path.read_bytes()
    for length in (10, 100, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"truncated.*copy it again") as caught:
            convert.read(path)
        assert "\n" not in str(caught.value)


@each_suffix
def test_an_empty_file_or_one_of_another_format_is_refused(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        convert.read(path)
    path.write_text("a text file without tensors\n")
    with pytest.raises(ValueError, match=r"is not a (checkpoint|safetensors file)"):
        convert.read(path)
    if suffix != ".safetensors":
        with pytest.raises(ValueError, match=r"\(\w+Error: .+\), and nothing was executed"):
            convert.read(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        (
            {"config": {"a": 1}, "epoch": 2},
            "or a dict of them as state_dict .* got entries config, epoch",
        ),
        ([torch.ones(2)], "must hold tensors by name, .* got a list; save"),
        ({"state_dict": {"a": torch.ones(2), "b": 3}}, "only, got other values in b"),
    ],
)
def test_a_file_without_named_tensors_is_refused(content, sentence, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=sentence):
        convert.read(tmp_path / "a.pt")


def test_an_unknown_suffix_and_a_missing_file_are_refused(tmp_path):
    for act in (convert.read, lambda path: convert.write(path, TensorFile(TENSORS))):
        with pytest.raises(ValueError, match=r"must end in \.pt, .*, got '\.bin'"):
            act(tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError, match=r"a\.pt is not a file"):
        convert.read(tmp_path / "a.pt")


def test_without_torch_its_files_are_refused_and_safetensors_works(tmp_path, monkeypatch):
    convert.write(tmp_path / "a.pt", TensorFile(TENSORS))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'vla-jax\[torch\]'"):
        convert.read(tmp_path / "a.pt")
    convert.write(tmp_path / "a.safetensors", TensorFile(TENSORS))
    assert_same(convert.read(tmp_path / "a.safetensors").tensors, dict(sorted(TENSORS.items())))


@each_suffix
def test_a_file_is_overwritten_only_with_overwrite_and_atomically(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    convert.write(path, TensorFile({"a": np.zeros(3)}))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists already; choose another name"):
        convert.write(path, TensorFile({"a": np.ones(3)}))
    with pytest.raises(ValueError, match="cannot store these tensors"):  # strings are unsupported
        convert.write(path, TensorFile({"a": np.array(["text"])}), overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    convert.write(path, TensorFile({"a": np.ones(3)}), overwrite=True)
    assert convert.read(path).tensors["a"].sum() == 3


def test_a_view_of_few_numbers_is_refused_before_it_is_copied(tmp_path):
    path = tmp_path / "view.pt"
    torch.save({"a": torch.zeros(1).expand(10**5, 10**5)}, path)
    with pytest.raises(ValueError, match=r"must hold its tensors in full, got larger .*: a; save"):
        weight_files.read(path)


def test_a_flipped_bit_of_a_torch_file_is_refused_with_its_member(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(2000.0)}, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("a/data/0")
    for offset in (100, 2000, 7000):  # behind the member's header
        damaged = content.copy()
        damaged[member.header_offset + 128 + offset] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.pt is damaged.*a/data/0.*copy it again"):
            weight_files.read(path)


def test_a_dimension_that_no_array_can_have_is_refused_with_its_file(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**19, 0], "data_offsets": [0, 0]}})
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(ValueError, match=r"a\.safetensors is not a safetensors file"):
        weight_files.read(path)


def test_a_layer_of_a_huge_number_is_refused_before_names_are_made():
    with pytest.raises(ValueError, match="weight_ih_l999999999 must be of one of at most 1000"):
        sizes.count_layers(["weight_ih_l999999999"], r"weight_ih_l(\d+)")
