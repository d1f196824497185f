"""Minimal gated recurrent unit (minGRU): linear in its carry, without a recurrent product."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.cells.contract import Cell, combine_linear, init_uniform, zeros
from vla_jax.nn.cells.time_constants import spread_biases
from vla_jax.types import Array, Key, Params


class MinGRUCarry(NamedTuple):
    """Carry of a minGRU."""

    hidden: Array  # [..., H] float32, also the output


def init(key: Key, input_size: int, hidden_size: int) -> Params:
    """Returns `{"input_kernel" [D, 2·H], "input_bias" [2·H]}` from U(−1/√H, 1/√H).

    Args:
      key: consumed.
      input_size: D.
      hidden_size: H.
    """
    params = init_uniform(key, input_size, hidden_size, num_gates=2)
    return {name: params[name] for name in ("input_kernel", "input_bias")}


def coefficients(extra_params: Params, projected: Array) -> tuple[jax.Array, jax.Array]:
    """Returns a and b of hₜ = aₜ hₜ₋₁ + bₜ, each `[..., H]`; the gates do not depend on the carry.

        z = σ(pₜ)       n = pₜ
        hₜ = (1 − z) hₜ₋₁ + z n

    Args:
      extra_params: empty.
      projected: p `[..., 2·H]`, in the order z, n.

    Source: Feng et al. 2024, "Were RNNs All We Needed?" (arXiv:2410.01201), section 3.1, the form
    without logarithms, in which n has no activation.
    """
    del extra_params
    update, candidate = jnp.split(projected, 2, axis=-1)
    z = jax.nn.sigmoid(update)
    return 1.0 - z, z * candidate


MIN_GRU = Cell(
    num_gates=2,
    init=init,
    zero_carry=partial(zeros, carry_type=MinGRUCarry),
    combine=partial(combine_linear, coefficients=coefficients),
    sums_gates=True,
    coefficients=coefficients,
    # update gate, which admits the input
    spread=partial(spread_biases, num_gates=2, gates=((0, -1),)),
)
