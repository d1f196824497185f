"""The smallest possible run folder: a random policy on the state."""

import json

import jax
import numpy as np

from vla_jax import config
from vla_jax.acting.agent import AgentConfig
from vla_jax.backbones.state import StateConfig
from vla_jax.data import normalize
from vla_jax.envs.table import jax_env, rules
from vla_jax.policies import policy
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training import checkpoint

DECODER = DecoderConfig(
    hidden_size=8, num_layers=1, action_horizon=2, window_size=4, head_sizes=(8,)
)
AGENT = AgentConfig(policy=policy.connect(StateConfig(token_dim=8, vocab_size=256), DECODER))
WORLD = jax_env.JaxTableConfig(image_size=0, max_steps=5)


def norm_stats():
    rng = np.random.default_rng(0)
    sizes = {"action": 7, "proprio": rules.PROPRIO_SIZE, "environment_state": rules.STATE_SIZE}
    columns = {name: rng.normal(0.1, 0.4, (50, size)) for name, size in sizes.items()}
    return {name: normalize.compute(column) for name, column in columns.items()}


def params(seed=0):
    return policy.init(jax.random.key(seed), AGENT.policy)


def write(folder, *, steps=(10,), ema=None):
    """Writes the files that `train.imitate` writes."""
    config.save(AGENT, folder / "agent.json")
    config.save(WORLD, folder / "world.json")
    (folder / "norm_stats.json").write_text(json.dumps(normalize.to_json(norm_stats())))
    checkpoints = checkpoint.open_checkpoints(folder / "checkpoints", keep=len(steps))
    for step in steps:
        state = {"params": params(step), "ema_params": ema}
        checkpoint.save(checkpoints, step, state, {})
        checkpoint.wait(checkpoints)
    checkpoint.close(checkpoints)
    return folder
