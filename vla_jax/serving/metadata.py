"""First message of the server: what the policy takes and gives, and the limits."""

from typing import Any

import vla_jax
from vla_jax.acting.agent import AgentConfig
from vla_jax.runs import Run
from vla_jax.serving.observations import ObservationSpec
from vla_jax.serving.server import Limits

PROTOCOL = "openpi+session/1"
FEATURES = ["session_id", "reset", "step", "endpoint", "frames"]


def make_metadata(
    run: Run,
    agent: AgentConfig,
    spec: ObservationSpec,
    limits: Limits,
    window_size: int,
    horizon: int,
) -> dict[str, Any]:
    """Returns the metadata as plain values.

    Args:
      run: that is served.
      agent: config of the agent, with the options of the server.
      spec: of its observations.
      limits: of the server.
      window_size: W in environment steps.
      horizon: actions of a reply.
    """
    images = {
        part.name: {
            "shape": [part.height, part.width, 3],
            "dtype": "uint8",
            "accepts": list(part.keys),
        }
        for part in spec.images
    }
    columns = {
        part.name: {"shape": [part.size], "dtype": "float32", "accepts": list(part.keys)}
        for part in spec.columns
    }
    return {
        "server": "vla_jax",
        "version": vla_jax.__version__,
        "protocol": PROTOCOL,
        "features": FEATURES,
        "run": {"name": run.folder.resolve().name, "step": run.step},
        "observation": {**images, **columns},
        "action": {
            "dim": len(run.norm_stats["action"].mean),
            "horizon": horizon,
            "gripper": "+1 open, -1 closed",
        },
        "memory": {
            "mode": agent.mode,
            "window_size": window_size,
            "instruction_steps": agent.instruction_steps,
        },
        "limits": {
            "message_bytes": limits.message_bytes,
            "sessions": limits.sessions,
            "session_ttl_s": limits.session_ttl_s,
            "prompt_chars": limits.prompt_chars,
        },
        **_roboarena(spec),
    }


def _roboarena(spec: ObservationSpec) -> dict[str, Any]:
    """Returns the fields that RoboArena's clients read."""
    names = [part.name for part in spec.images]
    first = spec.images[0] if spec.images else None
    return {
        "image_resolution": None if first is None else [first.height, first.width],
        "needs_wrist_camera": "image_wrist" in names,
        "n_external_cameras": len([name for name in names if name != "image_wrist"]),
        "needs_stereo_camera": False,
        "needs_session_id": False,
        "action_space": "cartesian_velocity",
    }
