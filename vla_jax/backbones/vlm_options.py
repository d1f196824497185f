"""Use of a vision-language model by a policy: cameras, prompt, readout, precision."""

from dataclasses import dataclass
from typing import Literal, get_args

from vla_jax.backbones.blocks import Remat
from vla_jax.config import checked, did_you_mean
from vla_jax.nn.lora import LoraConfig

Readout = Literal["action_token", "image", "image_mean", "text", "last", "all"]
History = Literal["step", "window"]
Layout = Literal["native", "robovlms", "robovlms_padded"]


@dataclass(frozen=True)
@checked(num_action_tokens=(0, 2**16), max_text_tokens=(0, 2**16))
class VLMOptions:
    """Use of a vision-language model by a policy."""

    # cameras in the order in which the model sees their images; fields of an observation
    cameras: tuple[str, ...] = ("image_primary", "image_wrist")
    # hidden states that become the tokens of a step: "action_token" = of learned tokens after the
    # prompt, "image" = of all image positions, "image_mean" = their mean per camera, "text" = of
    # the text, "last" = of the last position, "all" = of all positions
    readout: Readout = "action_token"
    num_action_tokens: int = 1  # learned tokens after the prompt; readout "action_token" only
    max_text_tokens: int = 48  # tokens of the prompt, without images and learned tokens
    # order of the sequence and position of the learned token: "native" = as in the model's
    # pre-training, token last; "robovlms" = as RoboVLMs does for one sample; "robovlms_padded" =
    # as RoboVLMs trains, where the token's position depends on the padding
    layout: Layout = "native"
    # steps of a window that the model sees: "step" = one, "window" = all up to the present one, in
    # one causal sequence, as RoboVLMs' history "pre"; needs a decoder without memory
    history: History = "step"
    # where images of another size are resized: "host" = with Pillow when data are read, to the bits
    # of the original; "device" = by the policy with JAX, where 2 of 255 is the largest difference
    resize: Literal["host", "device"] = "host"
    prompt: str = "{instruction}"  # text of a step; {instruction} is replaced
    tokenizer: str = ""  # path of tokenizer.json; empty = hashed words, for random weights only
    proprio_dim: int = 0  # P; above 0, one more token that is linear in the proprioception
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of activations and matrix products
    # dtype in which the weights are stored; "bfloat16" halves their memory and needs frozen weights
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # activations kept for the backward pass: "none" = all, "layers" = inputs of the layers only,
    # "products" = those and the outputs of matrix products
    remat: Remat = "products"
    # images that the vision tower encodes at once, over all devices together; fewer save memory
    # and are recomputed in the backward pass; 0 = all of a batch
    images_per_pass: int = 0
    lora: LoraConfig = LoraConfig()  # low-rank adaptation of the weights

    def __post_init__(self):
        for name, choices in (
            ("readout", get_args(Readout)),
            ("layout", get_args(Layout)),
            ("history", get_args(History)),
            ("resize", ("host", "device")),
            ("dtype", ("float32", "bfloat16")),
            ("param_dtype", ("float32", "bfloat16")),
            ("remat", get_args(Remat)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"unknown {name} '{value}'; {did_you_mean(value, choices)}")
        if not self.cameras or len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"cameras must be one or more different names, got {self.cameras}.")
        if "{instruction}" not in self.prompt:
            raise ValueError(f"prompt must contain {{instruction}}, got {self.prompt!r}.")
        if self.num_action_tokens < 1:
            raise ValueError(f"num_action_tokens must be at least 1, got {self.num_action_tokens}.")
        if self.images_per_pass < 0:
            raise ValueError(f"images_per_pass must be 0 or more, got {self.images_per_pass}.")
        if self.proprio_dim < 0:
            raise ValueError(f"proprio_dim must be 0 or more, got {self.proprio_dim}.")
        if self.max_text_tokens < 1:
            raise ValueError(f"max_text_tokens must be at least 1, got {self.max_text_tokens}.")

    @property
    def num_learned(self) -> int:
        """Learned tokens in the sequence: `num_action_tokens`, or 0 with another readout."""
        return self.num_action_tokens if self.readout == "action_token" else 0
