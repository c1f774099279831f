"""Each rule against its definition, and against clients that report wrong numbers."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedforward.core.registry import AGGREGATORS
from fedforward.methods.aggregation import (
    Aggregator,
    clip_scales,
    clipped_mean,
    geometric_median,
    join,
    krum,
    mean,
    median,
    multi_krum,
    trimmed_mean,
)

RANDOM = np.random.default_rng(0)
HONEST = RANDOM.standard_normal((8, 6)) + 3.0
ONES = np.ones(10)
WEIGHTS = np.full(10, 0.1)
ROBUST = {
    "median": median,
    "trimmed-mean": trimmed_mean.for_tolerated(2),
    "geometric-median": geometric_median,
    "krum": krum.for_tolerated(2),
    "multi-krum": multi_krum.for_tolerated(2),
}


def joined(rule: Aggregator, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
    count = len(gradients)
    return rule.join(gradients, np.ones(count), np.full(count, 1.0 / count), 1)


def test_a_trimmed_mean_is_the_mean_of_what_is_in_the_middle() -> None:
    values = np.array([[5.0, 1.0], [1.0, 2.0], [2.0, 90.0], [3.0, 3.0], [-9.0, 4.0]])
    assert joined(trimmed_mean, values).tolist() == [2.0, 3.0]
    assert joined(trimmed_mean.for_tolerated(2), values).tolist() == [2.0, 3.0]
    assert np.allclose(joined(trimmed_mean.for_tolerated(0), values), values.mean(axis=0))


def test_krum_chooses_the_client_that_is_nearest_to_its_nearest() -> None:
    """Against the definition, written out with every set of neighbours."""
    tolerated, updates = 2, RANDOM.standard_normal((9, 4))
    scores = []
    for n in range(9):
        others = [m for m in range(9) if m != n]
        sets = combinations(others, 9 - tolerated - 2)
        scores.append(min(sum(np.sum((updates[n] - updates[m]) ** 2) for m in s) for s in sets))
    best = int(np.argmin(scores))
    assert np.array_equal(joined(krum.for_tolerated(tolerated), updates), updates[best])
    kept = sorted(np.argsort(scores)[:7])
    found = joined(multi_krum.for_tolerated(tolerated), updates)
    assert np.allclose(found, updates[kept].mean(axis=0))


def test_a_geometric_median_has_the_least_sum_of_distances() -> None:
    updates = RANDOM.standard_normal((7, 3))
    weights = RANDOM.random(7)
    weights /= weights.sum()
    found = geometric_median.join(updates, np.ones(7), weights, 1)

    def distance(place: NDArray[np.float64]) -> float:
        return float(weights @ np.linalg.norm(updates - place, axis=1))

    for _ in range(200):
        assert distance(found) <= distance(found + 1e-3 * RANDOM.standard_normal(3)) + 1e-12
    # On a line it is the median, and where all say the same it is that.
    assert joined(geometric_median, np.array([[0.0], [1.0], [50.0]])) == pytest.approx(
        1.0, abs=1e-4
    )
    assert joined(geometric_median, np.full((4, 2), 3.0)).tolist() == [3.0, 3.0]


def test_updates_are_clipped_to_one_and_a_half_times_their_median_length() -> None:
    updates = np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 500.0]])
    assert clip_scales(updates).tolist() == [1.0, 1.0, 0.015]
    assert np.allclose(joined(clipped_mean, updates), [1.0, 12.5 / 3.0])
    assert clip_scales(np.zeros((3, 2))).tolist() == [1.0, 1.0, 1.0]


def test_rates_and_directions_scale_every_rule_alike() -> None:
    gradients = [row.astype(np.float32) for row in np.vstack([HONEST, HONEST[:2]])]
    for name in AGGREGATORS:
        rule = AGGREGATORS.get(name)
        one = join(rule, gradients, [0.5] * 10, [0.1] * 10, 1)
        other = join(rule, gradients, [2.0] * 10, [0.1] * 10, 4)
        assert np.allclose(one, other, rtol=1e-6), name
        assert (one < 0).all(), "the sign of a step down"


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize(
    "attack",
    [-HONEST.mean(axis=0), -10 * HONEST[0], np.full(6, 1e6), np.full(6, -1e30), np.zeros(6)],
    ids=["flip", "ten times", "large", "huge", "nothing"],
)
def test_two_of_ten_move_a_robust_rule_no_further_than_the_others_are(
    name: str, attack: NDArray[np.float64]
) -> None:
    found = joined(ROBUST[name], np.vstack([HONEST, attack, attack]))
    spread = np.abs(HONEST - HONEST.mean(axis=0)).max()
    assert (np.abs(found - HONEST.mean(axis=0)) <= spread).all()
    moved = joined(mean, np.vstack([HONEST, attack, attack]))
    assert np.abs(moved - HONEST.mean(axis=0)).max() > 0.3, "the mean is moved"


def test_the_fewest_clients_of_a_rule() -> None:
    assert (mean.least, median.least, clipped_mean.least) == (1, 1, 1)
    assert (trimmed_mean.least, krum.least, multi_krum.least) == (3, 5, 5)
    assert trimmed_mean.for_tolerated(3).least == 7 and krum.for_tolerated(3).least == 9
    assert median.for_tolerated(3) is median
