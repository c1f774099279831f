"""The second stage where it is not exact at once: the least bytes with f₁ at most a target."""

import math
import time
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from fedforward.planning.activation.exchange import Search
from fedforward.planning.activation.problem import UNLIMITED, Bools, Floats, Problem, Stage
from fedforward.planning.activation.relaxation import (
    Priced,
    coverage_prices,
    lower_bound,
    price_bytes,
)


def least_total(problem: Problem, target: float, start: Stage, deadline: float) -> Stage:
    """The least bytes of all clients; `start` meets the target, and its bound is not used."""
    base = int(problem.fixed.sum())
    costs = np.where(problem.allowed, problem.costs, 0)
    unit = max(int(np.gcd.reduce(costs, axis=None)), 1)
    # Each block is paid for once at least.
    lowest = np.where(problem.allowed, costs, UNLIMITED).min(axis=0).sum()
    bound, scale = base + int(lowest), int(start.value) - base
    if start.value <= bound:
        return Stage(start.matrix, start.value, start.value)
    priced = price_bytes(problem, target, scale, deadline)
    # Bytes come in units, but for rounding errors of the bound.
    units = priced.bound / unit
    bound = max(bound, base + unit * math.ceil(units - 1e-9 * max(1.0, abs(units))))
    best = Stage(start.matrix, start.value, bound)
    tried = Search(problem, start.matrix)
    tried.trim(target)
    for matrix in (tried.matrix, *_near(problem, priced, target, deadline)):
        used = problem.used(matrix, "total")
        if used < best.value and problem.surrogate(matrix) <= target:
            best = Stage(matrix, used, bound)
    return best


def _near(problem: Problem, priced: Priced, target: float, deadline: float) -> Iterator[Bools]:
    """Matrices that meet the target, from exchanges at prices of a byte near the best one."""
    matrix, price = None, priced.byte_price
    for _ in range(4):
        search = Search(problem, matrix, price)
        # The objective of the search is f₁ and all bytes for blocks, which the prices bound.
        search.polish(deadline, lower_bound(problem, priced.prices, price) * (1 + 1e-7))
        matrix = search.matrix
        met = Search(problem, matrix)
        met.trim(target)
        if met.value <= target:
            yield met.matrix
        if time.perf_counter() > deadline:
            return
        price *= 1.02 if search.value <= target else 0.98


def least_worst(problem: Problem, target: float, start: Stage, deadline: float) -> Stage:
    """The least cap on every client's bytes; `start` meets the target, its bound is not used."""
    everything = np.append(problem.fixed, problem.costs[problem.allowed])
    unit = max(int(np.gcd.reduce(everything)), 1)
    alone = np.where(problem.allowed, problem.fixed[:, None] + problem.costs, UNLIMITED)
    bound, high = max(int(problem.fixed.max()), int(alone.min(axis=0).max())), int(start.value)
    prices = coverage_prices(problem)
    for _ in range(8):
        # Prices rule out the caps below one; at that one they are taken anew.
        before, bound = bound, _bound_cap(problem, prices, target, bound, high, unit)
        if bound - before <= 1e-7 * bound or time.perf_counter() > deadline:
            break
        prices = coverage_prices(problem.capped(bound))
    low, cap, matrix = bound, bound, start.matrix
    for _ in range(6):
        if low >= high or time.perf_counter() > deadline:
            break
        capped = problem.capped(cap)
        search = Search(capped)
        search.polish(deadline, target)
        if search.value <= target:
            matrix, high = search.matrix, problem.used(search.matrix, "worst")
        else:
            low = cap + unit
        # The bound is rarely far off.
        cap = low + (high - low) // 8 // unit * unit
    tidy = Search(problem.capped(high), matrix)
    tidy.trim(target)
    return Stage(tidy.matrix, high, bound)


def _bound_cap(
    problem: Problem, prices: Floats, target: float, low: int, high: int, unit: int
) -> int:
    """The least cap in [low, high], a multiple of `unit`, with which prices allow the target."""

    def allows(units: int) -> bool:
        return lower_bound(problem.capped(units * unit), prices) <= target

    units = range(-(-low // unit), high // unit)
    return unit * (units.start + bisect_left(units, True, key=allows))
