"""Constants of assumptions from gradients whose constants are known, and the paper's formulas."""

from math import sqrt

import numpy as np
import pytest

from fedforward.analysis.assumptions import (
    Moments,
    heterogeneity_constants,
    local_rate,
    noise_constants,
    rate_constants,
    step_bound,
)
from fedforward.analysis.heterogeneity import divergences, index
from fedforward.core.seeds import direction_seed
from fedforward.core.steps import NO_STEPS, Steps, Update
from fedforward.methods.estimators import TwoPoint
from fedforward.models.quadratic import Quadratic

CLIENTS, BATCHES, SIZE = 5, 8, 4000


def grams_of(noise: float, per_square: float, apart: float, per_mean: float) -> list[np.ndarray]:
    """Gradients with c_g = 1 + per_square, σ_g² = noise, σ_h² = apart and c_h = per_mean."""
    generator = np.random.default_rng(0)
    base = generator.standard_normal(SIZE) / sqrt(SIZE)
    away = generator.standard_normal((CLIENTS, SIZE)) / sqrt(SIZE)
    away -= away.mean(axis=0)
    away *= sqrt(CLIENTS / (CLIENTS - 1))
    found = []
    for length in (4.0, 3.0, 2.0, 1.0):
        own = length * base + np.sqrt(apart + per_mean * length**2) * away
        spread = np.sqrt((noise + per_square * np.square(own).sum(axis=1)) / SIZE)
        drawn = generator.standard_normal((CLIENTS, BATCHES, SIZE)) * spread[:, None, None]
        rows = (own[:, None] + drawn).reshape(-1, SIZE)
        found.append((rows @ rows.T).reshape(CLIENTS, BATCHES, CLIENTS, BATCHES))
    return found


WEIGHTS = np.full(CLIENTS, 1.0 / CLIENTS)


def test_constants_are_those_that_the_gradients_were_made_with() -> None:
    grams = grams_of(noise=5.0, per_square=1.5, apart=2.0, per_mean=0.25)
    noise = noise_constants(grams, WEIGHTS)
    assert noise.told
    assert noise.slope.value == pytest.approx(2.5, rel=0.1)
    assert noise.rest.value == pytest.approx(5.0, rel=0.2)
    assert noise.slope.low - 0.05 <= 2.5 <= noise.slope.high + 0.05
    spread = heterogeneity_constants(grams, WEIGHTS)
    assert spread.slope.value == pytest.approx(0.25, rel=0.25)
    assert spread.rest.value == pytest.approx(2.0, rel=0.2)
    for gram in grams:
        own = Moments.of(gram, WEIGHTS)
        held = spread.slope.value * own.mean_square + spread.enough
        assert (own.distances <= held + 1e-9).all()


def test_clients_alike_have_no_heterogeneity_though_batches_differ() -> None:
    grams = grams_of(noise=20.0, per_square=0.0, apart=0.0, per_mean=0.0)
    own = Moments.of(grams[0], WEIGHTS)
    # Without taking out the noise of eight batches it would be 20 / 8.
    assert abs(own.distances.mean()) < 0.25
    assert own.mean_square == pytest.approx(16.0, rel=0.1)
    assert own.cosines == pytest.approx(np.ones(CLIENTS), abs=0.03)


def test_points_alike_do_not_tell_the_slope() -> None:
    grams = grams_of(1.0, 0.0, 0.0, 0.0)[:1]
    assert not heterogeneity_constants(grams, WEIGHTS).told
    assert heterogeneity_constants(grams, WEIGHTS).slope.value == 0.0


def test_the_bound_and_the_constants_are_those_of_the_paper() -> None:
    bound = step_bound(steps=30, smoothness=2.0, c_g=4.0, size=10_000, clients=3)
    assert bound.curvature == pytest.approx(1.0 / (3 * 30 * 2.0 * 200.0))
    assert bound.clients == pytest.approx(3 / (3 * 4.0 * 30 * 2.0))
    assert bound.steps == pytest.approx(1 / 900)
    assert bound.rate == bound.curvature
    assert step_bound(steps=99, smoothness=1e-3, c_g=1.0, size=4, clients=3).binding == "1/H²"
    found = rate_constants(
        size=1000, rank=50.0, directions=2, clients=4, steps=10, rounds=25, c_h=5.0, sigma_h2=2.0
    )
    assert found.gamma == pytest.approx((50_000 + 998) / (2 * 1002))
    assert found.zeta == pytest.approx(1002 * 4 / ((50_000 + 998) * 1001))
    assert found.iid == pytest.approx(50**1.5 / sqrt(1000))
    assert found.non_iid == pytest.approx(50**1.5 / sqrt(9 * 4 * 10 * 25))
    assert found.gained == pytest.approx(2.0 / (5.0 * 4))


@pytest.mark.parametrize(
    ("clients", "steps", "shared"), [(1, 1, False), (3, 2, False), (3, 2, True)]
)
def test_the_measured_rate_gains_what_it_says(clients: int, steps: int, shared: bool) -> None:
    """Many rounds from the same point; steps do not drift, as in the model."""
    model = Quadratic((2.0 * 0.8 ** np.arange(30)).tolist(), 200)
    matrix = model.basis @ np.diag(model.eigenvalues) @ model.basis.T
    gradient = -matrix @ model.optimum
    square = float(gradient @ gradient)
    along = float(gradient @ matrix @ gradient) / square
    weights = np.full(clients, 1.0 / clients)
    moments = Moments(np.full((clients, clients), square), np.full(clients, square), weights)
    trace = float(np.trace(matrix))
    best = local_rate(moments, trace=trace, along=along, directions=1, steps=steps, shared=shared)
    estimator = TwoPoint(mu=1e-3)
    start = model.loss(np.zeros(200))
    falls = []
    for number in range(1500):
        update = NO_STEPS
        for client in range(clients):
            for step in range(steps):
                seed = direction_seed(0, number, 0 if shared else client, step, 0)
                z = Steps.of([seed], [1.0])
                (g,), _ = estimator.gradients(model.evaluate(estimator.probes(None, NO_STEPS, [z])))
                update = update + z.scaled(-best.rate * float(g) / clients)
        model.commit([Update(update, 0)])
        falls.append(start - model.loss(model.theta.numpy().astype(np.float64)))
        model.reset()
    error = 3.0 * float(np.std(falls)) / sqrt(len(falls))
    assert float(np.mean(falls)) == pytest.approx(best.gain, abs=error)
    assert error < best.gain


def test_a_rate_is_not_made_of_no_gradient() -> None:
    none = Moments(np.zeros((1, 1)), np.ones(1), np.ones(1))
    assert np.isnan(
        local_rate(none, trace=1.0, along=1.0, directions=1, steps=1, shared=False).rate
    )


def test_indices_rank_as_spearman_has_it() -> None:
    measured = np.array([1.0, 2.0, 3.0, 4.0])
    same = index("same", np.array([10.0, 20.0, 30.0, 99.0]), measured)
    assert same.correlation == pytest.approx(1.0)
    # 2 of 24 orders are as far from chance.
    assert same.chance == pytest.approx(2 / 24)
    assert index("flat", np.ones(4), measured).correlation is None
    assert index("two", np.array([1.0, 2.0]), measured[:2]).correlation is None


def test_label_divergence() -> None:
    apart = divergences([{"a": 5}, {"b": 5}])
    # Half of all labels are a client's own: ln 2 - ¾ ln 3 + ½ ln 2, by hand.
    assert apart == pytest.approx([0.2157615543388357] * 2, rel=1e-9)
    assert divergences([{"a": 2, "b": 2}, {"a": 7, "b": 7}]) == pytest.approx([0.0, 0.0])
