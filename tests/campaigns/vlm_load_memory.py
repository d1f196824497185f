"""Peak memory of a process that loads a vision-language model, on a synthetic checkpoint.

    python tests/campaigns/vlm_load_memory.py [--gigabytes 2]

The bound is: the bytes of all params on the devices (which are host memory here), one shard of the
params, and one tensor. Takes about a minute and twice the size of the checkpoint in memory.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.backbones import models, safetensors_files, tensor_names, weights
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.backbones.safetensors_files import Entry
from vla_jax.backbones.smolvlm import SmolVLMConfig
from vla_jax.backbones.vlm_options import VLMOptions
from vla_jax.training import parallel

CASES = (("bfloat16", 1), ("float32", 1), ("bfloat16", 8), ("float32", 8))  # dtype, devices
NUM_FILES = 4


def write_checkpoint(folder: pathlib.Path, gigabytes: float) -> None:
    """Writes a bfloat16 model of about this size, tensor by tensor."""
    wide = round(2048 * (gigabytes / 2) ** 0.5 / 64) * 64
    language = RotaryDecoderConfig(
        vocab_size=8192, hidden_size=wide, intermediate_size=4 * wide, num_layers=15,
        num_heads=wide // 64, num_key_value_heads=wide // 64,
    )  # fmt: skip
    config = SmolVLMConfig(language=language, options=VLMOptions(param_dtype="bfloat16"))
    model = models.get(config)
    places = tensor_names.places(model.tensors(config), model.shapes(config))
    names = list(places)
    weight_map = {}
    for number in range(NUM_FILES):
        file = f"model-{number + 1:05}-of-{NUM_FILES:05}.safetensors"
        part = names[number::NUM_FILES]
        entries = [Entry(name, np.dtype(jnp.bfloat16), places[name].shape) for name in part]
        safetensors_files.write(
            folder / file, entries, lambda name: np.full(places[name].shape, 0.01, jnp.bfloat16)
        )
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(model.to_json(config)))


def memory(field: str) -> float:
    """Memory of this process, MB: `VmRSS` now, or `VmHWM` at its peak."""
    (line,) = (
        line
        for line in pathlib.Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) / 1000


def measure(folder: str, dtype: str, num_devices: int) -> dict[str, float]:
    """Loads the checkpoint in this process; sizes in MB."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    config = weights.load_config(folder)
    options = dataclasses.replace(config.options, param_dtype=dtype)
    config = dataclasses.replace(config, options=options)
    mesh = parallel.make_mesh(f"fsdp={num_devices}") if num_devices > 1 else None
    jax.block_until_ready(jnp.zeros(8) + 1)
    stored = safetensors_files.find(folder)
    tensor = max(np.prod(t.shape) * t.dtype.itemsize for t in stored.values()) / 1e6
    before = memory("VmRSS")
    params = weights.load(folder, config=config, mesh=mesh)[1]
    jax.block_until_ready(params)
    leaves = jax.tree.leaves(params)
    shards = [shard.data for leaf in leaves for shard in leaf.addressable_shards]
    # simulated devices share the memory of a replicated param
    memories = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}
    on_devices = sum(memories.values()) / 1e6
    largest = max(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / 1e6
    shard = on_devices / num_devices
    peak = memory("VmHWM") - before
    return {
        "params on the devices": on_devices,
        "one shard of the params": shard,
        "largest slice of a param": largest,
        "one tensor": tensor,
        "peak": peak,
        "beyond the params": peak - on_devices,
        "bound": shard + tensor,
    }


def main() -> None:
    """Writes the checkpoint, measures every case in a process of its own, and deletes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint, GB")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        folder, dtype, num_devices = args.case
        print(json.dumps(measure(folder, dtype, int(num_devices))))
        return
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        free = shutil.disk_usage(folder).free / 1e9
        if free < 1.5 * args.gigabytes:
            sys.exit(f"{folder} has {free:.1f} GB left, {1.5 * args.gigabytes:.1f} are needed.")
        write_checkpoint(folder, args.gigabytes)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"checkpoint: {size / 1e9:.2f} GB in {NUM_FILES} files; sizes in MB")
        for dtype, num_devices in CASES:
            command = [sys.executable, __file__, "--case", str(folder), dtype, str(num_devices)]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            result = subprocess.run(command, env=environment, check=True, capture_output=True)
            found = json.loads(result.stdout)
            verdict = "within" if found["beyond the params"] <= found["bound"] else "ABOVE"
            sizes = ", ".join(f"{name} {value:.0f}" for name, value in found.items())
            print(f"{dtype}, {num_devices} devices: {sizes}: {verdict}", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
