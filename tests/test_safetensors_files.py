"""Files of tensors: read one by one, written one by one, damaged ones refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vla_jax.backbones import safetensors_files
from vla_jax.backbones.safetensors_files import Entry

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(3, dtype=np.float16),
    "brain": np.arange(5).astype(jnp.bfloat16),
    "count": np.array(7),
    "mask": np.array([[True, False]]),
    "none": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def same(found):
    assert set(found) == set(TENSORS)
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape


def test_tensors_are_opened_one_by_one(path):
    stored = safetensors_files.find(path.parent)
    same({name: tensor.open() for name, tensor in stored.items()})
    assert not stored["a"].open().flags.writeable


def test_written_tensors_are_read_by_safetensors(tmp_path):
    entries = [Entry(name, array.dtype, array.shape) for name, array in TENSORS.items()]
    order = []
    safetensors_files.write(
        tmp_path / "a.safetensors", entries, lambda name: order.append(name) or TENSORS[name]
    )
    assert order == list(TENSORS)
    same(load_file(tmp_path / "a.safetensors"))
    header = (tmp_path / "a.safetensors").read_bytes()
    assert int.from_bytes(header[:8], "little") % 8 == 0


def test_a_truncated_file_is_refused_at_any_length(path):
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete \("):
            safetensors_files.find(path.parent)


def test_a_file_with_a_damaged_header_is_refused_or_has_the_right_sizes(path):
    """A flipped bit may change a name; it never gives a tensor outside the file."""
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for position in range(size):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            stored = safetensors_files.find(path.parent)
        except ValueError as error:
            sentence, refused = str(error), refused + 1
            assert_named(sentence, path)
            continue
        for tensor in stored.values():
            assert tensor.open().shape == tensor.shape
    assert refused > size / 3


def assert_named(sentence, path):
    assert str(path) in sentence


@pytest.mark.parametrize(
    ("index", "error", "sentence"),
    [
        ({}, ValueError, "must have a dict 'weight_map'"),
        ({"weight_map": ["a"]}, ValueError, "must have a dict 'weight_map'"),
        ({"weight_map": {"a": 1}}, ValueError, "must have a dict 'weight_map'"),
        ({"weight_map": {"a": "b.safetensors"}}, FileNotFoundError, r"b\.safetensors is missing"),
        ({"weight_map": {"a": "../b"}}, FileNotFoundError, "is missing, which .* names"),
        ({"weight_map": {"a": "/etc/passwd"}}, FileNotFoundError, "is missing, which .* names"),
        ({"weight_map": {"a": "é" * 300}}, FileNotFoundError, "is missing, which .* names"),
        ({"weight_map": {"b": "model.safetensors"}}, ValueError, "lacks the tensor b, which"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index, error, sentence, path):
    (path.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=sentence):
        safetensors_files.find(path.parent)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"found neither; download .* safetensors format"):
        safetensors_files.find(tmp_path)
