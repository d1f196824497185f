"""State of a session as safetensors: for another server, or for the same one after a restart.

The tensors are the leaves of the session's row by path, the words of its prompt and its last
actions; the metadata holds the rest and the name of the policy, since a memory means nothing to
another one.
"""

import hashlib
import json
import pathlib
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vla_jax import trees
from vla_jax.acting.agent import AgentConfig, AgentState
from vla_jax.data import normalize
from vla_jax.files import Path, replacing
from vla_jax.runs import Run
from vla_jax.serving.sessions import Session, StoredReply, digest


class Stored(NamedTuple):
    """Sessions of an earlier server."""

    sessions: list[tuple[str, Session, AgentState]]
    damaged: frozenset[str]  # digests of the sessions whose memory is lost


_WORDS, _ACTIONS = "session/words", "session/actions"
_ABOUT = ("session_id", "policy", "session")  # metadata, besides the checksum
_FIELDS = {"age": int, "prompt": str, "extended": bool}


def to_bytes(session_id: str, session: Session, row: AgentState, policy: str) -> bytes:
    """Returns a session as the content of a safetensors file.

    Args:
      session_id: of the session.
      session: after a request.
      row: leaves `[1, ...]` on the host.
      policy: name of the policy, which must be the same where the session goes on.
    """
    tensors = {path: _storable(leaf) for path, leaf in trees.leaves_by_path(row).items()}
    tensors[_WORDS] = np.asarray(session.words)
    facts: dict[str, Any] = {name: getattr(session, name) for name in _FIELDS}
    if session.last is not None:
        tensors[_ACTIONS] = np.asarray(session.last.actions)
        facts["last"] = [session.last.step, session.last.num_frames, session.last.reset]
    about = {"session_id": session_id, "policy": policy, "session": json.dumps(facts)}
    return save(tensors, {**about, "crc32": _checksum(tensors, about)})


def from_bytes(data: bytes, like: AgentState, policy: str) -> tuple[str, Session, AgentState]:
    """Returns the session in the content of a safetensors file, without a row of the table.

    Args:
      data: from `to_bytes`.
      like: shapes and dtypes of a row, leaves `[1, ...]`.
      policy: name of the policy that is served.

    Raises:
      ValueError: the data is damaged, or of another policy.
    """
    about = _metadata(data)
    if about.get("policy") != policy:
        raise ValueError(
            f"session must be of policy '{policy}', got one of '{str(about.get('policy'))[:200]}'; "
            "serve the same checkpoint in the same mode."
        )
    try:
        tensors = load(data)
        if about["crc32"] != _checksum(tensors, about):
            raise ValueError("its checksum is another one")
        facts = json.loads(about["session"])
        fields = {name: kind(facts[name]) for name, kind in _FIELDS.items()}
        words, last = tensors[_WORDS], None
        if facts.get("last") is not None:
            step, num_frames, reset = facts["last"]
            last = StoredReply(tensors[_ACTIONS], int(step), int(num_frames), bool(reset))
        _check_arrays(words, last, like)
        session = Session(slot=-1, words=words, last_used=0.0, last=last, **fields)
        row = jax.tree.map(_restored, trees.map_paths(tensors.__getitem__, like), like)
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"session must be a complete export of this server, got a damaged one ({error}); "
            "export it again."
        ) from error
    return about["session_id"], session, row


def policy_name(run: Run, agent: AgentConfig, options: str) -> str:
    """Returns the name of a policy, which differs if anything differs that a memory depends on.

    Args:
      run: with params and statistics.
      agent: config of the agent, with the options of the server.
      options: further ones, as text.
    """
    whole = hashlib.sha256(repr(agent).encode())
    whole.update(json.dumps(normalize.to_json(run.norm_stats), sort_keys=True).encode())
    for path, leaf in sorted(trees.leaves_by_path(run.params).items()):
        array = np.ascontiguousarray(leaf)
        about = f"{path} {array.dtype} {array.shape} {zlib.crc32(array.view(np.uint8).data)}"
        whole.update(about.encode())
    name = run.folder.resolve().name
    return f"{name}, step {run.step}, {agent.mode}, {options}, {whole.hexdigest()[:16]}"


def file_of(folder: Path, session_id: str) -> pathlib.Path:
    """Returns the file of a session."""
    return pathlib.Path(folder) / f"{digest(session_id)}.safetensors"


def write(folder: Path, session_id: str, data: bytes) -> None:
    """Writes a session; the file is complete or unchanged, also if the process is killed.

    Raises:
      OSError: the file cannot be written.
    """
    with replacing(file_of(folder, session_id)) as part:
        part.write_bytes(data)


def remove(folder: Path, session_id: str) -> None:
    """Deletes the file of a session, if there is one."""
    file_of(folder, session_id).unlink(missing_ok=True)


def read_all(folder: Path, like: AgentState, policy: str) -> Stored:
    """Returns the sessions in a folder; there is a warning for each damaged file.

    Raises:
      ValueError: a file is of another policy.
    """
    found, damaged = [], []
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        data = path.read_bytes()
        try:
            found.append(from_bytes(data, like, policy))
        except ValueError as error:
            if "session must be of policy" in str(error):
                raise ValueError(f"{path}: {error}") from error
            warnings.warn(f"{path}: {error}", stacklevel=2)
            damaged.append(path.stem)
    return Stored(found, frozenset(damaged))


def _metadata(data: bytes) -> dict[str, str]:
    """Returns the metadata in the header, which `load` drops."""
    size = int.from_bytes(data[:8], "little")
    try:
        about = json.loads(data[8 : 8 + size])["__metadata__"]
        if all(isinstance(about[name], str) for name in _ABOUT):
            return about
    except (ValueError, KeyError, TypeError, RecursionError):  # one sentence for all of them, below
        pass
    raise ValueError(
        f"session must be a safetensors file of this server, got {len(data)} other bytes; export "
        "it again."
    )


def _checksum(tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> str:
    """Returns the CRC-32 of a session, since safetensors have none of their own."""
    crc = zlib.crc32("\0".join(about[name] for name in _ABOUT).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def _check_arrays(words: np.ndarray, last: StoredReply | None, like: AgentState) -> None:
    """Raises a ValueError if arrays beside the row would not fit the policy's programs."""
    expected = (like.instruction.shape[-1:], np.dtype(np.int32))
    if (words.shape, words.dtype) != expected:
        raise ValueError(f"got words {words.dtype} {list(words.shape)}, expected {expected}")
    if last is not None and (
        last.actions.ndim != 2
        or last.actions.dtype != np.float32
        or not np.isfinite(last.actions).all()
    ):
        raise ValueError("the last actions are no finite float32 [K, A]")


def _storable(leaf: Any) -> np.ndarray:
    """Returns a leaf in a dtype that NumPy's safetensors have; bfloat16 by its bits."""
    array = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
    return array.view(np.uint16) if array.dtype.kind == "V" else array


def _restored(stored: np.ndarray, like: Any) -> np.ndarray:
    array = stored.view(like.dtype) if np.dtype(like.dtype).kind == "V" else stored
    if array.shape != like.shape or array.dtype != like.dtype:
        raise ValueError(
            f"got {array.dtype} {list(array.shape)}, expected {like.dtype} {list(like.shape)}"
        )
    if jnp.issubdtype(array.dtype, jnp.floating) and np.isnan(array.astype(np.float32)).any():
        raise ValueError("got NaN")
    return array
