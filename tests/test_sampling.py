"""Sampled tests: which of their cases run in which command."""

import collections

import pytest

from tests.sampling import tiers

each_size = pytest.mark.parametrize("num_cases", [1, 2, 3, 4, 11, 40])


@each_size
def test_without_a_sample_all_cases_are_fast_or_slow(num_cases):
    found = collections.Counter(tiers("a_law", num_cases, ""))
    assert set(found) <= {"fast", "slow"}
    assert found["fast"] == pytest.approx(num_cases / min(4, num_cases), abs=1)


@each_size
def test_a_sample_leaves_one_further_part_slow(num_cases):
    size = min(4, num_cases)
    found = tiers("a_law", num_cases, "5206b9b")
    whole = tiers("a_law", num_cases, "")
    assert [tier == "fast" for tier in found] == [tier == "fast" for tier in whole]
    places = {index % size for index, tier in enumerate(found) if tier == "slow"}
    assert len(places) == min(1, size - 1)
    assert len(found) == num_cases


def test_many_samples_reach_every_case_and_the_same_one_chooses_the_same():
    reached = set()
    for sample in map(str, range(50)):
        found = tiers("a_law", 11, sample)
        assert found == tiers("a_law", 11, sample)
        reached |= {index for index, tier in enumerate(found) if tier != "exhaustive"}
    assert reached == set(range(11))
