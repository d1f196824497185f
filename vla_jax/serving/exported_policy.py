"""A policy exported by `python -m vla_jax.export`, loaded with jax, numpy and flatbuffers only.

    policy = load(FOLDER)
    state = policy.init(batch_size)
    state, action = policy.step(state, observation, reset)

`observation` maps names to arrays `[B, ...]` as in `policy.spec["observation"]`, its `instruction`
is `policy.tokenize(TEXT)` for every robot, `reset [B]` is True where an episode starts. `state`
maps names to arrays `[B, ...]`. This file is copied into FOLDER as load.py.
"""

import json
import pathlib
import unicodedata
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export


class ExportedPolicy(NamedTuple):
    """Functions of a loaded policy."""

    spec: dict[str, Any]  # content of policy.json
    init: Callable[[int], dict[str, Any]]  # batch size -> state
    # (state, observation, reset) -> state, action [B, A] in the robot's units
    step: Callable[..., tuple[dict[str, Any], np.ndarray]]
    tokenize: Callable[[str], np.ndarray]  # instruction -> ids [S] int32


def load(folder: str | pathlib.Path) -> ExportedPolicy:
    """Returns the policy in a folder; the first step of each batch size compiles.

    Args:
      folder: written by `python -m vla_jax.export`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or the policy is not for this machine.
    """
    folder = pathlib.Path(folder)
    spec = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    platform = export.default_export_platform()
    if platform not in spec["platforms"]:
        raise ValueError(
            f"platform must be one of {spec['platforms']}, got '{platform}'; export with "
            f"--platforms {platform}."
        )
    params = jax.device_put(_read_tensors(folder, "params", spec))
    initial = _read_tensors(folder, "state", spec)
    program = export.deserialize(bytearray(_read_file(folder, "step.stablehlo", spec)))
    run = jax.jit(program.call)

    def init(batch_size: int) -> dict[str, Any]:
        if batch_size < 1 or spec["batch_size"] not in (None, batch_size):
            raise ValueError(f"batch_size must be {spec['batch_size'] or '>= 1'}, got {batch_size}")
        return {name: np.repeat(row, batch_size, axis=0) for name, row in initial.items()}

    def step(
        state: Mapping[str, Any], observation: Mapping[str, Any], reset: Any
    ) -> tuple[dict[str, Any], np.ndarray]:
        reset = np.asarray(reset)
        if reset.dtype != bool or reset.ndim != 1:
            raise ValueError(f"reset must be bool [B], got {reset.dtype} {list(reset.shape)}.")
        _check("state", state, spec["state"], len(reset))
        _check("observation", observation, spec["observation"], len(reset))
        new_state, action = run(params, dict(state), dict(observation), reset)
        action = np.asarray(action)
        if not np.isfinite(action).all():
            raise ValueError(f"action must be finite, got {action}; check the observation.")
        return new_state, action

    return ExportedPolicy(spec, init, step, lambda text: _tokenize(text, spec["tokenizer"]))


def _check(what: str, arrays: Mapping[str, Any], expected: Mapping[str, Any], size: int) -> None:
    if set(arrays) != set(expected):
        raise ValueError(f"{what} must have {sorted(expected)}, got {sorted(arrays)}.")
    for name, array in arrays.items():
        dtype, shape = expected[name]["dtype"], [size, *expected[name]["shape"]]
        if str(getattr(array, "dtype", type(array))) != dtype or list(array.shape) != shape:
            got = f"{getattr(array, 'dtype', type(array))} {list(np.shape(array))}"
            raise ValueError(f"{name} of {what} must be {dtype} {shape}, got {got}; convert it.")


def _tokenize(text: str, tokenizer: Mapping[str, Any]) -> np.ndarray:
    """Returns the ids of an instruction: of a stored one, or by hashing its words."""
    if text in tokenizer["instructions"]:
        return np.array(tokenizer["instructions"][text], np.int32)
    if tokenizer["kind"] != "word_hashing":
        raise ValueError(
            f"instruction must be one of {sorted(tokenizer['instructions'])}, got {text!r}; export "
            "with --instructions, or pass ids of the model's own tokenizer."
        )
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = [c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in folded]
    words = "".join(kept).split()[: tokenizer["max_words"]]
    ids = np.zeros(tokenizer["max_words"], np.int32)
    ids[: len(words)] = [1 + zlib.crc32(w.encode()) % (tokenizer["vocab_size"] - 1) for w in words]
    return ids


def _read_file(folder: pathlib.Path, name: str, spec: Mapping[str, Any]) -> np.ndarray:
    """Returns the bytes of a file, mapped, after a comparison with its checksum."""
    data: Any = np.memmap(folder / name, np.uint8, "r")
    if zlib.crc32(data) != spec["files"][name]:
        raise ValueError(f"{folder / name} is damaged: its checksum differs; export it again.")
    return data


def _read_tensors(folder: pathlib.Path, what: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays of a safetensors file by name."""
    data = _read_file(folder, f"{what}.safetensors", spec)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    arrays = {}
    for name in spec[what]:
        first, last = header[name]["data_offsets"]
        flat = data[start + first : start + last].view(jnp.dtype(spec[what][name]["dtype"]))
        arrays[name] = flat.reshape(header[name]["shape"])
    return arrays
