"""Clipping and noise of projected gradients against hand-made losses, and the draws themselves."""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2

from fedforward.core.entropy import SystemEntropy
from fedforward.core.steps import Evaluation, Probe
from fedforward.data.sampler import PoissonSamples
from fedforward.messages.report import Report
from fedforward.messages.task import Task
from fedforward.methods.decomfl import DeComFL
from fedforward.methods.estimators import OneSided, TwoPoint
from fedforward.methods.fedmezo import FedMeZO
from fedforward.methods.privacy import Mechanism


class Seeded:
    """Draws that a test can make again; noise does not depend on how many rows there are."""

    def __init__(self, seed: int = 0) -> None:
        self.generator, self.samples = np.random.default_rng(seed), np.random.default_rng(seed)

    def chosen(self, count: int, chance: float) -> NDArray[np.int64]:
        return np.flatnonzero(self.samples.random(count) < chance)

    def gaussian(self, count: int, scale: int) -> NDArray[np.int64]:
        return np.rint(scale * self.generator.standard_normal(count)).astype(np.int64)

    def laplace(self, count: int, scale: int) -> NDArray[np.int64]:
        return np.rint(scale * self.generator.laplace(size=count)).astype(np.int64)

    def normal(self, count: int) -> NDArray[np.float64]:
        """The same draws in units of their deviation."""
        return self.gaussian(count, 2**30) / 2**30


class Samples:
    """The same sample at each step: batches of slopes float64 [examples, directions]."""

    def __init__(self, *batches: NDArray[np.float64]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return 100

    def __getitem__(self, step: int) -> list[NDArray[np.float64]]:
        return self.batches


class Slopes:
    """Losses that are linear along each direction of a step: an example's slope, times where."""

    def __init__(self, seeds: NDArray[np.uint64], directions: int) -> None:
        self.places = {int(seed): place % directions for place, seed in enumerate(seeds)}
        self.asked: list[Probe] = []

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        self.asked += probes
        return [self._one(probe) for probe in probes]

    def _one(self, probe: Probe) -> Evaluation:
        (seed,), (where,) = probe.perturbation.seeds, probe.perturbation.coefficients
        losses = 3.0 + float(where) * probe.batch[:, self.places[int(seed)]]
        # Two counted tokens each: an example's loss is a mean.
        return Evaluation(2.0 * losses, np.full(len(losses), 2))


def private(sigma: float, clip: float = 1.0, **changes: Any) -> Mechanism:
    given = {"expected": 4, "chance": 0.5, "examples": 100, "entropy": Seeded()}
    return Mechanism(clip=clip, noise_multiplier=sigma, **{**given, **changes})


def played(method: Any, samples: Any, rate: float = 0.5) -> tuple[Report, Slopes]:
    task = Task(0, 0, rate, False, ())
    model = Slopes(method.seeds(0, 0), method.directions)
    steps = method.local_round(task, samples)
    probes = next(steps)
    while True:
        try:
            probes = steps.send(model.evaluate(probes))
        except StopIteration as done:
            return done.value, model


@pytest.mark.parametrize("kind", [FedMeZO, DeComFL])
def test_a_vector_is_clipped_as_one_and_divided_by_the_expected_size(kind: Any) -> None:
    slopes = np.array([[3.0, 4.0], [0.3, 0.4], [-6.0, 8.0]])
    method = private(0.0).applied(kind(local_steps=2, estimator=TwoPoint(2, mu=0.5)))
    report, _ = played(method, Samples(slopes[:2], slopes[2:]))
    # (0.6, 0.8) + (0.3, 0.4) + (-0.6, 0.8), of four that were expected.
    assert report.gradients == pytest.approx([0.075, 0.5] * 2, abs=1e-6)


def test_a_one_sided_vector_is_clipped_as_well() -> None:
    slopes = np.array([[3.0, -3.0], [0.1, 0.3]])
    method = private(0.0).applied(FedMeZO(local_steps=1, estimator=OneSided(2, mu=0.5)))
    report, _ = played(method, Samples(slopes))
    # Each compared with the other: (6, -6) clipped, and (-0.2, 0.2).
    wanted = (np.array([1, -1]) / math.sqrt(2) + [-0.2, 0.2]) / 4
    assert report.gradients == pytest.approx(wanted, abs=1e-6)


def test_no_example_moves_a_sum_by_more_than_the_bound() -> None:
    mechanism = private(0.0, clip=0.7)
    rows = np.array(
        [[1e300, -1e300], [np.nan, 0.1], [np.inf, 1.0], [1e-320, 0.0], [0.0, 0.0], [0.5, 0.4]]
    )
    lengths = np.linalg.norm(mechanism.clipped(rows), axis=1)
    assert (lengths <= 0.7 * (1 + 1e-12)).all()
    assert lengths[:3] == pytest.approx([0.7, 0.0, 0.0])
    assert mechanism.clipped(rows)[5] == pytest.approx([0.5, 0.4])


def test_report_and_trajectory_are_of_the_same_noisy_scalars() -> None:
    slopes = np.array([[3.0, 4.0], [0.3, 0.4]])
    method = private(2.0).applied(FedMeZO(local_steps=3, estimator=TwoPoint(2, mu=0.5)))
    report, model = played(method, Samples(slopes))
    trajectory = model.asked[-1].trajectory
    assert len(trajectory) == 4
    assert trajectory.coefficients == pytest.approx(-0.5 / 2 * report.gradients[:4], abs=1e-6)
    clean = np.array([0.9, 1.2] * 3) / 4
    drawn = 2.0 / 4 * Seeded().normal(6)
    assert report.gradients == pytest.approx(clean + drawn, abs=1e-6)


def test_nothing_else_of_a_sample_is_in_the_report() -> None:
    """Two data sets, one with losses that are not finite, and the same noise."""
    method = FedMeZO(local_steps=2)
    wild = np.array([[np.inf], [np.nan]])
    reports = [
        played(private(1.0).applied(method), Samples(*found))[0]
        for found in ([wild], [np.zeros((3, 1)), np.zeros((1, 1))], [])
    ]
    assert len({report.encode() for report in reports}) == 1
    assert math.isnan(reports[0].loss)
    assert (reports[0].skipped, reports[0].examples) == (0, 100)
    assert not len(reports[0].line_search) and not reports[0].payload
    assert reports[0].gradients.all(), "no pattern of zeros"


def test_an_empty_sample_is_noise_alone() -> None:
    method = private(1.0, clip=3.0).applied(FedMeZO(local_steps=2))
    report, model = played(method, Samples())
    assert not model.asked
    assert report.gradients == pytest.approx(3.0 / 4 * Seeded().normal(2), abs=1e-6)


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    mechanism = Mechanism(clip=3.0, noise_multiplier=2.0, expected=4, chance=0.5, examples=8)
    assert isinstance(mechanism.entropy, SystemEntropy)
    drawn = mechanism.release(np.empty((0, 10_000)))
    # Five standard errors: false once in two million runs.
    assert abs(drawn.mean()) < 5 * 1.5 / math.sqrt(10_000)
    assert abs(drawn.std() / 1.5 - 1) < 5 / math.sqrt(20_000)
    assert abs((np.abs(drawn) > 1.5 * 1.959964).mean() - 0.05) < 5 * math.sqrt(0.0475 / 10_000)
    pure = replace(mechanism, noise="laplace").release(np.empty((0, 10_000)))
    # |x| is exponential with the mean σC / B, and as much deviation.
    assert abs(np.abs(pure).mean() / 1.5 - 1) < 5 / math.sqrt(10_000)
    assert abs((np.abs(pure) > 1.5 * math.log(20)).mean() - 0.05) < 5 * math.sqrt(0.0475 / 10_000)
    assert abs((pure > 0).mean() - 0.5) < 5 * 0.5 / math.sqrt(10_000)


@pytest.mark.parametrize("scale", [1, 3])
def test_noise_has_the_weights_of_whole_numbers(scale: int) -> None:
    """Chi-square of 5,000 draws against the weights by their definition."""
    values = np.arange(-60, 61)
    for draw, weights in (
        (SystemEntropy().gaussian, np.exp(-(values**2) / (2.0 * scale**2))),
        (SystemEntropy().laplace, np.exp(-np.abs(values) / scale)),
    ):
        wanted = 5_000 * weights / weights.sum()
        common = wanted > 10
        found = np.array(
            [(drawn == value).sum() for drawn in [draw(5_000, scale)] for value in values]
        )
        cells = np.append(found[common], 5_000 - found[common].sum())
        expected = np.append(wanted[common], 5_000 - wanted[common].sum())
        statistic = ((cells - expected) ** 2 / expected).sum()
        # False once in a million runs.
        assert statistic < chi2.ppf(1 - 1e-6, len(cells) - 1)


def test_last_bits_tell_nothing() -> None:
    """The attack of Mironov (2012): which sums could the noise have led to what came out?"""
    mechanism = private(1.0, clip=1.0)
    near, far = np.zeros((1, 8)), np.zeros((1, 8))
    far[:, 0] = 0.9
    for noise in ("gaussian", "laplace"):
        outputs = [
            replace(mechanism, noise=noise, entropy=Seeded(3)).total(rows) for rows in (near, far)
        ]
        # Either sum could have given either output: their difference is whole, whatever the noise.
        shift = outputs[1] - outputs[0]
        assert outputs[0].dtype == np.int64
        assert abs(shift[0] - 0.9 * 2**30) < 2 and not shift[1:].any()
    # Plain floating-point noise is told from 1,000 more by its bits alone.
    plain = np.random.default_rng(0).standard_normal(1000)
    fine = 2.0**-44
    assert (np.mod(1000.0 + plain, fine) == 0).all() and (np.mod(plain, fine) != 0).mean() > 0.9


def test_no_example_is_more_than_the_bound_in_units() -> None:
    """In whole numbers, with no rounding on the way, for both lengths."""
    rows = np.random.default_rng(1).standard_normal((2000, 7)) * 100.0
    for noise, sigma in (("gaussian", 0.37), ("laplace", 3.3)):
        mechanism = private(sigma, clip=0.7, noise=noise)
        # 2³⁰ units are σC, so C is 2³⁰ / σ units.
        most = Fraction(2**30) / Fraction(sigma)
        for row in rows:
            units = [int(x) for x in replace(mechanism, entropy=Still()).total(row[None])]
            length = sum(map(abs, units)) if noise == "laplace" else sum(x * x for x in units)
            assert length <= (most if noise == "laplace" else most**2)
            assert length > 0.999 * (most if noise == "laplace" else most**2)


class Still(Seeded):
    """No noise."""

    def gaussian(self, count: int, scale: int) -> NDArray[np.int64]:
        return np.zeros(count, np.int64)

    laplace = gaussian


def test_laplace_clips_the_sum_of_absolute_values() -> None:
    mechanism = private(0.0, clip=1.0, noise="laplace")
    rows = np.array([[3.0, -1.0], [0.2, 0.3], [np.nan, 0.0]])
    assert mechanism.clipped(rows) == pytest.approx(np.array([[0.75, -0.25], [0.2, 0.3], [0, 0]]))


def test_draws_of_the_system_are_new_each_time_and_have_their_chance() -> None:
    entropy = SystemEntropy()
    for draw in (entropy.gaussian, entropy.laplace):
        assert (draw(4, 2**30) != draw(4, 2**30)).all()
    drawn = entropy.chosen(100_000, 0.25)
    assert abs(len(drawn) - 25_000) < 5 * math.sqrt(18_750)
    assert (np.diff(drawn) > 0).all() and drawn[0] >= 0 and drawn[-1] < 100_000
    assert not np.array_equal(drawn, entropy.chosen(100_000, 0.25))
    assert len(entropy.chosen(10, 1.0)) == 10 and not len(entropy.chosen(10, 0.0))


class Rows:
    """What `PoissonSamples` needs of a client's batches."""

    batch_size = 3

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def collate(self, examples: Sequence[Any]) -> list[Any]:
        return list(examples)


def test_a_sample_is_batches_that_memory_was_measured_for(monkeypatch: Any) -> None:
    monkeypatch.setattr("fedforward.data.sampler.lengths", lambda rows: np.array(rows))
    monkeypatch.setattr(
        "fedforward.data.sampler.take", lambda rows, places: [rows[place] for place in places]
    )
    samples = PoissonSamples(Rows([5, 1, 4, 2, 3]), Seeded(), chance=1.0, said=9)  # type: ignore[arg-type]
    assert samples[0] == [[1, 2, 3], [4, 5]]
    assert len(samples) == 9
    none = PoissonSamples(Rows([5, 1]), Seeded(), chance=0.0, said=9)  # type: ignore[arg-type]
    assert none[0] == []
