"""Export of an agent's step as a StableHLO program, with its params and a loader, to one folder.

policy.json               names, shapes and dtypes, tokenizer, versions, checksums
step.stablehlo            program of `Agent.step`, written by `jax.export`
params.safetensors        params of the policy
state.safetensors         state of one robot before its first step
load.py                   loader, a copy of `exported_policy`

Trees are flat dicts from the path of a leaf to the array, so that a program needs no class of this
library.
"""

import datetime
import importlib.metadata
import pathlib
import shutil
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vla_jax
from vla_jax import config as configs
from vla_jax import trees
from vla_jax.acting.agent import Agent, AgentConfig, AgentState, make_agent, read_instruction
from vla_jax.acting.observation_spec import observation_spec
from vla_jax.backbones import registry, safetensors_files, word_hashing
from vla_jax.backbones.safetensors_files import Entry
from vla_jax.config import MAX_LENGTH, check_names, checked
from vla_jax.files import crc32_of_file, write_json
from vla_jax.runs import Run
from vla_jax.serving import exported_policy
from vla_jax.types import Array, Params, make_observation

_CHECKED = ("step.stablehlo", "params.safetensors", "state.safetensors")
FILES = (*_CHECKED, "policy.json", "load.py", "__pycache__")  # that may be in the folder
FORMAT = 1  # version of policy.json; raised when an older loader could not read it
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
Tree = dict[str, Any]  # path of a leaf -> array, or its shape


@dataclass(frozen=True)
@checked(batch_size=(1, MAX_LENGTH))
class ExportConfig:
    """Form of an exported policy."""

    batch_size: int | None = None  # robots per step; None = any number, chosen at each call
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")  # machines that it runs on: also rocm
    instructions: tuple[str, ...] = ()  # instructions whose ids are stored with the policy
    # the only instruction of the policy, which then takes none; None = it takes ids
    fixed_instruction: str | None = None

    def __post_init__(self):
        """Checks the platforms and the instructions."""
        check_names("platforms", self.platforms, PLATFORMS)
        if not self.platforms or len(set(self.platforms)) < len(self.platforms):
            raise ValueError(
                f"platforms must be one or more different names, got {list(self.platforms)}."
            )
        if self.instructions and self.fixed_instruction is not None:
            raise ValueError(
                "instructions must be empty with fixed_instruction, with which the policy takes "
                f"none, got {len(self.instructions)}; leave one of them out."
            )


def write(
    folder: pathlib.Path, run: Run, config: ExportConfig, *, window_size: int | None = None
) -> None:
    """Writes a policy to an empty folder.

    Args:
      folder: to write into.
      run: the run, with the agent as it should act.
      config: form of the export.
      window_size: W in environment steps; None = as in training.

    Raises:
      ImportError: the package flatbuffers is missing.
      ValueError: the agent cannot be exported with any batch size, or not at all.
      OSError: the disk is full.
    """
    agent = make_agent(run.agent, run.norm_stats, window_size=window_size)
    observation = {
        name: jax.ShapeDtypeStruct(part.shape, part.dtype)
        for name, part in observation_spec(run.agent, run.norm_stats).items()
        if name != "instruction" or config.fixed_instruction is None
    }
    state = trees.leaves_by_path(agent.init(run.params, 1))
    params = trees.leaves_by_path(run.params)
    tokenizer = _tokenizer(run, config)
    exported = _trace(agent, run, config, params, state, observation)
    (folder / "step.stablehlo").write_bytes(exported.serialize())
    _write_tensors(folder / "params.safetensors", params)
    _write_tensors(folder / "state.safetensors", state)
    shutil.copyfile(exported_policy.__file__, folder / "load.py")
    about = {
        "format": FORMAT,
        **_versions(),
        "calling_convention": exported.calling_convention_version,
        "run": {"name": run.folder.resolve().name, "step": run.step, "robot": run.robot},
        "platforms": list(config.platforms),
        "batch_size": config.batch_size,
        "observation": {name: _about(part) for name, part in observation.items()},
        "fixed_instruction": config.fixed_instruction,
        "tokenizer": tokenizer,
        "action": {**_about(exported.out_avals[-1], 1), "gripper": "last, +1 open, -1 closed"},
        **_acting(run.agent, window_size),
        "state": {name: _about(leaf, 1) for name, leaf in state.items()},
        "params": {name: _about(leaf) for name, leaf in params.items()},
        "files": {name: crc32_of_file(folder / name) for name in _CHECKED},
    }
    write_json(folder / "policy.json", about)


def check_installed() -> None:
    """Raises an ImportError if the package that `jax.export` writes files with is missing."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "exporting a policy needs the package flatbuffers; install it with "
            "`pip install 'vla-jax[export]'`."
        ) from error


def _trace(
    agent: Agent, run: Run, config: ExportConfig, params: Tree, state: Tree, observation: Tree
) -> Any:
    """Returns the `jax.export.Exported` program of a step."""
    from jax import export

    check_installed()
    size = config.batch_size or export.symbolic_shape("b")[0]
    step = jax.jit(_flat_step(agent, run, config))
    arguments = (
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in params.items()},
        {name: _batch(leaf.shape[1:], leaf.dtype, size) for name, leaf in state.items()},
        {name: _batch(part.shape, part.dtype, size) for name, part in observation.items()},
        _batch((), jnp.dtype(bool), size),
    )
    try:
        return export.export(step, platforms=list(config.platforms))(*arguments)
    except (TypeError, ValueError, NotImplementedError, jax.errors.JAXTypeError) as error:
        if config.batch_size is not None:
            raise
        raise ValueError(
            "batch_size must be a number for this policy, whose program is not the same for every "
            f"size ({str(error).splitlines()[0]}); use --batch-size 1."
        ) from error


def _flat_step(agent: Agent, run: Run, config: ExportConfig) -> Any:
    """Returns `Agent.step` with flat dicts as arguments and results."""
    params_like = jax.tree.map(lambda _: 0, run.params)
    state_like = jax.eval_shape(lambda: agent.init(run.params, 1))
    fixed = config.fixed_instruction
    ids = None if fixed is None else read_instruction(run.agent, fixed)

    def step(params: Tree, state: Tree, observation: Tree, reset: Array) -> tuple[Tree, Array]:
        parts = dict(observation)
        instruction = parts.pop("instruction", None)
        if ids is not None:
            instruction = jnp.broadcast_to(jnp.asarray(ids)[None], (reset.shape[0], len(ids)))
        new_state, action = agent.step(
            _unflatten(params_like, params),
            _unflatten(state_like, state),
            make_observation(parts, instruction=instruction),
            reset,
        )
        return trees.leaves_by_path(new_state), action

    return step


def _unflatten(like: Params | AgentState, leaves: Tree) -> Any:
    return trees.map_paths(leaves.__getitem__, like)


def _batch(shape: tuple[int, ...], dtype: Any, size: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *shape), dtype)


def _tokenizer(run: Run, config: ExportConfig) -> dict[str, Any]:
    """Returns how the loader gets the ids of an instruction."""
    backbone: Any = run.agent.policy.backbone
    tokenize = registry.make_tokenizer(backbone, config.instructions)
    table = {text: tokenize(text).tolist() for text in config.instructions}
    if registry.get(backbone).tokenize is word_hashing.tokenize_for:
        sizes = {"max_words": backbone.max_words, "vocab_size": backbone.vocab_size}
        return {"kind": "word_hashing", **sizes, "instructions": table}
    return {"kind": "ids", "instructions": table}


def _acting(agent: AgentConfig, window_size: int | None) -> dict[str, Any]:
    """Returns how the agent acts, for the reader of policy.json."""
    layout = agent.action_layout
    return {
        "memory": {
            "decoder": agent.policy.decoder.kind,
            "mode": agent.mode,
            "window_size": window_size or agent.policy.decoder.window_size,
            "instruction_steps": agent.instruction_steps,
        },
        "execution": configs.to_dict(agent.execution),
        "action_layout": None if layout is None else configs.to_dict(layout),
    }


def _versions() -> dict[str, Any]:
    return {
        "vla_jax": vla_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "exported_on": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _about(leaf: Any, leading_axes: int = 0) -> dict[str, Any]:
    return {"shape": list(leaf.shape[leading_axes:]), "dtype": str(leaf.dtype)}


def _write_tensors(path: pathlib.Path, tensors: Tree) -> None:
    entries = [Entry(name, np.dtype(x.dtype), x.shape) for name, x in tensors.items()]
    safetensors_files.write(path, entries, lambda name: np.asarray(tensors[name]))
