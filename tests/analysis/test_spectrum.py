"""Effective rank from products, on quadratics whose spectrum is known."""

import numpy as np
import pytest

from fedforward.analysis.forward_only import projections, trace_of, two_point_errors
from fedforward.analysis.spectrum import Interval, Products, lanczos, random_signs, spectrum
from fedforward.directions import Distribution
from fedforward.models.quadratic import Quadratic

SPECTRA = {
    "flat": np.ones(20),
    "geometric": 10.0 * 0.9 ** np.arange(120),
    "power": 1.0 / np.arange(1, 501),
    "slow": np.arange(1, 301) ** -0.5,
}
#: A head of both signs and a long tail, where tr(H) is far below tr|H|.
MIXED = np.concatenate([0.9 ** np.arange(100), -0.4 * 0.9 ** np.arange(50)])


def products_of(model: Quadratic) -> Products:
    return lambda v: (v @ model.basis * model.eigenvalues) @ model.basis.T


def rank_of(values: np.ndarray) -> float:
    return float(values.sum() / np.abs(values).max())


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("seed", range(3))
def test_effective_rank_within_five_percent(name: str, seed: int) -> None:
    values = SPECTRA[name]
    model = Quadratic(values.tolist(), 2000, seed=seed)
    # Lanczos steps learn nothing of equal eigenvalues, so there must be as many starts as those.
    probes = 60 if name == "flat" else 24
    found = spectrum(products_of(model), 2000, probes=probes, steps=12, seed=seed)
    assert found.norm == pytest.approx(values.max(), rel=1e-3)
    assert found.trace.value == pytest.approx(values.sum(), rel=0.05)
    assert found.effective_rank.value == pytest.approx(rank_of(values), rel=0.05)
    assert found.converged


def test_indefinite_matrix() -> None:
    model = Quadratic(MIXED.tolist(), 2000)
    found = spectrum(products_of(model), 2000, probes=48, steps=12, seed=1)
    assert found.effective_rank.value == pytest.approx(rank_of(MIXED), rel=0.05)
    assert found.absolute_rank.value == pytest.approx(rank_of(np.abs(MIXED)), rel=0.1)
    assert found.least == pytest.approx(-0.4, rel=0.02)
    assert found.squares.value == pytest.approx(float(MIXED @ MIXED), rel=0.3)


def test_the_largest_magnitude_may_be_negative() -> None:
    model = Quadratic([1.0, 0.5, -3.0], 50)
    found = spectrum(products_of(model), 50, probes=6, steps=5, seed=0)
    assert (found.norm, found.least) == pytest.approx((3.0, -3.0))
    assert found.trace.value == pytest.approx(-1.5, rel=1e-4)
    assert found.effective_rank.value == pytest.approx(-0.5, rel=1e-4)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    values = SPECTRA["slow"]
    held = []
    for seed in range(60):
        model = Quadratic(values.tolist(), 1000)
        found = spectrum(products_of(model), 1000, probes=12, steps=6, seed=seed)
        held.append(found.effective_rank.low <= rank_of(values) <= found.effective_rank.high)
    assert np.mean(held) >= 0.85


@pytest.mark.parametrize("split", [False, True])
def test_traces_of_blocks(split: bool) -> None:
    model = Quadratic(SPECTRA["geometric"].tolist(), 1000)
    owners = np.repeat(np.arange(4), 250)
    truth = np.einsum("dr,r,dr->d", model.basis, model.eigenvalues, model.basis)
    groups = np.arange(1000) % 2 == 0 if split else None
    found = spectrum(
        products_of(model), 1000, probes=60, steps=12, seed=0, owners=owners, groups=groups
    )
    expected = np.bincount(owners, truth)
    assert [own.value for own in found.block_traces] == pytest.approx(expected.tolist(), rel=0.1)
    assert found.trace.value == pytest.approx(truth.sum(), rel=0.05)


def test_what_couples_two_parts_adds_no_noise() -> None:
    """H = [[0, C], [Cᵀ, I]]: as adapters have it where B = 0."""
    generator = np.random.default_rng(0)
    whole = np.zeros((200, 200))
    whole[:100, 100:] = 30.0 * generator.standard_normal((100, 100))
    whole += whole.T
    whole[100:, 100:] = np.eye(100)
    groups = np.arange(200) < 100
    found = spectrum(lambda v: v @ whole, 200, probes=6, steps=3, seed=0, groups=groups)
    assert found.trace.value == pytest.approx(100.0)
    assert found.trace.high - found.trace.low < 1e-6


def test_lanczos_stops_in_an_invariant_space() -> None:
    model = Quadratic([3.0, 2.0, 1.0], 40)
    (space,) = lanczos(products_of(model), random_signs(1, 40, 0), 10)
    assert space.steps == 4
    assert np.sort(space.ritz()[0]) == pytest.approx([0.0, 1.0, 2.0, 3.0], abs=1e-4)
    moved = np.stack([products_of(model)(row[None])[0] for row in space.basis[:4]])
    assert np.allclose(space.image(), moved, atol=1e-5)


def test_one_sample_has_no_interval() -> None:
    assert np.isnan(Interval.of([1.0]).low)
    assert np.isnan(Interval.of([1.0, 2.0]).over(0.0).value)


def test_trace_from_forward_passes_alone() -> None:
    values = SPECTRA["geometric"]
    model = Quadratic(values.tolist(), 4096, blocks=2)
    before = model.digest()
    found = trace_of(model, [None], range(1, 2001), 1e-2)
    assert model.digest() == before
    assert found.trace.value == pytest.approx(values.sum(), rel=0.05)
    assert found.squares.value == pytest.approx(float(values @ values), rel=0.15)
    assert found.least_rank <= rank_of(values) <= found.most_rank


def test_projections_and_the_error_of_two_points() -> None:
    model = Quadratic(SPECTRA["geometric"].tolist(), 3000, distribution=Distribution.RADEMACHER)
    gradient = products_of(model)(-model.optimum[None])[0]
    exact = projections(model.layout, gradient, range(1, 9), model.distribution)
    (found,) = two_point_errors(model, [None], range(1, 9), exact, [1e-3], "float32")
    assert abs(found.bias) < 1e-4 and found.noise < 1e-4
    assert (found.zeros, found.finite) == (0.0, 1.0)
    (wrong,) = two_point_errors(model, [None], range(1, 9), 2.0 * exact, [1e-3], "float32")
    assert wrong.bias == pytest.approx(-0.5, abs=1e-4)
