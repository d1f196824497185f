"""Discretisation of actions into bins, and bins as the last tokens of a vocabulary.

`num_bins` edges, evenly spaced from `low` to `high`, bound `num_bins - 1` intervals. Bin b is the
b-th interval; the last bin, `num_bins - 1`, contains only `high` itself and is decoded like the
interval below it. Bin indices are those of OpenVLA and RoboVLMs minus one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.types import Array


def check_num_bins(num_bins: int) -> None:
    """Raises a ValueError unless there are at least 3 bins."""
    if num_bins < 3:
        raise ValueError(
            f"num_bins must be at least 3 (below the middle, above it, the upper end), "
            f"got {num_bins}."
        )


def encode(action: Array, num_bins: int = 256, low: float = -1.0, high: float = 1.0) -> jax.Array:
    """Returns the bin of every action value.

        edge_i = low + i · (high − low) / (num_bins − 1)
        b = max {i : edge_i ≤ clip(x, low, high)}

    Args:
      action: `[...]` float32; values are clipped to [low, high].
      num_bins: V.
      low: lower end of the first bin.
      high: upper end; only this value is in the last bin.

    Returns:
      `[...]` int32 in [0, V - 1].

    Raises:
      ValueError: fewer than 3 bins.

    Source: Kim et al. 2024, OpenVLA (arXiv:2406.09246), and RoboVLMs' `ActionTokenizer`.
    """
    check_num_bins(num_bins)
    edges = np.linspace(low, high, num_bins)
    # Rounded up, so that float32 comparisons give the same bins as NumPy's float64 edges.
    rounded = edges.astype(np.float32)
    rounded = np.where(rounded < edges, np.nextafter(rounded, np.float32(np.inf)), rounded)
    clipped = jnp.clip(jnp.asarray(action, jnp.float32), rounded[0], rounded[-1])
    # "compare_all": the other methods do not support arrays with explicit sharding.
    num_edges = jnp.searchsorted(rounded, clipped, side="right", method="compare_all")
    return num_edges.astype(jnp.int32) - 1


def decode(bins: Array, num_bins: int = 256, low: float = -1.0, high: float = 1.0) -> jax.Array:
    """Returns the centres of bins, at most half a bin from the encoded value.

        x = (edge_b + edge_{b+1}) / 2 = ((m − s) · low + s · high) / m,
        s = b + ½, m = num_bins − 1, b clipped to [0, m − 1]

    Args:
      bins: `[...]` integers, from `encode`; others are clipped.
      num_bins: V, as for `encode`.
      low: as for `encode`.
      high: as for `encode`.

    Returns:
      `[...]` float32.

    Raises:
      ValueError: fewer than 3 bins.

    Source: OpenVLA and RoboVLMs, as for `encode`.
    """
    check_num_bins(num_bins)
    last = num_bins - 1
    position = jnp.clip(bins, 0, last - 1).astype(jnp.float32) + 0.5
    return ((last - position) * low + position * high) / last


def to_token_ids(bins: Array, vocab_size: int, *, num_special: int = 0, offset: int = 10) -> Array:
    """Returns the token id of each bin, at the end of the vocabulary, where tokens are rarest.

        id = vocab_size − num_special − offset − (b + 1)

    Args:
      bins: `[...]` integers, from `encode`.
      vocab_size: number of tokens in the vocabulary.
      num_special: number of special tokens at its end.
      offset: further tokens at its end that are not used: 10 in RoboVLMs, 0 in OpenVLA.

    Source: RoboVLMs' `ActionTokenizer`.
    """
    return vocab_size - num_special - offset - (bins + 1)


def from_token_ids(
    token_ids: Array, vocab_size: int, *, num_special: int = 0, offset: int = 10
) -> Array:
    """Returns the bin of each token; outside [0, num_bins) for tokens that are not actions.

    Args:
      token_ids: `[...]` integers.
      vocab_size: as for `to_token_ids`.
      num_special: as for `to_token_ids`.
      offset: as for `to_token_ids`.
    """
    return vocab_size - num_special - offset - token_ids - 1
