"""Checksums of arrays: the same on the host and on every sharding, and no change is missed."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vla_jax.training import checksums, parallel

ARRAY = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, "int32", "uint8", "bool"])
def test_devices_and_host_agree_on_every_sharding(dtype):
    array = ARRAY.astype(dtype)
    mesh = parallel.make_mesh("data=2,fsdp=2")
    specs = [PartitionSpec(), PartitionSpec("data", "fsdp"), PartitionSpec(None, "fsdp")]
    placed = [jax.device_put(array, NamedSharding(mesh, spec)) for spec in specs]
    found = checksums.of_tree({"host": array, "device": jnp.asarray(array), "placed": placed})
    assert len(set(found.values())) == 1


def test_every_flipped_bit_and_every_exchange_is_found():
    expected = checksums.of_tree({"x": ARRAY})
    for place in range(ARRAY.size):
        for bit in (0, 22, 31):
            other = ARRAY.copy()
            other.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
            assert checksums.first_difference({"x": other}, expected) == "x"
    assert checksums.first_difference({"x": ARRAY[::-1]}, expected) == "x"
    negative = np.where(np.arange(6) < 2, -ARRAY, ARRAY)  # two signs in each row
    assert checksums.first_difference({"x": negative}, expected) == "x"
    assert not checksums.first_difference({"x": ARRAY}, expected)


def test_scalars_empty_arrays_and_long_arrays_have_checksums():
    long = np.arange(200_000, dtype=np.float64)
    found = checksums.of_tree({"scalar": 1.5, "empty": np.zeros((0, 3)), "long": long})
    assert found["empty"] == 0
    changed = long.copy()
    changed[-1] += 1
    assert found["long"] != checksums.of_tree({"long": changed})["long"]
