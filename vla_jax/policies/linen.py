"""Flax Linen modules of the cells, the recurrence and the decoder.

Use them to add parts of this library to a Flax model; otherwise use the pure functions that they
wrap. The params of a module are the same tree as those of the functions: the functions
(`decoders.init_stream`, `checkpoint`, `convert`) take `module.init(...)["params"]`, and
`module.apply` takes the functions' params.

    linen.Decoder(config)(tokens)                        in your own module, after an encoder
    nn.RNN(linen.RecurrentCell("gru", 512))(inputs)      a cell in Flax's time loop

From NNX, through Flax's bridge, initialised with a batch of inputs:

    decoder = nnx.bridge.ToNNX(linen.Decoder(config), rngs=nnx.Rngs(0)).lazy_init(tokens)
    params = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    nnx.update(decoder, params)
"""

from collections.abc import Callable
from math import prod
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vla_jax.nn import cells, recurrence
from vla_jax.nn.cells import CELLS, CellName
from vla_jax.nn.recurrence import Carry, RecurrenceConfig
from vla_jax.policies import decoders
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.decoders import StreamState
from vla_jax.policies.head import TeacherForcing
from vla_jax.types import ActionChunk, Array, Key, Params, Prediction


class RecurrentCell(nn.RNNCellBase):
    """A cell of `cells.CELLS`; its carry is that of the cell, such as `LSTMCarry`."""

    cell: CellName  # key of `cells.CELLS`
    hidden_size: int  # H
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the factors of matrix products

    def __post_init__(self):
        RecurrenceConfig(
            self.cell, hidden_size=self.hidden_size, dtype=self.dtype
        )  # checks the fields
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: Any, inputs: Array) -> tuple[Any, jax.Array]:
        """Returns the next carry and the output of one step.

        Args:
          carry: leaves `[..., H]`, or those of the cell's carry.
          inputs: `[..., D]`.

        Returns:
          The carry, and the output `[..., H]`, float32.
        """
        cell, input_size = CELLS[self.cell], inputs.shape[-1]
        params = _declare(self, lambda key: cell.init(key, input_size, self.hidden_size))
        return cells.step(cell, params, carry, inputs, dtype=self.dtype)

    @nn.nowrap
    def initialize_carry(self, rng: Key, input_shape: tuple[int, ...]) -> Any:
        """Returns the carry before the first step, zeros.

        Args:
          rng: not used; required by Flax's interface.
          input_shape: of the inputs of one step, `[..., D]`.
        """
        del rng
        lead = input_shape[:-1]
        carry = CELLS[self.cell].zero_carry(jnp.zeros((prod(lead), 1)), self.hidden_size)
        return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), carry)

    @property
    def num_feature_axes(self) -> int:
        """Number of non-batch axes of an input, required by `nn.RNN`."""
        return 1


class Recurrence(nn.Module):
    """A stack of recurrent layers: module of `recurrence.apply` and `recurrence.step`."""

    config: RecurrenceConfig

    def __call__(
        self,
        inputs: Array,
        *,
        mask: Array | None = None,
        reset: Array | None = None,
        carry: Carry | None = None,
        deterministic: bool = True,
    ) -> tuple[Carry, jax.Array]:
        """Returns the carry after the last step and the outputs of all steps.

        Args:
          inputs: `[B, T, D]`.
          mask: `[B, T]`, True where the step is real; None means everywhere.
          reset: `[B, T]`, True where a new episode starts; None means nowhere.
          carry: before the first step; None means zeros.
          deterministic: False applies dropout between layers, with an rng named "dropout".

        Returns:
          The carry, and outputs `[B, T, H]` (`[B, T, 2·H]` in both directions), float32.
        """
        return recurrence.apply(
            self._params(inputs.shape[-1]),
            self.config,
            inputs,
            mask=mask,
            reset=reset,
            carry=carry,
            key=_dropout_key(self, self.config.dropout, deterministic),
        )

    def step(
        self,
        carry: Carry,
        inputs: Array,
        *,
        reset: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Carry, jax.Array]:
        """Returns the next carry and the output of one step.

        Args:
          carry: from `recurrence.zero_carry` or the previous step.
          inputs: `[B, D]`.
          reset: `[B]`, True where a new episode starts; None means nowhere.
          deterministic: as for a sequence.

        Returns:
          The carry, and the output `[B, H]`, float32.
        """
        params = self._params(inputs.shape[-1])
        key = _dropout_key(self, self.config.dropout, deterministic)
        return recurrence.step(params, self.config, carry, inputs, reset=reset, key=key)

    @nn.compact
    def _params(self, input_size: int) -> Params:
        return _declare(self, lambda key: recurrence.init(key, self.config, input_size))


class Decoder(nn.Module):
    """Tokens to action chunks: module of `decoders.apply` and `decoders.step`."""

    config: DecoderConfig

    def __call__(
        self,
        tokens: Array,
        *,
        timestep_mask: Array | None = None,
        token_mask: Array | None = None,
        reset: Array | None = None,
        carry: Carry | None = None,
        targets: TeacherForcing | None = None,
        deterministic: bool = True,
    ) -> Prediction:
        """Returns the prediction at every position of a window: action chunks, or logits of bins.

        Args:
          tokens: `[B, W, N, D]`; W may be any number of steps, at most the config's for "gpt".
          timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
          token_mask: `[B, W, N]`, True where the token is real; None means everywhere.
          reset: `[B, W]`, True where a new episode starts; None means nowhere.
          carry: of the trunk before the first step; None means the start of an episode. Must be
            None for "gpt" and "rotary_gpt".
          targets: ground-truth actions for teacher forcing, without a rate (heads "autoregressive"
            and "flow"); None decodes from the model's own actions, or from noise.
          deterministic: False applies dropout, and adds noise to targets of head "flow", with an
            rng named "dropout".

        Returns:
          Arm `[B, W, K, A-1]` in (-1, 1), gripper logit `[B, W, K]`; of head "discrete" logits
          `[B, W, K, A, V]`; float32.

        Raises:
          ValueError: `tokens` are not `[B, W, N, D]` with the config's N and D, for "gpt" or
            "rotary_gpt" there is a carry, or for "gpt" a longer window.
        """
        return decoders.apply(
            self._params(),
            self.config,
            tokens,
            timestep_mask=timestep_mask,
            token_mask=token_mask,
            reset=reset,
            carry=carry,
            targets=targets,
            key=self._key(targets, deterministic),
        )

    def step(
        self,
        state: StreamState,
        tokens: Array,
        *,
        token_mask: Array | None = None,
        reset: Array | None = None,
    ) -> tuple[StreamState, ActionChunk]:
        """Returns the next state, and the chunk predicted at one time step.

        Args:
          state: from `decoders.init_stream` or the previous step.
          tokens: of one step, `[B, N, D]`.
          token_mask: `[B, N]`, True where the token is real; None means everywhere.
          reset: `[B]`, True where this step is the first of an episode; None means nowhere.

        Returns:
          The state, and arm `[B, K, A-1]`, gripper logit `[B, K]`.
        """
        return decoders.step(
            self._params(), self.config, state, tokens, token_mask=token_mask, reset=reset
        )

    @nn.nowrap
    def _key(self, targets: TeacherForcing | None, deterministic: bool) -> Key | None:
        if targets is not None and not deterministic and self.has_rng("dropout"):
            return self.make_rng("dropout")  # also for the noise of head "flow"
        return _dropout_key(self, self.config.dropout, deterministic)

    @nn.compact
    def _params(self) -> Params:
        return _declare(self, lambda key: decoders.init(key, self.config))


def _declare(module: nn.Module, init: Callable[[Key], Params]) -> Params:
    """Declares and returns the module's params, with the tree of `init`."""
    # One param per top-level subtree, since a Linen param needs a name.
    return {
        name: module.param(name, lambda key, name=name: init(key)[name])
        for name in jax.eval_shape(init, jax.random.key(0))
    }


def _dropout_key(module: nn.Module, rate: float, deterministic: bool) -> Key | None:
    return None if deterministic or rate == 0.0 else module.make_rng("dropout")
