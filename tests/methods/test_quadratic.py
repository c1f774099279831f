"""Methods against their equations, and convergence against the theory, on the quadratic."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fedforward.core.errors import FedForwardError
from fedforward.core.seeds import direction_seed
from fedforward.core.steps import NO_STEPS, Evaluation, Probe, Steps, Update
from fedforward.directions import Distribution, reference
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.task import Task
from fedforward.methods.estimators import OneSided, TwoPoint
from fedforward.methods.fedmezo import FedMeZO
from fedforward.models.quadratic import Quadratic


class Constant:
    """A batch stream that always gives the same batch."""

    def __init__(self, batch: object = None, examples: int = 1) -> None:
        self.batch, self.examples = batch, examples

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, step: int) -> object:
        return self.batch


def local_round(
    method: FedMeZO, model: Quadratic, task: Task, batches: Constant, run_seed: int = 0
) -> Report:
    assert method.run_seed == run_seed
    generator = method.local_round(task, batches)
    probes = next(generator)
    while True:
        try:
            probes = generator.send(model.evaluate(probes))
        except StopIteration as done:
            return done.value


def federate(
    method: FedMeZO,
    model: Quadratic,
    rounds: int,
    rate: float,
    shifts: Sequence[object] = (None,),
    run_seed: int = 0,
) -> None:
    """Rounds of FedMeZO with equal weights, without server or runtime."""
    for number in range(rounds):
        returned = []
        for client, shift in enumerate(shifts):
            task = Task(number, client, rate, False, ())
            report = local_round(method, model, task, Constant(shift), run_seed)
            returned.append(ClientResult(1.0 / len(shifts), rate, report))
        entry = method.aggregate(number, returned, method.new_state())
        model.commit([method.update(entry, None)])


def z(seed: int, d: int, distribution: Distribution = Distribution.GAUSSIAN) -> np.ndarray:
    return reference.direction(seed, d, distribution=distribution).numpy().astype(np.float64)


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("distribution", list(Distribution))
def test_a_round_follows_the_equations(directions: int, distribution: Distribution) -> None:
    d, rate, mu, steps = 40, 0.05, 1e-2, 4
    shifts = [np.zeros(d), np.linspace(-0.1, 0.1, d), np.full(d, 0.05)]
    weights = [0.5, 0.3, 0.2]
    model = Quadratic([3.0, 1.0, 0.5], d, distribution=distribution)
    method = FedMeZO(run_seed=7, local_steps=steps, estimator=TwoPoint(directions, mu))
    theta = model.theta.numpy().astype(np.float64)
    averaged = np.zeros(d)
    returned = []
    for client, (shift, weight) in enumerate(zip(shifts, weights, strict=True)):
        local = theta.copy()
        expected = []
        for step in range(steps):
            start = local.copy()
            for direction in range(directions):
                z_h = z(direction_seed(7, 0, client, step, direction), d, distribution)
                plus = model.loss(start + mu * z_h, shift)
                minus = model.loss(start - mu * z_h, shift)
                g = (plus - minus) / (2 * mu)
                expected.append(g)
                local -= rate / directions * g * z_h
        averaged += weight * local
        task = Task(0, client, rate, False, ())
        report = local_round(method, model, task, Constant(shift), 7)
        np.testing.assert_allclose(report.gradients, expected, rtol=2e-4, atol=2e-5)
        returned.append(ClientResult(weight, rate, report))
    model.commit([method.update(method.aggregate(0, returned, None), None)])
    np.testing.assert_allclose(model.theta.numpy(), averaged, rtol=1e-4, atol=1e-6)


def test_averaging_tensors_is_averaging_steps() -> None:
    """The paper averages θ_i; we add up steps. Both in float32, to 1e-5 of the distance moved."""
    d, rate = 5000, 0.01
    model = Quadratic([5.0, 2.0, 1.0, 0.5], d)
    method = FedMeZO(run_seed=0, local_steps=30, estimator=TwoPoint(1, 1e-3))
    rates, weights = [0.5 * rate, rate, 1.5 * rate], [0.2, 0.3, 0.5]
    tensors, returned = [], []
    for client in range(3):
        shift = 0.01 * z(1000 + client, d)
        task = Task(0, client, rates[client], False, ())
        report = local_round(method, model, task, Constant(shift))
        local = model.theta.clone()
        for step, g in enumerate(report.gradients):
            seed = direction_seed(0, 0, client, step, 0)
            direction = reference.direction(seed, d, distribution=Distribution.GAUSSIAN)
            local = local - rates[client] * float(g) * direction
        tensors.append(local)
        returned.append(ClientResult(weights[client], rates[client], report))
    average = sum(w * t for w, t in zip(weights, tensors, strict=True))
    before = model.theta.clone()
    model.commit([method.update(method.aggregate(0, returned, None), None)])
    moved = torch.linalg.vector_norm(average - before)
    assert moved > 0.01
    assert torch.linalg.vector_norm(model.theta - average) <= 1e-5 * moved


def test_one_client_is_centralised_mezo() -> None:
    d, rate, mu, steps = 300, 0.01, 1e-3, 25
    federated, central = Quadratic([4.0, 1.0], d), Quadratic([4.0, 1.0], d)
    federate(
        FedMeZO(run_seed=0, local_steps=5, estimator=TwoPoint(1, mu)), federated, steps // 5, rate
    )
    for step in range(steps):
        seed = direction_seed(0, step // 5, 0, step % 5, 0)
        plus, minus = (
            central.evaluate([Probe(None, NO_STEPS, Steps.of([seed], [sign * mu]))])[0].mean
            for sign in (1, -1)
        )
        move = Steps.of([seed], [-rate * (plus - minus) / (2 * mu)])
        central.commit([Update(move, 0)])
    np.testing.assert_allclose(federated.theta.numpy(), central.theta.numpy(), rtol=1e-3, atol=2e-5)


def test_a_probe_leaves_the_weights() -> None:
    model = Quadratic([1.0], 3000)
    model.commit([Update(Steps.of([3], [0.1]), 0)])
    before = model.digest()
    federate_once = FedMeZO(run_seed=0, local_steps=3, estimator=TwoPoint(2, 1e-3))
    local_round(federate_once, model, Task(0, 0, 0.1, False, ()), Constant())
    assert model.digest() == before


def test_a_loss_that_is_not_finite_skips_the_step() -> None:
    model = Quadratic([1.0], 50)
    method = FedMeZO(run_seed=0, local_steps=4, estimator=TwoPoint(1, 1e-2))
    generator = method.local_round(Task(0, 0, 0.1, False, ()), Constant())
    probes = next(generator)
    for step in range(4):
        results = model.evaluate(probes)
        if step == 2:
            # Only the second of the two losses is broken: both must be looked at.
            results[1].sums[0] = np.nan
        try:
            probes = generator.send(results)
        except StopIteration as done:
            report = done.value
    assert report.skipped == 1
    assert report.gradients[2] == 0.0
    assert (report.gradients[[0, 1, 3]] != 0.0).all()
    assert np.isfinite(report.loss)


def rounds_to_halve(dimension: int, seed: int, distribution: Distribution) -> int:
    """Steps until the loss is a hundredth, at one rate for all dimensions."""
    model = Quadratic([1.0] * 8, dimension, seed=seed, distribution=distribution)
    start = model.loss(model.theta.numpy().astype(np.float64))
    for number in range(400):
        federate_one_step(model, number, rate=0.08, run_seed=seed)
        if model.loss(model.theta.numpy().astype(np.float64)) < 0.01 * start:
            return number + 1
    raise AssertionError("did not converge")


def federate_one_step(model: Quadratic, number: int, rate: float, run_seed: int) -> None:
    method = FedMeZO(run_seed=run_seed, local_steps=1, estimator=TwoPoint(1, 1e-3))
    report = local_round(method, model, Task(number, 0, rate, False, ()), Constant(), run_seed)
    entry = method.aggregate(number, [ClientResult(1.0, rate, report)], method.new_state())
    model.commit([method.update(entry, None)])


@pytest.mark.parametrize("distribution", list(Distribution))
def test_the_rate_does_not_depend_on_the_dimension(distribution: Distribution) -> None:
    """The same eight eigenvalues, rotated and zero-padded from d = 1e3 to 1e6, take as long."""
    steps = {
        d: np.mean([rounds_to_halve(d, seed, distribution) for seed in range(repeats)])
        for d, repeats in ((1_000, 6), (30_000, 6), (1_000_000, 2))
    }
    assert max(steps.values()) <= 1.35 * min(steps.values()), steps


def test_the_largest_stable_rate_goes_as_one_over_the_rank() -> None:
    """With r equal eigenvalues 1, E|θ|² shrinks iff η < 2/(r+2): bracket it for r = 4, 16, 64."""
    for rank in (4, 16, 64):
        limit = 2.0 / (rank + 2)
        for factor, stable in ((0.5, True), (2.0, False)):
            losses = []
            for seed in range(3):
                model = Quadratic([1.0] * rank, 4_000, seed=seed)
                start = model.loss(model.theta.numpy().astype(np.float64))
                for number in range(12 * rank):
                    federate_one_step(model, number, factor * limit, seed)
                end = model.loss(model.theta.numpy().astype(np.float64))
                losses.append(np.log(end / start))
            assert (np.median(losses) < 0) == stable, (rank, factor, losses)


def test_more_clients_average_the_noise_away() -> None:
    """With 16 clients the committed update is closer to the mean gradient than with one."""
    d, rate = 2_000, 1e-3
    errors = {}
    for clients in (1, 16):
        errors[clients] = []
        for seed in range(5):
            model = Quadratic([1.0] * 32, d, seed=seed)
            gradient = -(model.basis @ (model.basis.T @ model.optimum))
            method = FedMeZO(run_seed=seed, local_steps=1, estimator=TwoPoint(1, 1e-3))
            federate(method, model, 1, rate, [None] * clients, run_seed=seed)
            move = model.theta.numpy() / -rate
            errors[clients].append(np.linalg.norm(move - gradient))
    assert np.mean(errors[16]) < 0.4 * np.mean(errors[1])


@pytest.mark.parametrize("distribution", list(Distribution))
def test_one_sided_differences_are_the_gradient_without_the_common_curvature(
    distribution: Distribution,
) -> None:
    """g_d = u_d - mean of the others, u_d = z_d·∇f + (μ/2) z_dᵀHz_d, on a quadratic."""
    d, mu, n = 200, 1e-2, 5
    model = Quadratic([3.0, 1.0, 0.5], d, distribution=distribution)
    estimator = OneSided(n, mu)
    seeds = [direction_seed(1, 0, 0, 0, place) for place in range(n)]
    probes = estimator.probes(None, NO_STEPS, [Steps.of([seed], [1.0]) for seed in seeds])
    assert len(probes) == estimator.probes_per_step == n
    losses = model.evaluate(probes)
    found, loss = estimator.gradients(losses)
    assert loss == pytest.approx(np.mean([evaluation.mean for evaluation in losses]))
    hessian = model.basis * model.eigenvalues @ model.basis.T
    gradient = -hessian @ model.optimum
    units = [z(seed, d, distribution) for seed in seeds]
    rises = np.array([u @ gradient + mu / 2 * u @ hessian @ u for u in units])
    others = (rises.sum() - rises) / (n - 1)
    assert found == pytest.approx(rises - others, rel=1e-3, abs=1e-4)
    assert found.dtype == np.float32
    assert abs(found.sum()) < 1e-3
    # The mean of g z over many directions is the gradient itself.
    many = np.array([z(direction_seed(2, 0, 0, 0, n), d, distribution) for n in range(4000)])
    coordinates = many @ model.basis
    moved = 0.5 * mu**2 * (coordinates**2 @ model.eigenvalues) + mu * many @ gradient
    probed = [Evaluation(np.array([1.0 + rise]), np.array([1])) for rise in moved]
    projected, _ = OneSided(4000, mu).gradients(probed)
    estimate = model.basis.T @ (projected.astype(np.float64) @ many / 4000)
    truth = model.basis.T @ gradient
    assert np.linalg.norm(estimate - truth) < 0.15 * np.linalg.norm(truth)


@pytest.mark.parametrize("place", [0, 2])
def test_a_one_sided_step_without_a_finite_loss_is_not_finite(place: int) -> None:
    losses = [1.0, 1.5, 2.0]
    losses[place] = float("inf")
    found, _ = OneSided(3, 1e-2).gradients(
        [Evaluation(np.array([loss]), np.array([1])) for loss in losses]
    )
    assert np.isnan(found).all()


def test_one_sided_estimates_need_directions_to_compare() -> None:
    with pytest.raises(FedForwardError, match=r"method.directions = 1 leaves nothing"):
        OneSided(1, 1e-2)


@pytest.mark.parametrize("settings", [(0, 1e-2), (1, 0.0), (1, float("inf"))])
def test_one_sided_refuses_numbers_that_are_none(settings: tuple[int, float]) -> None:
    with pytest.raises(FedForwardError, match="is not allowed"):
        OneSided(*settings)
