"""Recurrent vision-language-action policies in JAX, as pure functions.

    import vla_jax

    config = vla_jax.connect(vla_jax.StateConfig(), vla_jax.DecoderConfig(kind="gru"))
    params = vla_jax.init_policy(jax.random.key(0), config)

The names in `__all__` are imported from their modules on first use, so that `import vla_jax`
itself loads nothing. The subpackages (`vla_jax.nn`, `vla_jax.data`, …) hold the complete interface.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_jax import (
        acting,
        actions,
        backbones,
        convert,
        data,
        envs,
        evaluation,
        nn,
        policies,
        rl,
        serving,
        training,
    )
    from vla_jax.acting.agent import AgentConfig, make_agent
    from vla_jax.backbones.perceiver import PerceiverConfig
    from vla_jax.backbones.state import StateConfig
    from vla_jax.evaluate import EvaluateConfig
    from vla_jax.evaluate import evaluate as evaluate_run
    from vla_jax.policies.decoder_config import DecoderConfig
    from vla_jax.policies.policy import PolicyConfig, connect, init_stream
    from vla_jax.policies.policy import apply as apply_policy
    from vla_jax.policies.policy import init as init_policy
    from vla_jax.policies.policy import step as step_policy
    from vla_jax.runs import load_run
    from vla_jax.training.losses import action_loss
    from vla_jax.training.optim import OptimConfig, make_optimizer
    from vla_jax.types import ActionChunk, Observation

__version__ = "0.1.0"

__all__ = [
    "ActionChunk",
    "AgentConfig",
    "DecoderConfig",
    "EvaluateConfig",
    "Observation",
    "OptimConfig",
    "PerceiverConfig",
    "PolicyConfig",
    "StateConfig",
    "acting",
    "action_loss",
    "actions",
    "apply_policy",
    "backbones",
    "connect",
    "convert",
    "data",
    "envs",
    "evaluate_run",
    "evaluation",
    "init_policy",
    "init_stream",
    "load_run",
    "make_agent",
    "make_optimizer",
    "nn",
    "policies",
    "rl",
    "serving",
    "step_policy",
    "training",
]

# name -> (module, attribute). No name may be that of a module of the package: `vla_jax.evaluate` is
# the module once it is imported, hence `evaluate_run` for the function.
_SOURCES = {
    "ActionChunk": ("types", "ActionChunk"),
    "AgentConfig": ("acting.agent", "AgentConfig"),
    "DecoderConfig": ("policies.decoder_config", "DecoderConfig"),
    "EvaluateConfig": ("evaluate", "EvaluateConfig"),
    "Observation": ("types", "Observation"),
    "OptimConfig": ("training.optim", "OptimConfig"),
    "PerceiverConfig": ("backbones.perceiver", "PerceiverConfig"),
    "PolicyConfig": ("policies.policy", "PolicyConfig"),
    "StateConfig": ("backbones.state", "StateConfig"),
    "action_loss": ("training.losses", "action_loss"),
    "apply_policy": ("policies.policy", "apply"),
    "connect": ("policies.policy", "connect"),
    "evaluate_run": ("evaluate", "evaluate"),
    "init_policy": ("policies.policy", "init"),
    "init_stream": ("policies.policy", "init_stream"),
    "load_run": ("runs", "load_run"),
    "make_agent": ("acting.agent", "make_agent"),
    "make_optimizer": ("training.optim", "make_optimizer"),
    "step_policy": ("policies.policy", "step"),
}


def __getattr__(name: str) -> Any:
    if name in _SOURCES:
        module, attribute = _SOURCES[name]
        return getattr(importlib.import_module(f"vla_jax.{module}"), attribute)
    if name in __all__:
        return importlib.import_module(f"vla_jax.{name}")
    raise AttributeError(f"module 'vla_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
