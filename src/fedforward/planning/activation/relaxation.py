"""Prices of coverage and of bytes from the continuous relaxation, and the bounds they give."""

import math
import time
from functools import cache
from typing import NamedTuple

import numpy as np

from fedforward.planning.activation.problem import Floats, Problem


def coverage_prices(problem: Problem, byte_price: float = 0.0) -> Floats:
    """What a unit of each block's coverage is worth in the relaxation's optimum, float64 [L].

    The relaxation minimises f₁ + byte_price · bytes over fractions of activations, each in [0, 1];
    where its coverage is c_b, the prices are w_b / c_b² - λ_b.

    A primal-dual interior-point method of our own, because with 1,000 clients and 80 blocks it
    takes 0.2 to 0.4 s of one core, where HiGHS on tangents of 1/x takes 1 to 3.5 s for each of
    the two to four rounds that prices as good need, in either stage.

    Within a client the Hessian is a diagonal plus one row, its budget; between clients only the L
    coverages couple. So a step costs O(N L²) with one [L, L] system. Some 50 steps reach a
    relative 3e-8; more is not needed, because the certificate is computed apart, from the prices.
    """
    pull = np.where(problem.allowed, problem.shares[:, None], 0.0)
    costs = np.where(problem.allowed, problem.costs, 0).astype(np.float64)
    capacity = problem.capacity[:, None].astype(np.float64)
    binding = costs.sum(axis=1, keepdims=True) > capacity
    row = np.where(binding, costs / np.maximum(capacity, 1.0), 0.0)
    weights, slopes, linear = problem.weights, problem.slopes, byte_price * costs

    # x lies in (0, 1) and leaves a slack to budgets; each of the three bounds has a multiplier.
    start = np.minimum(0.5, 0.5 / np.maximum(row.sum(axis=1, keepdims=True), 1e-300))
    x = np.broadcast_to(start, row.shape)
    slack = 1.0 - (row * x).sum(axis=1, keepdims=True)
    coverage = (pull * x).sum(axis=0)
    centre = problem.surrogates(coverage).sum() / (2 * x.size + slack.size)
    lower, upper, multiplier = centre / x, centre / (1.0 - x), centre / slack
    length = 1.0
    for _ in range(200):
        rest = 1.0 - x
        gap = (lower * x).sum() + (upper * rest).sum() + (multiplier * slack).sum()
        value = problem.surrogates(coverage).sum() + (linear * x).sum()
        if gap < 3e-8 * value or length < 1e-4:
            break
        # Towards the central path by as much as the last step fell short.
        centre = min(max(1.0 - length, 0.05), 0.5) * gap / (2 * x.size + slack.size)
        downhill = pull * (weights / coverage**2 - slopes) - linear
        towards = downhill + centre / x - centre / rest - centre / slack * row
        inverse = 1.0 / (lower / x + upper / rest)
        curvature = 2.0 * weights / coverage**3
        change = _newton(towards, inverse, pull, row, multiplier / slack, curvature)
        moved = (row * change).sum(axis=1, keepdims=True)
        to_lower = (centre - lower * change) / x - lower
        to_upper = (centre + upper * change) / rest - upper
        to_multiplier = (centre + multiplier * moved) / slack - multiplier
        moves = (
            (x, change),
            (rest, -change),
            (slack, -moved),
            (lower, to_lower),
            (upper, to_upper),
            (multiplier, to_multiplier),
        )
        # Nearly the longest step that keeps all of these positive.
        shrink = max(float((-move / values).max()) for values, move in moves)
        length = min(1.0, 0.99 / max(shrink, 1e-300))
        x, slack = x + length * change, slack - length * moved
        lower, upper = lower + length * to_lower, upper + length * to_upper
        multiplier = multiplier + length * to_multiplier
        coverage = (pull * x).sum(axis=0)
    prices: Floats = weights / coverage**2 - slopes
    return prices


def _newton(
    right: Floats, inverse: Floats, pull: Floats, row: Floats, ratio: Floats, curvature: Floats
) -> Floats:
    """Solve (1 / inverse + a row of weight `ratio` per client + curvature of coverages) y = right.

    All are float64 [N, L] but `ratio`, [N, 1], and `curvature`, [L].
    """
    weighted = inverse * row
    factor = ratio / (1.0 + ratio * (row * weighted).sum(axis=1, keepdims=True))

    def within_clients(vectors: Floats) -> Floats:
        scaled = inverse * vectors
        solved: Floats = scaled - weighted * (factor * (row * scaled).sum(axis=1, keepdims=True))
        return solved

    coupled = pull * weighted * np.sqrt(factor)
    system = np.diag((pull**2 * inverse).sum(axis=0) + 1.0 / curvature) - coupled.T @ coupled
    alone = within_clients(right)
    force = np.linalg.solve(system, (pull * alone).sum(axis=0))
    return alone - within_clients(pull * force)


def lower_bound(problem: Problem, prices: Floats, byte_price: float = 0.0) -> float:
    """A lower bound on f₁ + byte_price · bytes for blocks over all activations, for any prices.

    Σ_b min_c (g_b(c) + y_b c) - Σ_i max {Σ_b (p_i y_b - byte_price cost_ib) A_ib}: coverage is
    bought at the prices y, and each client sells what its budget allows. The client's maximum is
    taken over fractions, which only lowers the bound; of coverage only such amounts are bought as
    some number of clients can give.
    """
    least, most = problem.coverages
    with np.errstate(divide="ignore"):
        best = np.sqrt(problem.weights / np.maximum(problem.slopes + prices, 0.0))
    # Where no so many clients are allowed, the largest coverage stands once more.
    coverage = np.minimum(np.maximum(best, least), most)
    bought = (problem.surrogates(coverage) + prices * coverage).min(axis=0)
    gains = problem.shares[:, None] * prices - byte_price * problem.costs
    sold = _sold(problem, np.where(problem.allowed, np.maximum(gains, 0.0), 0.0))
    return float(bought.sum() - sold.sum())


def _sold(problem: Problem, gains: Floats) -> Floats:
    """Each client's best fractional knapsack, float64 [N]."""
    costs = problem.costs.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(gains > 0, gains / costs, 0.0)
    order = np.argsort(-density, axis=1, kind="stable")
    gains = np.take_along_axis(gains, order, axis=1)
    # What gains nothing is not taken, whatever it costs.
    costs = np.where(gains > 0, np.take_along_axis(costs, order, axis=1), 0.0)
    left = problem.capacity[:, None] - (np.cumsum(costs, axis=1) - costs)
    part = np.where(costs > 0, np.clip(left / np.maximum(costs, 1.0), 0.0, 1.0), 1.0)
    sold: Floats = (part * gains).sum(axis=1)
    return sold


class Priced(NamedTuple):
    """A price of a byte, the relaxation's prices of coverage, the bound on bytes for blocks."""

    byte_price: float
    prices: Floats
    bound: float


def price_bytes(problem: Problem, target: float, scale: int, deadline: float) -> Priced:
    """The price of a byte at which the relaxation's f₁ is `target`, where bytes are bounded best.

    For any price θ > 0, bytes ≥ (min (f₁ + θ bytes) - target) / θ whenever f₁ ≤ target. `scale` is
    the order of magnitude of the bytes for blocks; `deadline` one of `time.perf_counter`.
    """
    from scipy.optimize import brentq

    tried: list[Priced] = []

    @cache
    def excess(exponent: float) -> float:
        if tried and time.perf_counter() > deadline:
            return 0.0
        theta = target / scale * math.exp(exponent)
        prices = coverage_prices(problem, theta)
        bound = (lower_bound(problem, prices, theta) - target) / theta
        tried.append(Priced(theta, prices, bound))
        coverage = np.sqrt(problem.weights / (prices + problem.slopes))
        return math.log(float(problem.surrogates(coverage).sum()) / target)

    ends = -9.0, 5.0
    if excess(ends[0]) < 0 < excess(ends[1]):
        brentq(excess, *ends, xtol=1e-3)
    return max(tried, key=lambda priced: priced.bound)
