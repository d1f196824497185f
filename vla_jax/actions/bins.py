"""Actions as bins, and bins as the last tokens of a language model's vocabulary.

`num_bins` edges, evenly spaced from `low` to `high`, leave `num_bins - 1` intervals. Bin b is the
b-th interval; the last bin, `num_bins - 1`, holds what is exactly `high`, and is decoded like the
interval below it. These are the digits of OpenVLA and RoboVLMs, less one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.types import Array


def check_num_bins(num_bins: int) -> None:
    """Raises a ValueError unless there are bins above the middle and below it."""
    if num_bins < 3:
        raise ValueError(
            f"num_bins must be at least 3 (below the middle, above it, the upper end), "
            f"got {num_bins}."
        )


def encode(action: Array, num_bins: int = 256, low: float = -1.0, high: float = 1.0) -> jax.Array:
    """Returns the bin of every number.

        edge_i = low + i · (high − low) / (num_bins − 1)
        b = max {i : edge_i ≤ clip(x, low, high)}

    Args:
      action: `[...]` float32; what lies outside of [low, high] counts as the nearer end.
      num_bins: V.
      low: lower end of the first bin.
      high: upper end; a number of this size, and no other, has the last bin.

    Returns:
      `[...]` int32 in [0, V - 1].

    Raises:
      ValueError: fewer than 3 bins.

    Source: Kim et al. 2024, OpenVLA (arXiv:2406.09246), and RoboVLMs' `ActionTokenizer`.
    """
    check_num_bins(num_bins)
    edges = np.linspace(low, high, num_bins)
    # Rounded up: a float32 is then as many edges past as with NumPy's edges in float64.
    rounded = edges.astype(np.float32)
    rounded = np.where(rounded < edges, np.nextafter(rounded, np.float32(np.inf)), rounded)
    clipped = jnp.clip(jnp.asarray(action, jnp.float32), rounded[0], rounded[-1])
    # "compare_all", as the other methods refuse numbers whose sharding is explicit.
    past = jnp.searchsorted(rounded, clipped, side="right", method="compare_all")
    return past.astype(jnp.int32) - 1


def decode(bins: Array, num_bins: int = 256, low: float = -1.0, high: float = 1.0) -> jax.Array:
    """Returns the centres of bins, at most half a bin from what was encoded.

        x = (edge_b + edge_{b+1}) / 2 = ((m − s) · low + s · high) / m,
        s = b + ½, m = num_bins − 1, b clipped to [0, m − 1]

    Args:
      bins: `[...]` integers, from `encode`; others count as the nearest one.
      num_bins: V, as `encode` was given it.
      low: as `encode` was given it.
      high: as `encode` was given it.

    Returns:
      `[...]` float32.

    Raises:
      ValueError: fewer than 3 bins.

    Source: OpenVLA and RoboVLMs, as for `encode`.
    """
    check_num_bins(num_bins)
    last = num_bins - 1
    share = jnp.clip(bins, 0, last - 1).astype(jnp.float32) + 0.5
    return ((last - share) * low + share * high) / last


def to_token_ids(bins: Array, vocab_size: int, *, num_special: int = 0, offset: int = 10) -> Array:
    """Returns the token of each bin; the words at a vocabulary's end are the rarest.

        id = vocab_size − num_special − offset − (b + 1)

    Args:
      bins: `[...]` integers, from `encode`.
      vocab_size: tokens of the vocabulary.
      num_special: of them, special tokens at its end.
      offset: further tokens at its end that are left alone; RoboVLMs' 10, OpenVLA's 0.

    Source: RoboVLMs' `ActionTokenizer`.
    """
    return vocab_size - num_special - offset - (bins + 1)


def from_token_ids(
    token_ids: Array, vocab_size: int, *, num_special: int = 0, offset: int = 10
) -> Array:
    """Returns the bin of each token; that of a token for no action lies outside [0, num_bins).

    Args:
      token_ids: `[...]` integers.
      vocab_size: as `to_token_ids` was given it.
      num_special: as `to_token_ids` was given it.
      offset: as `to_token_ids` was given it.
    """
    return vocab_size - num_special - offset - token_ids - 1
