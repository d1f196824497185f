"""Params, optimiser and gradients of a sharded training take the memory of their shards."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from test_train_sharded import training

from train import memory_check, setup
from train.imitate import make_loss
from vla_jax.policies import policy
from vla_jax.training import optim, parallel, update
from vla_jax.training.update import with_count

PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
sys.path.append("tests")
import test_fsdp_memory
print(json.dumps([test_fsdp_memory.compiled_bytes(mesh) for mesh in ("data=8", "fsdp=8")]))
"""


def compiled_bytes(mesh_text):
    """Returns the number of params, and the most bytes on a device during one update."""
    config = training("", "", mesh=mesh_text)
    backbone = config.agent.policy.backbone
    language = dataclasses.replace(
        backbone.language, vocab_size=4096, hidden_size=512, intermediate_size=1536, num_layers=8,
        num_heads=8, num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    backbone = dataclasses.replace(
        backbone,
        language=language,
        options=dataclasses.replace(backbone.options, remat="layers"),
    )
    connected = policy.connect(backbone, config.agent.policy.decoder)
    config = dataclasses.replace(
        config,
        agent=dataclasses.replace(config.agent, policy=connected),
        loader=dataclasses.replace(config.loader, batch_size=8),
    )
    settings, shapes = setup.make_optim_config(config), setup.param_shapes(config)
    optimizer = optim.make_optimizer(settings, 2, shapes)
    step = with_count(
        update.make_update(make_loss(config), optimizer, ema_decay=settings.ema_decay)
    )
    mesh = parallel.make_mesh(mesh_text)
    state = setup.make_start(jax.random.key(0), config, optimizer).shapes
    shardings = parallel.make_shardings(state, mesh, setup.sharding_rules(config))
    compiled = parallel.jit_update(step, mesh, shardings).lower(
        state, memory_check.example_batch(config), jax.random.key(0)
    )
    memory = compiled.compile().memory_analysis()
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # the new state takes the place of the old one, which is donated
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return num_params, kept + memory.temp_size_in_bytes


@pytest.mark.slow
def test_eight_shards_take_a_fifth_of_the_memory_of_a_copy():
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    (num_params, copied), (_, sharded) = json.loads(found.stdout.splitlines()[-1])
    assert num_params > 29e6
    assert sharded <= copied / 5
