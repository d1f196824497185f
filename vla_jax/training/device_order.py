"""Order of the devices in a mesh: those that exchange most are close to each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


def arrange(sizes: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices `[data, fsdp, tensor]`.

    GPUs and CPUs are in the order of their numbers, which count those of one host after the other.
    TPUs are placed by their network. Of several slices each one has a part of `data`, so that only
    gradients pass between them. `jax.make_mesh` refuses several slices, and hosts with GPUs, which
    count as slices too.

    Args:
      sizes: of the axes `data`, `fsdp` and `tensor`; their product is the number of devices.
      devices: of all processes.

    Raises:
      ValueError: `data` cannot be split over the slices, or the devices are no block of the network
        of their slice.
    """
    if devices[0].platform != "tpu":
        return np.array(sorted(devices, key=lambda device: device.id)).reshape(sizes)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, *inner = sizes
    if data % num_slices:
        raise ValueError(
            f"data must be a multiple of the {num_slices} TPU slices in --mesh, got {data}; give "
            "fsdp and tensor sizes that fit into a slice."
        )
    # Without split axes many sizes have no place.
    try:
        if num_slices == 1:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(
            (data // num_slices, *inner),
            (num_slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"the {len(devices)} TPU devices of --mesh must be a block of their network, of the "
            f"same size in every slice, got data={data},fsdp={inner[0]},tensor={inner[1]}; choose "
            "sizes that take all devices."
        ) from error
