"""Several processes on this machine that compute together, with simulated devices."""

import os
import pathlib
import socket
import subprocess
import sys

# The programs of several processes must be compiled in each: collectives of CPU programs that come
# from JAX's compile cache run in an order that differs between processes, and Gloo then aborts one.
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
PREAMBLE = """
import sys
import jax
_, address, process_id, num_processes, num_devices, *args = sys.argv
jax.config.update("jax_num_cpu_devices", int(num_devices))
jax.distributed.initialize(address, int(num_processes), int(process_id))
sys.path.append("tests")
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_together(program, *args, num_processes=2, num_devices=2, timeout=500):
    """Runs a program, which finds `args`, in all processes; returns (stdout, stderr) of each.

    `num_devices` is that of each process.
    """
    address = f"127.0.0.1:{free_port()}"
    source = f"{PREAMBLE}{program}\njax.distributed.shutdown()\n"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", source, address]
            + [str(arg) for arg in (process_id, num_processes, num_devices, *args)],
            cwd=pathlib.Path(__file__).parents[1],
            env={**os.environ, **NO_CACHE},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process_id in range(num_processes)
    ]
    outputs = [process.communicate(timeout=timeout) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return outputs
