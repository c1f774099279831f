"""One party of several neither takes the average nor decides what the others are told."""

import numpy as np
import pytest

from fedforward.federation.plausibility import (
    capped_weights,
    plausible_losses,
    plausible_sizes,
    size_of,
)


def test_weights_without_a_cap_are_shares_of_the_examples() -> None:
    for examples in ([3], [1, 9], [12, 10, 8], [5, 6, 7, 8]):
        wanted = [count / sum(examples) for count in examples]
        assert capped_weights(examples, 10.0, 0.5) == wanted


@pytest.mark.parametrize("claimed", [10**3, 2**31])
def test_a_claim_of_examples_takes_half_at_most(claimed: int) -> None:
    weights = capped_weights([10, 12, 8, claimed], 10.0, 0.5)
    assert weights[3] == 0.5 and sum(weights) == pytest.approx(1.0)
    # The others keep their proportions.
    assert np.allclose(np.array(weights[:3]) / weights[0], [1.0, 1.2, 0.8])
    many = capped_weights([10] * 99 + [claimed], 10.0, 0.5)
    assert many[-1] == pytest.approx(100 / 1090)


def test_of_two_clients_the_ratio_alone_counts() -> None:
    assert capped_weights([1, 3], 10.0, 0.5) == [0.25, 0.75]
    assert capped_weights([1, 2**31], 10.0, 0.5)[1] == pytest.approx(10 / 11)


def test_a_share_below_an_equal_one_is_an_equal_one() -> None:
    assert np.allclose(capped_weights([1, 5, 9], 10.0, 0.01), 1 / 3)
    weights = capped_weights([1, 1, 50, 60, 1], 100.0, 0.4)
    assert max(weights) <= 0.4 and sum(weights) == pytest.approx(1.0)
    assert weights[2] == weights[3] == 0.4


def test_a_loss_far_from_most_is_not_believed() -> None:
    assert plausible_losses([1.0, 1.2, 1e30]) == [True, True, False]
    assert plausible_losses([0.0, 0.0, 0.9, 1.1]) == [True, True, True, False]
    # Most of them say what is plausible, however large it is; two do not.
    assert plausible_losses([80.0, 90.0, 1.0]) == [True] * 3
    assert plausible_losses([1.0, 1e30]) == [True, True]
    assert plausible_losses([]) == []


def test_gradients_far_beyond_others_are_not_believed() -> None:
    assert plausible_sizes([1.0, 2.0, 3e38], []) == [True, True, False]
    assert plausible_sizes([3e38, 1.0], [1.0, 2.0]) == [False, True]
    assert plausible_sizes([3e38], [1.0, 2.0]) == [True], "nobody else says what is plausible"
    assert plausible_sizes([90.0, 80.0, 1.0], [1.0] * 9) == [True] * 3
    assert plausible_sizes([3e38, 1.0], []) == [True, True]
    assert plausible_sizes([0.0, 0.0, 5.0, 1.0, 2.0], []) == [True] * 5
    assert size_of(np.array([3.0, 4.0], np.float32)) == pytest.approx(np.sqrt(12.5))
    assert size_of(np.array([3e38], np.float32)) == pytest.approx(3e38, rel=1e-6)
    assert size_of(np.empty(0, np.float32)) == 0.0
