"""Action bins compared with `np.digitize` on float64 edges, as in OpenVLA and RoboVLMs."""

from functools import partial

import jax
import numpy as np
import pytest

from vla_jax.actions import bins

RANGES = [(-1.0, 1.0), (-0.65, 0.65), (0.0, 3.0)]
each_range = pytest.mark.parametrize(("low", "high"), RANGES)
each_size = pytest.mark.parametrize("num_bins", [3, 16, 256])


def edges(num_bins, low, high):
    return np.linspace(low, high, num_bins)


def edge_cases(num_bins, low, high):
    """Every edge and its float32 neighbours, numbers between edges and numbers out of range."""
    bin_edges = edges(num_bins, low, high).astype(np.float32)
    neighbours = [np.nextafter(bin_edges, np.float32(end)) for end in (-np.inf, np.inf)]
    between = np.random.default_rng(0).uniform(1.5 * low - 1, 1.5 * high, 500).astype(np.float32)
    numbers = np.concatenate([bin_edges, *neighbours, between])
    return np.where(np.abs(numbers) < np.finfo(np.float32).tiny, 0, numbers)  # as XLA does


@each_range
@each_size
def test_a_bin_is_numpys_digitize_minus_one_for_every_float32(num_bins, low, high):
    action = edge_cases(num_bins, low, high)
    clipped = np.clip(action.astype(np.float64), low, high)
    expected = np.digitize(clipped, edges(num_bins, low, high)) - 1
    indices = bins.encode(action, num_bins, low, high)
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(indices, expected)
    assert {0, num_bins - 1} <= set(np.asarray(indices).tolist())


@each_range
@each_size
def test_a_decoded_number_is_off_by_half_a_bin_at_most(num_bins, low, high):
    action = np.clip(edge_cases(num_bins, low, high), low, high).astype(np.float32)
    indices = bins.encode(action, num_bins, low, high)
    decoded = bins.decode(indices, num_bins, low, high)
    half = (high - low) / (num_bins - 1) / 2
    assert np.abs(decoded - action).max() <= half + 1e-6
    assert np.abs(decoded - action).max() > 0.9 * half


@each_range
@each_size
def test_a_bin_decodes_to_its_centre_and_the_last_one_to_that_of_its_neighbour(num_bins, low, high):
    indices = np.arange(num_bins)
    bin_edges = edges(num_bins, low, high)
    decoded = bins.decode(indices, num_bins, low, high)
    np.testing.assert_allclose(
        decoded[:-1], (bin_edges[:-1] + bin_edges[1:]) / 2, rtol=2e-7, atol=1e-7
    )
    assert decoded[-1] == decoded[-2]
    indices_again = bins.encode(decoded, num_bins, low, high)
    np.testing.assert_array_equal(indices_again, np.minimum(indices, num_bins - 2))


def test_indices_out_of_range_decode_as_the_nearest_bin():
    decoded = bins.decode(np.array([-7, 400]))
    np.testing.assert_array_equal(decoded, bins.decode(np.array([0, 255])))


def test_token_ids_equal_those_of_openvla_and_robovlms():
    """OpenVLA's 32,000 tokens: the open gripper is 31744, the closed one 31999."""
    indices = bins.encode(np.array([1.0, -1.0, 0.0], np.float32))
    openvla = bins.to_token_ids(indices, 32000, offset=0)
    np.testing.assert_array_equal(openvla, [31744, 31999, 31872])
    robovlms = bins.to_token_ids(indices, 32000, num_special=3)
    np.testing.assert_array_equal(robovlms, [31731, 31986, 31859])


@pytest.mark.parametrize(("num_special", "offset"), [(0, 0), (0, 10), (5, 10)])
def test_token_ids_convert_back_to_bins(num_special, offset):
    options = {"vocab_size": 1000, "num_special": num_special, "offset": offset}
    indices = np.arange(256)
    token_ids = bins.to_token_ids(indices, **options)
    assert len(set(token_ids.tolist())) == 256
    assert token_ids.max() == 999 - num_special - offset
    np.testing.assert_array_equal(bins.from_token_ids(token_ids, **options), indices)


def test_jit_does_not_change_results():
    action = edge_cases(16, -1, 1)
    encode, decode = (partial(function, num_bins=16) for function in (bins.encode, bins.decode))
    indices = encode(action)
    np.testing.assert_array_equal(jax.jit(encode)(action), indices)
    # JAX 0.10.0 rounds the quotient in another way.
    np.testing.assert_allclose(jax.jit(decode)(indices), decode(indices), rtol=1e-6)


@pytest.mark.parametrize("function", [bins.encode, bins.decode])
def test_too_few_bins_are_refused(function):
    with pytest.raises(ValueError, match=r"num_bins must be at least 3 .* got 2"):
        function(np.zeros(3, np.int32), 2)
