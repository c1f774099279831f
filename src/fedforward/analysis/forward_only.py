"""Curvature and the error of two-point estimates from forward passes alone, as a site could do it.

Speaks to a `ForwardModel`, so it works on a quadratic, on quantised weights and where blocks are
offloaded. Imports no PyTorch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedforward.analysis.spectrum import Interval
from fedforward.core.layout import Layout
from fedforward.core.steps import NO_STEPS, ForwardModel, Probe, Steps
from fedforward.directions import TILE, Distribution
from fedforward.directions.numba_kernels import commit

#: Tiles of a direction that are made at once.
_TILES = 64


@dataclass(frozen=True)
class ForwardTrace:
    """What second differences along random directions say of the Hessian.

    Attributes:
        part: of the tuned parameters that moved: "all", or "A" or "B" of adapters alone.
        mu: μ.
        directions: that were probed.
        trace: tr(H), the mean of (L₊ - 2 L₀ + L₋) / μ².
        squares: ‖H‖_F², half the variance of these. With Rademacher directions the squares of the
            diagonal are not in it.
        least_rank: tr(H) / ‖H‖_F, which is no more than tr(H) / ‖H‖ where H is positive.
        most_rank: tr(H)² / ‖H‖_F², which is no less.
    """

    part: str
    mu: float
    directions: int
    trace: Interval
    squares: Interval
    least_rank: float
    most_rank: float


@dataclass(frozen=True)
class TwoPointError:
    """How well (L₊ - L₋) / 2μ tells the projected gradient ∇F·z.

    Attributes:
        dtype: of the weights.
        mu: μ.
        bias: slope of the estimates against ∇F·z in float32, less 1.
        noise: root mean square of what is left, as a multiple of that of ∇F·z.
        zeros: share of the estimates that are exactly 0.
        finite: share that are finite; the rest is left out.
    """

    dtype: str
    mu: float
    bias: float
    noise: float
    zeros: float
    finite: float


def losses_at(
    model: ForwardModel, batches: Sequence[Any], perturbations: Sequence[Steps]
) -> NDArray[np.float64]:
    """The mean loss of all batches together at each perturbation, float64 [perturbations]."""
    sums, counts = np.zeros((2, len(perturbations)))
    for batch in batches:
        probes = [Probe(batch, perturbation=own) for own in perturbations]
        for place, found in enumerate(model.evaluate(probes)):
            sums[place] += found.sums.sum()
            counts[place] += found.counts.sum()
    return np.asarray(sums / counts)


def trace_of(
    model: ForwardModel,
    batches: Sequence[Any],
    seeds: Sequence[int],
    mu: float,
    part: str = "all",
) -> ForwardTrace:
    """Estimate tr(H) and ‖H‖_F from 2 n + 1 forward passes.

    Gaussian directions have Var(zᵀ H z) = 2 ‖H‖_F².

    Args:
        seeds: of n directions, at least 2.
        part: for the result; a mask of the model says what moves.
    """
    steps = [Steps.of([seed], [sign * mu]) for seed in seeds for sign in (1.0, -1.0)]
    found = losses_at(model, batches, [NO_STEPS, *steps])
    bends = (found[1::2] - 2.0 * found[0] + found[2::2]) / mu**2
    count = len(bends)
    trace, half = Interval.of(bends), float(bends.var(ddof=1)) / 2.0
    edges = stats.chi2.ppf([0.975, 0.025], count - 1)
    squares = Interval(half, *(half * (count - 1) / edges).tolist())
    positive = half > 0.0 and trace.value > 0.0
    return ForwardTrace(
        part=part,
        mu=mu,
        directions=count,
        trace=trace,
        squares=squares,
        least_rank=float(trace.value / half**0.5) if positive else float("nan"),
        most_rank=float(trace.value**2 / half) if positive else float("nan"),
    )


def projections(
    layout: Layout, gradient: NDArray[np.float64], seeds: Sequence[int], distribution: Distribution
) -> NDArray[np.float64]:
    """∇F·z of each seed's direction, float64 [seeds].

    Args:
        gradient: float64 [d], in the layout's order without padding.
    """
    found = np.zeros(len(seeds))
    one = np.ones(1, np.float32)
    zeros, z = np.zeros((2, _TILES * TILE), np.float32)
    begin = 0
    for size, first_tile in zip(layout.sizes, layout.first_tiles, strict=True):
        for offset in range(0, size, len(zeros)):
            count = min(len(zeros), size - offset)
            own = gradient[begin + offset : begin + offset + count]
            for place, seed in enumerate(seeds):
                commit(
                    zeros[:count],
                    np.array([seed], np.uint64),
                    one,
                    first_tile=first_tile + offset // TILE,
                    distribution=distribution,
                    out=z[:count],
                )
                found[place] += own @ z[:count]
        begin += size
    return found


def two_point_errors(
    model: ForwardModel,
    batches: Sequence[Any],
    seeds: Sequence[int],
    exact: NDArray[np.float64],
    scales: Sequence[float],
    dtype: str,
) -> list[TwoPointError]:
    """The error of two-point estimates at each μ.

    Args:
        exact: ∇F·z of each seed, float64.
        scales: every μ.
        dtype: of the model's weights, for the result.
    """
    errors = []
    for mu in scales:
        steps = [Steps.of([seed], [sign * mu]) for seed in seeds for sign in (1.0, -1.0)]
        found = losses_at(model, batches, steps)
        with np.errstate(invalid="ignore", over="ignore"):
            estimates = (found[0::2] - found[1::2]) / (2.0 * mu)
        finite = np.isfinite(estimates)
        kept, true = estimates[finite], exact[finite]
        slope = noise = float("nan")
        if finite.any() and true.any():
            slope = float(kept @ true / (true @ true))
            rest = kept - slope * true
            noise = float(np.sqrt((rest @ rest) / (true @ true)))
        zeros = float((estimates == 0.0).mean())
        errors.append(TwoPointError(dtype, mu, slope - 1.0, noise, zeros, float(finite.mean())))
    return errors
