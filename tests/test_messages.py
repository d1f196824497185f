"""Codec of the wire: round trips, openpi's bytes, and everything that a stranger may not send."""

import contextlib
import subprocess
import sys

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vla_jax.serving.messages import DTYPES, MessageError, pack, unpack

PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8)
NUMBERS = st.floats(allow_nan=False)
ARRAYS = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=4))
)
MESSAGES = st.recursive(
    PLAIN | NUMBERS | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4).filter(lambda key: key != "nd"), inner, max_size=3)
    ),
    max_leaves=6,
)


def same(one, other):
    if isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other and type(one) is type(other)


def array(**fields):
    whole = {"data": bytes(8), "dtype": "<f4", "shape": [2], **fields}
    return msgpack.packb({"__ndarray__": True, **whole})


@given(MESSAGES, st.booleans())
@settings(deadline=None, max_examples=50)
def test_a_message_is_unpacked_as_it_was_packed(message, text_keys):
    assert same(message, unpack(pack(message, text_keys=text_keys)))


@pytest.mark.parametrize("dtype", ["|b1", "|u1", "<f4"])
def test_an_array_without_axes_stays_an_array(dtype):
    assert same(np.ones((), dtype), unpack(pack(np.ones((), dtype))))


def test_an_array_has_the_bytes_of_openpi():
    expected = b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08" + bytes(8)
    expected += b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x91\x02"
    assert pack(np.zeros(2, np.float32)) == expected


def test_scalars_of_numpy_keep_their_dtype():
    for scalar in (np.float32(1.5), np.int64(-3), np.uint8(255), np.bool_(True)):
        unpacked = unpack(pack(scalar))
        assert unpacked == scalar
        assert unpacked.dtype == scalar.dtype
    assert unpack(pack({"prompt": np.str_("lift")})) == {"prompt": "lift"}


def test_arrays_of_other_byte_order_and_stride_are_packed_by_value():
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    np.testing.assert_array_equal(unpack(pack(array)), array)


def test_unpacked_arrays_are_views_that_cannot_be_written():
    assert not unpack(pack(np.zeros(3))).flags.writeable


@pytest.mark.parametrize(
    "value",
    [np.array([None]), np.array(["a"]), np.zeros(2, complex), np.zeros(1, "i4,i4"), 1j, {1}],
)
def test_other_values_are_not_packed(value):
    with pytest.raises(ValueError, match=r"^message must hold plain values and arrays: .*got|type"):
        pack({"x": value})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (array(dtype="|O", shape=[1]), r"^dtype of an array must be one of .*, got '\|O'\.$"),
        (array(dtype="O", shape=[1]), "^dtype of an array must be one of"),
        (array(dtype="i4,O", shape=[1]), "^dtype of an array must be one of"),
        (array(dtype="<V8", shape=[1]), "^dtype of an array must be one of"),
        (array(dtype="<c8", shape=[1]), "^dtype of an array must be one of"),
        (array(dtype="<M8[s]", shape=[1]), "^dtype of an array must be one of"),
        (array(dtype=">f4"), "^dtype of an array must be one of"),
        (array(dtype=None), "^dtype of an array must be one of"),
        (array(dtype=[["a", "<f4"]]), "^dtype of an array must be one of"),
        (array(shape=[-1]), r"^shape of an array must be sizes in \[0, 2\^31\), got \[-1\]\.$"),
        (array(shape=[True, 2]), "^shape of an array"),
        (array(shape=[2.0]), "^shape of an array"),
        (array(shape=2), "^shape of an array"),
        (array(shape=None), "^shape of an array"),
        (array(shape=[2**63]), "^shape of an array"),
        (array(shape=[2**30] * 8), "must have .* bytes, got 8"),
        (array(shape=[1]), "must have 4 bytes, got 8"),
        (array(shape=[1] * 9), "^array must have at most 8 axes, got 9"),
        (array(data="12345678"), "^data of an array must be bin, got str"),
        (array(data=[0] * 8), "^data of an array must be bin, got list"),
        (msgpack.packb({b"__ndarray__": True}), "^dtype of an array"),
        (msgpack.packb({"__npgeneric__": True, "data": 300, "dtype": "|u1"}), "cannot hold 300"),
        (msgpack.packb({"__npgeneric__": True, "data": 1e300, "dtype": "<f4"}), "cannot hold 1e"),
        (msgpack.packb({"__npgeneric__": True, "data": b"", "dtype": "<f4"}), "must be a number"),
        (msgpack.packb({"__npgeneric__": True, "data": 1, "dtype": "O"}), "^dtype of an array"),
        (msgpack.packb({b"nd": True, b"kind": b"O", b"data": b""}), "msgpack-numpy"),
        (msgpack.packb({b"a": 1, "a": 2}), "^map must have every key once"),
        (msgpack.packb({1: 2}), "^message must be MessagePack"),
        (msgpack.packb(msgpack.ExtType(5, b"")), "^message must be without extension types"),
        (b"", "^message must be MessagePack, got 0 bytes"),
        (b"\xc1", "^message must be MessagePack"),
        (b"\x80\x80", "^message must be MessagePack"),
        (b"\xa1\xff", "^message must be MessagePack"),
        (b"\x91" * 100_000, "^message must be MessagePack"),  # nested lists
        (b"\xdd\xff\xff\xff\xff", "max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "^message must be MessagePack"),
        (msgpack.packb([[{}] * 4096] * 20), "^message must have at most 65536 entries"),
    ],
)
def test_a_stranger_cannot_send(data, message):
    with pytest.raises(MessageError, match=message) as error:
        unpack(data)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@given(st.binary(max_size=64))
@settings(deadline=None, max_examples=50)
def test_any_bytes_give_a_message_or_one_kind_of_error(data):
    with contextlib.suppress(MessageError):
        unpack(data)


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_changed_bytes_of_a_real_message_give_a_message_or_one_kind_of_error(data):
    message = bytearray(pack({"image": np.zeros((2, 2, 3), np.uint8), "prompt": "lift", "step": 3}))
    for _ in range(3):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MessageError):
        unpack(bytes(message[: data.draw(st.integers(0, len(message)))]))


def test_the_codec_loads_no_jax():
    code = "import sys, vla_jax.serving.messages as m; m.pack([1]); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
