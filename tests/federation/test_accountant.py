"""ε against numerical integration: added, removed and replaced examples, and Laplace noise."""

import math

import numpy as np
import pytest
from scipy.special import logsumexp

from fedforward.federation.privacy import (
    ORDERS,
    Guarantee,
    epsilon,
    laplace_epsilon,
    rdp,
    replacement_rdp,
)

X = np.linspace(-60.0, 60.0, 240_001)
STEP = 120.0 / 240_000


def gaussians(chance: float, sigma: float, shift: float) -> np.ndarray:
    """The logarithm of (1 - q) N(0, σ²) + q N(shift, σ²) at X."""

    def at(mean: float) -> np.ndarray:
        return -((X - mean) ** 2) / (2 * sigma**2) - math.log(math.sqrt(2 * math.pi) * sigma)

    stay = math.log1p(-chance) if chance < 1 else -math.inf
    return np.logaddexp(stay + at(0.0), math.log(chance) + at(shift))


def divergence(order: float, p: np.ndarray, q: np.ndarray, cell: float = STEP) -> float:
    """The Rényi divergence of densities on a grid, given their logarithms."""
    return (logsumexp(order * p + (1 - order) * q) + math.log(cell)) / (order - 1)


@pytest.mark.parametrize(("chance", "sigma"), [(0.01, 1.0), (0.2, 2.0), (0.9, 5.0)])
def test_one_example_added_or_removed(chance: float, sigma: float) -> None:
    with_it, without = gaussians(chance, sigma, 1.0), gaussians(chance, sigma, 0.0)
    curve = dict(zip(ORDERS, rdp(chance, sigma, 1), strict=True))
    for order in (1.5, 2.0, 3.7, 8.0):
        added = divergence(order, with_it, without)
        assert curve[order] == pytest.approx(added, rel=1e-5)
        # Removed is never more.
        assert divergence(order, without, with_it) <= added


@pytest.mark.parametrize("chance", [0.01, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("sigma", [0.6, 1.0, 4.0])
def test_one_example_replaced(chance: float, sigma: float) -> None:
    """The divergence of the two densities that are farthest from each other."""
    one, other = gaussians(chance, sigma, 1.0), gaussians(chance, sigma, -1.0)
    curve = dict(zip(ORDERS, replacement_rdp(chance, sigma, 3), strict=True))
    for order in (1.5, 2.0, 3.7, 8.0, 9.9):
        assert curve[order] == pytest.approx(3 * divergence(order, one, other), rel=1e-8)
    if chance == 1.0:
        # Plain Gaussians at a distance of 2.
        assert curve[64] == pytest.approx(3 * 2 * 64 / sigma**2, rel=1e-12)


@pytest.mark.parametrize("angle", [0.25, 0.5, 0.75])
def test_examples_that_do_not_oppose_each_other_cost_less(angle: float) -> None:
    """In two dimensions, with other angles and lengths between the two shifts."""
    side = np.linspace(-14.0, 14.0, 561)
    x, y = np.meshgrid(side, side)

    def mixture(a: float, b: float) -> np.ndarray:
        parts = [
            math.log(share / (2 * math.pi)) - ((x - a * n) ** 2 + (y - b * n) ** 2) / 2
            for share, n in ((0.8, 0.0), (0.2, 1.0))
        ]
        return np.asarray(np.logaddexp(*parts))

    turned = math.pi * angle
    curve = dict(zip(ORDERS, replacement_rdp(0.2, 1.0, 1), strict=True))
    for length in (0.3, 1.0):
        other = mixture(length * math.cos(turned), length * math.sin(turned))
        for order in (2.0, 4.0, 8.0):
            found = divergence(order, mixture(1.0, 0.0), other, (side[1] - side[0]) ** 2)
            assert found < curve[order]


def composed(p: np.ndarray, q: np.ndarray, steps: int, delta: float) -> float:
    """ε of so many steps at δ, from the distribution of the privacy loss (by FFT)."""
    width, half = 1e-3, 2**15
    places = np.ceil((p - q) / width).astype(int)
    mass = np.zeros(2 * half)
    np.add.at(mass, np.clip(places, 1 - half, half - 1) % (2 * half), np.exp(p) * STEP)
    total = np.fft.ifft(np.fft.fft(mass) ** steps).real
    losses = np.fft.ifftshift(np.arange(-half, half)) * width
    low, high = 0.0, half * width
    for _ in range(40):
        middle = (low + high) / 2
        over = losses > middle
        chance = (total[over] * -np.expm1(middle - losses[over])).sum()
        low, high = (low, middle) if chance <= delta else (middle, high)
    return high


@pytest.mark.parametrize(("chance", "sigma", "steps"), [(0.05, 1.0, 100), (0.2, 3.0, 300)])
def test_epsilon_of_many_steps_is_a_bound_and_a_near_one(
    chance: float, sigma: float, steps: int
) -> None:
    """Beside the exact composition: less than it for neither kind of neighbour."""
    middle = np.abs(X) < 12 * sigma
    one, none, other = (gaussians(chance, sigma, s)[middle] for s in (1.0, 0.0, -1.0))
    added = max(composed(one, none, steps, 1e-5), composed(none, one, steps, 1e-5))
    found = epsilon(chance, sigma, steps, 1e-5)
    assert added <= found <= 1.25 * added
    replaced = composed(one, other, steps, 1e-5)
    found = epsilon(chance, sigma, steps, 1e-5, "replace-one")
    assert added < replaced <= found <= 1.25 * replaced


def test_without_sampling_a_replaced_example_is_two_bounds_away() -> None:
    """Twice the distance is half the noise."""
    found = epsilon(1.0, 20.0, 4, 1e-5, "replace-one")
    assert found == pytest.approx(epsilon(1.0, 10.0, 4, 1e-5), rel=1e-9)


@pytest.mark.parametrize("chance", [0.03, 0.5, 1.0])
def test_laplace_noise_against_its_densities(chance: float) -> None:
    """The largest ratio of densities on a grid, of one direction and C = 1."""
    sigma = 2.5

    def density(shift: float) -> np.ndarray:
        return np.asarray(
            (1 - chance) * np.exp(-np.abs(X) / sigma) + chance * np.exp(-np.abs(X - shift) / sigma)
        )

    def farthest(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.abs(np.log(p / q)).max())

    added = laplace_epsilon(chance, sigma)
    assert added == pytest.approx(farthest(density(1.0), density(0.0)), rel=1e-9)
    assert added == pytest.approx(math.log(1 + chance * (math.exp(1 / sigma) - 1)))
    replaced = laplace_epsilon(chance, sigma, "replace-one")
    assert replaced == pytest.approx(farthest(density(1.0), density(-1.0)), rel=1e-9)
    assert added < replaced <= 2 / sigma * (1 + 1e-12)


def test_laplace_costs_add_up_and_can_be_calibrated() -> None:
    asked = Guarantee(1.0, 0.0, 0.0, 64, 1000, local_steps=2, noise="laplace")
    found = asked.calibrated(4.0, rounds=50)
    assert 3.999 < found.epsilon(50) <= 4.0
    # By hand: 0.04 a step, so that e^(1/σ) - 1 = (e^0.04 - 1) / 0.064.
    by_hand = 1 / math.log1p(math.expm1(0.04) / 0.064)
    assert found.noise_multiplier == pytest.approx(by_hand, rel=2e-4)
    assert found.epsilon(25) == pytest.approx(2.0, rel=1e-3)
    assert laplace_epsilon(0.5, 1e-3) == 1000.0


def test_replaced_examples_need_more_noise() -> None:
    asked = Guarantee(200.0, 0.0, 1e-5, 64, 1000, 1, adjacency="replace-one")
    found = asked.calibrated(6.0, 1000)
    assert found.epsilon(1000) <= 6.0
    added = Guarantee(200.0, 0.0, 1e-5, 64, 1000, 1).calibrated(6.0, 1000)
    assert 1.5 < found.noise_multiplier / added.noise_multiplier < 2.2
