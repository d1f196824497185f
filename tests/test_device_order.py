"""Devices of a mesh: hosts with GPUs, and TPU slices, by stand-ins with the same attributes."""

import dataclasses

import numpy as np
import pytest

from vla_jax.training.device_order import arrange


@dataclasses.dataclass(frozen=True)
class Device:
    """Attributes of a device by which JAX places it."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def gpus(num_hosts, per_host):
    """Each host is a slice, unless NVLink joins hosts."""
    return [Device(i, i // per_host, i // per_host) for i in range(num_hosts * per_host)]


def tpus(num_slices, width, height):
    """Slices of `width` × `height` chips in hosts of 2 × 2."""
    found = []
    for index in range(num_slices):
        for x, y in np.ndindex(width, height):
            host = index * width * height // 4 + (x // 2) * (height // 2) + y // 2
            found.append(Device(len(found), host, index, "tpu", "TPU v4", (x, y, 0)))
    return found


def axis_values(array, attribute):
    return np.vectorize(lambda device: getattr(device, attribute))(array)


@pytest.mark.parametrize("sizes", [(16, 1, 1), (1, 16, 1), (2, 8, 1), (4, 2, 2)])
def test_hosts_with_gpus_follow_each_other(sizes):
    devices = gpus(num_hosts=2, per_host=8)
    array = arrange(sizes, devices[1::2] + devices[::2])  # in the order of processes, or any other
    assert array.shape == sizes
    assert list(array.flat) == devices


@pytest.mark.parametrize("sizes", [(16, 1, 1), (8, 2, 1), (2, 8, 1), (1, 2, 8)])
def test_every_size_has_a_place_on_one_slice(sizes):
    devices = tpus(1, 4, 4)
    array = arrange(sizes, devices)
    assert array.shape == sizes
    assert set(array.flat) == set(devices)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 2, 2)])
def test_slices_split_data_and_nothing_else(sizes):
    devices = tpus(2, 2, 2)
    array = arrange(sizes, devices)
    assert set(array.flat) == set(devices)
    slices = axis_values(array, "slice_index")
    np.testing.assert_array_equal(slices, np.sort(slices, axis=0))
    assert np.all(slices == slices[:, :1, :1])


@pytest.mark.parametrize(
    ("sizes", "devices", "sentence"),
    [
        (
            (1, 8, 1),
            tpus(2, 2, 2),
            "data must be a multiple of the 2 TPU slices in --mesh, got 1; give",
        ),
        (
            (3, 1, 1),
            tpus(1, 2, 2)[:3],
            "the 3 TPU devices of --mesh must be a block .*got data=3,fsdp=1,tensor=1; choose",
        ),
        ((2, 1, 1), tpus(2, 2, 2)[3:6], "must be a block .*, of the same size in every slice"),
    ],
)
def test_what_has_no_place_is_refused(sizes, devices, sentence):
    with pytest.raises(ValueError, match=sentence):
        arrange(sizes, devices)
