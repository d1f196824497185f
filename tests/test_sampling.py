"""Sampled tests: which of their cases run in which command."""

import collections
import math

import pytest

from tests.sampling import tiers

each_size = pytest.mark.parametrize("num_cases", [1, 2, 3, 4, 11, 40])


@each_size
def test_without_a_sample_all_cases_are_fast_or_slow(num_cases):
    found = collections.Counter(tiers("a_law", num_cases, ""))
    assert set(found) <= {"fast", "slow"}
    assert found["fast"] == math.ceil(num_cases / 12)
    assert tiers("a_law", num_cases, "", is_long=True) == ["slow"] * num_cases


@each_size
def test_a_sample_leaves_a_further_part_slow(num_cases):
    found = tiers("a_law", num_cases, "5206b9b")
    whole = tiers("a_law", num_cases, "")
    assert [tier == "fast" for tier in found] == [tier == "fast" for tier in whole]
    rest = num_cases - found.count("fast")
    assert found.count("slow") == math.ceil(rest / 12)
    assert len(found) == num_cases


def test_a_long_test_of_one_case_is_slow_for_every_third_sample():
    found = [tiers("a_law", 1, str(sample), is_long=True) for sample in range(100)]
    assert 20 < found.count(["slow"]) < 47
    assert found.count(["slow"]) + found.count(["exhaustive"]) == 100


@pytest.mark.parametrize("num_cases", [2, 3, 6, 11, 40])
def test_one_in_six_cases_of_a_long_test_is_slow(num_cases):
    found = collections.Counter(tiers("a_law", num_cases, "5206b9b", is_long=True))
    assert set(found) <= {"slow", "exhaustive"}
    assert found["slow"] == math.ceil(num_cases / 6)


@pytest.mark.parametrize("is_long", [False, True])
def test_many_samples_reach_every_case_and_the_same_one_chooses_the_same(is_long):
    reached = set()
    for sample in map(str, range(100)):
        found = tiers("a_law", 11, sample, is_long=is_long)
        assert found == tiers("a_law", 11, sample, is_long=is_long)
        reached |= {index for index, tier in enumerate(found) if tier != "exhaustive"}
    assert reached == set(range(11))


def test_the_chosen_cases_have_all_values_of_a_parameter():
    """Of 8 × 12 cases in the order of `parametrize`: both parameters vary."""
    chosen = [case for case, tier in enumerate(tiers("a_law", 96, "")) if tier == "fast"]
    assert len({case % 12 for case in chosen}) > 3
    assert len({case // 12 for case in chosen}) > 3
