"""Real-gated linear recurrent unit (RG-LRU): linear in its carry, with a learned decay per unit."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.cells.contract import Cell, combine_linear, init_uniform, zeros
from vla_jax.nn.cells.time_constants import draw_log_odds
from vla_jax.types import Array, Key, Params

SHARPNESS = 8.0  # c in a = σ(Λ)^(c r)
SLOWEST, FASTEST = 0.999, 0.9  # range of σ(Λ)^c at the start
MAX_SLOPE = 1000.0  # bound of the derivative of the square root


class RGLRUCarry(NamedTuple):
    """Carry of an RG-LRU."""

    hidden: Array  # [..., H] float32, also the output


def init(key: Key, input_size: int, hidden_size: int) -> Params:
    """Returns kernel and bias from U(−1/√H, 1/√H), and Λ with σ(Λ)^c uniform in [0.9, 0.999].

    Args:
      key: consumed.
      input_size: D.
      hidden_size: H.

    Returns:
      `{"input_kernel" [D, 3·H], "input_bias" [3·H], "decay_logit" [H]}`.
    """
    product_key, decay_key = jax.random.split(key)
    params = init_uniform(product_key, input_size, hidden_size, num_gates=3)
    kept = jax.random.uniform(decay_key, (hidden_size,), minval=FASTEST, maxval=SLOWEST)
    return {
        "input_kernel": params["input_kernel"],
        "input_bias": params["input_bias"],
        "decay_logit": _logit_of(jnp.log(kept) / SHARPNESS),
    }


def coefficients(extra_params: Params, projected: Array) -> tuple[jax.Array, jax.Array]:
    """Returns a and b of hₜ = aₜ hₜ₋₁ + bₜ, each `[..., H]`; the gates do not depend on the carry.

        r, i = σ(pₜ)       u = pₜ
        aₜ = σ(Λ)^(8 r)
        hₜ = aₜ hₜ₋₁ + √(1 − aₜ²) (i u)

    u is the linear layer in front of the unit in Griffin's recurrent block. Here the gates r and i
    see the input of that layer instead of its output, and there is no convolution between the
    two. Griffin's gates, linear functions of u, are the special case of such kernels.

    Args:
      extra_params: Λ `decay_logit` `[H]`.
      projected: p `[..., 3·H]`, in the order r, i, u.

    Source: De et al. 2024, "Griffin" (arXiv:2402.19427), section 2.4, without the exception of
    google-deepmind/recurrentgemma, which does not scale the first input of a sequence.
    """
    r, i, u = jnp.split(projected, 3, axis=-1)
    rate = SHARPNESS * jax.nn.softplus(-extra_params["decay_logit"])  # −8 log σ(Λ)
    log_decay = -jax.nn.sigmoid(r) * jnp.broadcast_to(rate, r.shape)
    scale = _bounded_sqrt(-jnp.expm1(2.0 * log_decay))  # 1 − a² without cancellation
    return jnp.exp(log_decay), scale * jax.nn.sigmoid(i) * u


def spread(key: Key, params: Params, span: int) -> Params:
    """Returns params with Λ such that an open-by-half gate r keeps for 2 to `span` steps.

    Args:
      key: consumed.
      params: from `init`.
      span: steps, above 2.
    """
    log_odds = draw_log_odds(key, params["decay_logit"].shape[0], span)
    log_decay = jax.nn.log_sigmoid(log_odds) / (0.5 * SHARPNESS)  # log σ(Λ), since r = 1/2
    size = log_odds.shape[0]
    bias = params["input_bias"].at[:size].set(0.0)
    return {**params, "input_bias": bias, "decay_logit": _logit_of(log_decay)}


def _logit_of(log_probability: jax.Array) -> jax.Array:
    """Returns the logit x with log σ(x) equal to the argument, below 0."""
    return log_probability - jnp.log(-jnp.expm1(log_probability))


@jax.custom_jvp
def _bounded_sqrt(x: jax.Array) -> jax.Array:
    """Returns √x with a derivative of at most `MAX_SLOPE`: that of √ is infinite at 0.

    A gate r that underflows gives a = 1, and the gradient would be 0 · ∞.

    Source: google-deepmind/recurrentgemma, `sqrt_bound_derivative`.
    """
    return jnp.sqrt(x)


@_bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    root = _bounded_sqrt(x)  # itself, for second derivatives
    return root, tangent / (2.0 * jnp.maximum(root, 0.5 / MAX_SLOPE))


RG_LRU = Cell(
    num_gates=3,
    init=init,
    zero_carry=partial(zeros, carry_type=RGLRUCarry),
    combine=partial(combine_linear, coefficients=coefficients),
    sums_gates=True,
    coefficients=coefficients,
    spread=spread,
)
