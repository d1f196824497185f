"""Names of the tensors of RoboVLMs' policy heads, and their paths in our params.

Kernels of PyTorch's `Linear` and `LSTM` are `[out, in]`; ours, like those of Hugging Face's GPT-2,
are `[in, out]`.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

from vla_jax.convert.conversion_report import Shape, abbreviate
from vla_jax.policies import decoders
from vla_jax.policies.decoder_config import DecoderConfig

HEAD = "act_head."
MLPS = {"arm": "actions.mlp", "gripper": "gripper.mlp"}  # our name -> RoboVLMs'
_PREFIX = re.compile(r"(?:(?:module|model|act_head)\.)*")  # of training wrappers
_BLOCK = {  # parts of a GPT-2 block, our name -> Hugging Face's
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.layers_0": "mlp.c_fc",
    "mlp.layers_1": "mlp.c_proj",
}


class HeadTensor(NamedTuple):
    """Counterpart in our params of a tensor of RoboVLMs' head."""

    path: tuple[str, ...]  # in the params
    shape: Shape  # in the params
    is_transposed: bool  # True if RoboVLMs' tensor is the transpose

    @property
    def their_shape(self) -> Shape:
        """Shape of RoboVLMs' tensor."""
        return self.shape[::-1] if self.is_transposed else self.shape


def head_tensors(config: DecoderConfig) -> dict[str, HeadTensor]:
    """Returns a dict from RoboVLMs' names, without prefix, to all params of a decoder."""
    params = jax.eval_shape(partial(decoders.init, config=config), jax.random.key(0))
    leaves: dict[tuple[str, ...], Any] = flatten_dict(params)
    return {
        _their_name(path): HeadTensor(path, leaf.shape, leaf.ndim == 2 and path[0] != "transformer")
        for path, leaf in leaves.items()
    }


def prefix_of(name: str) -> str:
    """Returns the prefix of a name, of training wrappers and `act_head.`."""
    match = _PREFIX.match(name)
    return match[0] if match else ""


def head_name(name: str) -> str:
    """Returns the name of a tensor in the result of `to_robovlms`, independent of its prefixes."""
    return HEAD + name.removeprefix(prefix_of(name))


def find_head(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Returns a dict from the names of the head's tensors without prefixes to those in the file.

    Raises:
      ValueError: there is no head, or two names differ only in their prefixes.
    """
    inside = [name for name in tensors if HEAD in prefix_of(name)]
    bare = {name.removeprefix(prefix_of(name)): name for name in tensors}
    if not inside and any(name.startswith(tuple(MLPS.values())) for name in bare):
        inside = list(tensors)
    if not inside:
        raise ValueError(
            f"tensors must hold '{HEAD}…', RoboVLMs' policy head, got "
            f"{abbreviate(sorted({_module(name) for name in tensors})) or 'none'}; convert a "
            "checkpoint that has one (a DiscreteDecoder has no tensors)."
        )
    head: dict[str, str] = {}
    for name in inside:
        short = name.removeprefix(prefix_of(name))
        if short in head:
            raise ValueError(
                f"'{head[short]}' and '{name}' name the same tensor; keep one of them."
            )
        head[short] = name
    return head


def _their_name(path: tuple[str, ...]) -> str:
    """Returns RoboVLMs' name, without prefix, of a leaf of our params."""
    top, *inner, leaf = path
    if top not in _NAMES or (top == "heads" and inner[0] not in MLPS):
        raise ValueError(f"RoboVLMs' heads have no {'.'.join(path)}; it cannot be converted.")
    return _NAMES[top](inner, leaf, "bias" if leaf.endswith("bias") else "weight")


def _recurrence_name(inner: list[str], leaf: str, kind: str) -> str:
    side = {"input": "ih", "recurrent": "hh"}[leaf.partition("_")[0]]
    return f"rnn.{kind}_{side}_l{_index(inner[0])}"


def _transformer_name(inner: list[str], leaf: str, kind: str) -> str:
    if leaf == "position_embedding":
        return "gpt.wpe.weight"
    if inner[0] == "output_norm":
        return f"gpt.ln_f.{kind}"
    return f"gpt.h.{_index(inner[0])}.{_BLOCK['.'.join(inner[1:])]}.{kind}"


# first key of a path -> (keys in between, last key, "weight" or "bias") -> RoboVLMs' name
_NAMES: dict[str, Callable[[list[str], str, str], str]] = {
    "recurrence": _recurrence_name,
    "transformer": _transformer_name,
    "projection": lambda inner, leaf, kind: f"fc.{kind}",
    "heads": lambda inner, leaf, kind: f"{MLPS[inner[0]]}.{2 * _index(inner[1])}.{kind}",
    "mlp": lambda inner, leaf, kind: f"mlp.{2 * _index(inner[0])}.{kind}",
}


def _index(layer: str) -> int:
    return int(layer.removeprefix("layers_"))


def _module(name: str) -> str:
    """Returns the module of a tensor's name, for error messages."""
    prefix = prefix_of(name)
    return prefix + name.removeprefix(prefix).partition(".")[0]
