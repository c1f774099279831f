"""Tests of significance against scipy's own and against numbers made by hand."""

from math import inf, isnan, nan

import numpy as np
import pytest
from scipy import stats

from fedforward.analysis.significance import (
    PAIRED,
    WELCH,
    compare_all,
    holm,
    mean_and_deviation,
    paired,
    welch,
)


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_both_tests_are_scipys(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(20):
        one = rng.normal(size=count)
        other = one + rng.normal(0.3, 0.5, size=count)
        wide = rng.normal(0.5, 3.0, size=count + 3)
        found = stats.ttest_rel(other, one)
        p, half = paired((other - one).tolist())
        assert p == pytest.approx(found.pvalue, rel=1e-9)
        interval = found.confidence_interval(0.95)
        assert half == pytest.approx((interval.high - interval.low) / 2, rel=1e-9)
        found = stats.ttest_ind(wide, one, equal_var=False)
        p, half = welch(one.tolist(), wide.tolist())
        assert p == pytest.approx(found.pvalue, rel=1e-9)
        interval = found.confidence_interval(0.95)
        assert half == pytest.approx((interval.high - interval.low) / 2, rel=1e-9)


def test_a_paired_test_by_hand() -> None:
    # Mean 2, deviation 1, error 1/sqrt(3): t = 3.4641 with two degrees of freedom, whose p is
    # 1 - t / sqrt(2 + t²) = 0.0742.
    p, half = paired([1.0, 2.0, 3.0])
    t = 2 * 3**0.5
    assert p == pytest.approx(1 - t / (2 + t * t) ** 0.5, rel=1e-12)
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_differences_without_spread() -> None:
    assert paired([0.0, 0.0, 0.0]) == (1.0, 0.0)
    assert paired([0.5, 0.5]) == (0.0, 0.0)
    assert welch([1.0, 1.0], [1.0, 1.0]) == (1.0, 0.0)
    assert welch([1.0, 1.0], [2.0, 2.0]) == (0.0, 0.0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    # 4 * 0.005, 3 * 0.011, 2 * 0.02, and the last may not be below those before it.
    assert holm([0.04, 0.005, 0.02, 0.011]) == pytest.approx([0.04, 0.02, 0.04, 0.033])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_pairs_are_tested_as_their_seeds_allow() -> None:
    groups = {
        "a": {0: 1.0, 1: 1.1, 2: 1.2},
        "b": {0: 2.0, 1: 2.1, 2: 2.21},
        "c": {0: 1.0, 1: 1.3},
        "d": {7: 1.0},
        "e": {},
        "f": {0: nan, 1: 1.0, 2: 1.0},
    }
    found = {(each.first, each.second): each for each in compare_all(groups)}
    assert len(found) == 15
    assert found["a", "b"].test == PAIRED and found["a", "b"].told_apart
    assert found["a", "b"].difference == pytest.approx(1.00333333)
    assert found["a", "b"].low < 1.0033 < found["a", "b"].high
    assert found["a", "c"].test == WELCH and not found["a", "c"].told_apart
    assert found["a", "d"].why_not == "one seed cannot tell" and isnan(found["a", "d"].adjusted)
    assert found["d", "e"].why_not == "no run of e has a figure"
    assert found["a", "f"].why_not == "a figure is not finite"
    tested = [each for each in found.values() if not each.why_not]
    assert len(tested) == 3
    assert [each.adjusted for each in tested] == holm([each.p for each in tested])
    assert not found["a", "d"].told_apart


def test_a_group_that_is_not_to_be_tested() -> None:
    groups = {"a": {0: 1.0, 1: 1.1}, "b": {0: 2.0, 1: 2.1}, "c": {0: 3.0, 1: 3.2}}
    one, two, three = compare_all(groups, {"b": "1 of 3 runs of b diverged"})
    assert one.why_not == three.why_not == "1 of 3 runs of b diverged"
    assert two.adjusted == two.p


def test_mean_and_deviation() -> None:
    assert mean_and_deviation([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_deviation([4.0])[0] == 4.0 and isnan(mean_and_deviation([4.0])[1])
    assert all(map(isnan, mean_and_deviation([])))
    assert mean_and_deviation([inf])[0] == inf
