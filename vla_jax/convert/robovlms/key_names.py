"""Names of RoboVLMs' policy heads and their places in our params.

PyTorch's `Linear` and `LSTM` hold kernels as `[out, in]`, ours are `[in, out]`; those of Hugging
Face's GPT-2 are `[in, out]` already.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

from vla_jax.convert.conversion_report import Shape, listed
from vla_jax.policies import decoders
from vla_jax.policies.decoders import DecoderConfig

HEAD = "act_head."
MLPS = {"arm": "actions.mlp", "gripper": "gripper.mlp"}  # ours -> RoboVLMs'
_PREFIX = re.compile(r"(?:(?:module|model|act_head)\.)*")  # as training wrappers put them before
_BLOCK = {  # parts of a GPT-2 block, ours -> Hugging Face's
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.layers_0": "mlp.c_fc",
    "mlp.layers_1": "mlp.c_proj",
}


class Place(NamedTuple):
    """Where a tensor of RoboVLMs' lies with us."""

    path: tuple[str, ...]  # in the params
    ours: Shape
    is_turned: bool  # whether theirs is the transpose

    @property
    def theirs(self) -> Shape:
        """Shape of RoboVLMs' tensor."""
        return self.ours[::-1] if self.is_turned else self.ours


def places_of(config: DecoderConfig) -> dict[str, Place]:
    """Returns where each tensor of RoboVLMs' head lies with us, by its name without prefix."""
    params = jax.eval_shape(partial(decoders.init, config=config), jax.random.key(0))
    ours: dict[tuple[str, ...], Any] = flatten_dict(params)
    return {
        _original(path): Place(path, leaf.shape, leaf.ndim == 2 and path[0] != "transformer")
        for path, leaf in ours.items()
    }


def prefix_of(name: str) -> str:
    """Returns what training wrappers put before a name, `act_head.` included."""
    found = _PREFIX.match(name)
    return found[0] if found else ""


def head_name(name: str) -> str:
    """Returns the name that `to_robovlms` gives a tensor, whatever prefixes it has in a file."""
    return HEAD + name.removeprefix(prefix_of(name))


def find_head(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Returns the head's tensors, name without prefixes to name in the file."""
    inside = [name for name in tensors if HEAD in prefix_of(name)]
    bare = {name.removeprefix(prefix_of(name)): name for name in tensors}
    if not inside and any(name.startswith(tuple(MLPS.values())) for name in bare):
        inside = list(tensors)
    if not inside:
        raise ValueError(
            f"tensors must hold '{HEAD}…', RoboVLMs' policy head, got "
            f"{listed(sorted({_top(name) for name in tensors})) or 'none'}; convert a checkpoint "
            "that was trained with one (a DiscreteDecoder has no tensors of its own)."
        )
    head: dict[str, str] = {}
    for name in inside:
        short = name.removeprefix(prefix_of(name))
        if short in head:
            raise ValueError(f"'{head[short]}' and '{name}' are the same tensor; keep one of them.")
        head[short] = name
    return head


def _original(path: tuple[str, ...]) -> str:
    """Returns RoboVLMs' name, without prefix, of a tensor of ours."""
    top, *inner, leaf = path
    kind = "bias" if leaf.endswith("bias") else "weight"
    if top == "recurrence":
        side = {"input": "ih", "recurrent": "hh"}[leaf.partition("_")[0]]
        return f"rnn.{kind}_{side}_l{_index(inner[0])}"
    if top == "transformer":
        return f"gpt.{_original_gpt(inner, leaf)}"
    if top == "projection":
        return f"fc.{kind}"
    if top == "heads" and inner[0] in MLPS:
        return f"{MLPS[inner[0]]}.{2 * _index(inner[1])}.{kind}"
    if top == "mlp":
        return f"mlp.{2 * _index(inner[0])}.{kind}"
    raise ValueError(f"RoboVLMs' heads have no {'.'.join(path)}; it cannot be converted.")


def _original_gpt(inner: list[str], leaf: str) -> str:
    if leaf == "position_embedding":
        return "wpe.weight"
    kind = "bias" if leaf == "bias" else "weight"
    if inner[0] == "output_norm":
        return f"ln_f.{kind}"
    return f"h.{_index(inner[0])}.{_BLOCK['.'.join(inner[1:])]}.{kind}"


def _index(layer: str) -> int:
    return int(layer.removeprefix("layers_"))


def _top(name: str) -> str:
    """The part of a model that a tensor belongs to, for people."""
    prefix = prefix_of(name)
    return prefix + name.removeprefix(prefix).partition(".")[0]
