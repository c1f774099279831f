"""The two stages in their order: the least f₁, then the least memory for each ε."""

import math
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import get_args

import numpy as np

from fedforward.core.errors import FedForwardError
from fedforward.planning.activation.exchange import Search
from fedforward.planning.activation.problem import (
    SAME,
    UNLIMITED,
    Activation,
    Bools,
    Floats,
    Objective,
    Problem,
    Stage,
)
from fedforward.planning.activation.program import Program, cover, lower_bound, relax


def solve(
    problem: Problem,
    epsilon: float = 0.0,
    objective: Objective = "total",
    time_limit: float = 10.0,
) -> Activation:
    """The least memory among activations whose f₁ is at most (1 + epsilon) times the least.

    Args:
        problem: clients, blocks, costs and budgets.
        epsilon: ≥ 0, relative.
        objective: "total" for the sum over the clients, "worst" for the largest client.
        time_limit: seconds after which the best matrix so far is returned, with its true gaps. A
            linear program that has begun may end later: with 1,000 clients, by two minutes.

    Raises:
        FedForwardError: an argument is out of its range, or no activation keeps to the budgets.
    """
    return pareto(problem, [epsilon], objective, time_limit)[0]


def pareto(
    problem: Problem,
    epsilons: Iterable[float] = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    objective: Objective = "total",
    time_limit: float = 10.0,
) -> list[Activation]:
    """One activation per epsilon, in ascending order; memory never rises from one to the next.

    The first stage is solved once. `time_limit` is for it and for each point on its own.

    Raises:
        FedForwardError: as `solve`.
    """
    epsilons = sorted(epsilons)
    for epsilon in epsilons:
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise FedForwardError(f"epsilon is {epsilon}; it must be finite and ≥ 0.")
    if objective not in get_args(Objective):
        raise FedForwardError(f"objective is {objective!r}; it must be 'total' or 'worst'.")
    if not time_limit > 0:
        raise FedForwardError(f"time_limit is {time_limit} seconds; it must be positive.")
    begin = time.perf_counter()
    first = _least_surrogate(problem, begin + time_limit / 2)
    points: list[Activation] = []
    known = [first.matrix]
    for epsilon in epsilons:
        target = (1 + epsilon) * first.value * (1 + SAME)
        # The first point shares its limit with the first stage.
        second = _least_memory(problem, target, objective, known, begin + time_limit)
        if not problem.admits(second.matrix):
            raise RuntimeError("the activation found breaks a constraint")
        points.append(
            Activation(
                matrix=second.matrix,
                surrogate=problem.surrogate(second.matrix),
                best_surrogate=first.value,
                bound=first.bound,
                gap=first.gap,
                memory=problem.memory(second.matrix),
                epsilon=float(epsilon),
                objective=objective,
                memory_bound=second.bound,
                memory_gap=second.gap,
                seconds=time.perf_counter() - begin,
                shares=problem.shares,
            )
        )
        known.append(second.matrix)
        begin = time.perf_counter()
    return points


def _least_surrogate(problem: Problem, deadline: float) -> Stage:
    """The least f₁ and a lower bound on it."""
    problem.check_each()
    relaxed = relax(problem, deadline)
    start = np.zeros(problem.costs.shape, bool) if relaxed is None else relaxed.whole(problem)
    bound = 0.0 if relaxed is None else relaxed.bound
    enough = bound * (1 + (SAME if problem.small else 1e-7))
    search = Search(problem, start)
    search.polish(deadline, enough)
    if math.isinf(search.value):
        search = Search(problem, cover(problem, deadline))
        search.polish(deadline, enough)
    matrix = search.matrix
    bound = max(bound, lower_bound(problem, _prices(problem, matrix)))
    best = Stage(matrix, problem.surrogate(matrix), bound)
    if best.gap > SAME and problem.small:
        best = Program(problem).least_surrogate(best, deadline)
    return Stage(best.matrix, best.value, min(best.bound, best.value))


def _prices(problem: Problem, matrix: Bools) -> Floats:
    """What a unit of coverage is worth at the margin, float64 [L]."""
    prices: Floats = problem.weights / (problem.shares @ matrix) ** 2 - problem.slopes
    return prices


def _least_memory(
    problem: Problem, target: float, objective: Objective, known: Sequence[Bools], deadline: float
) -> Stage:
    """The least memory with f₁ at most `target`, and a lower bound on it."""
    best = min(known, key=lambda matrix: problem.used(matrix, objective))
    start = Stage(best, problem.used(best, objective), 0.0)
    stage = _least_total if objective == "total" else _least_worst
    found = stage(problem, target, start, deadline)
    if found.bound < found.value and problem.small:
        found = Program(problem).least_memory(found, target, objective, deadline)
    return Stage(found.matrix, found.value, min(found.bound, found.value))


def _least_total(problem: Problem, target: float, start: Stage, deadline: float) -> Stage:
    """The least bytes of all clients; `start` meets the target, and its bound is not used."""
    base = int(problem.fixed.sum())
    costs = np.where(problem.allowed, problem.costs, 0)
    # Each block is paid for once at least.
    bound = base + int(np.where(problem.allowed, costs, UNLIMITED).min(axis=0).sum())
    if start.value <= bound:
        return Stage(start.matrix, start.value, start.value)
    relaxed = relax(problem, deadline, target)
    if relaxed is not None:
        # Bytes come in units, but for rounding errors of the bound.
        unit = max(int(np.gcd.reduce(costs, axis=None)), 1)
        units = relaxed.bound / unit
        bound = max(bound, base + unit * math.ceil(units - 1e-9 * max(1.0, abs(units))))
    trimmed = Search(problem, start.matrix)
    trimmed.trim(target)
    best = Stage(trimmed.matrix, problem.used(trimmed.matrix, "total"), bound)
    if relaxed is None or relaxed.worth <= 0:
        return best
    matrix, byte_price = relaxed.whole(problem), 1 / relaxed.worth
    for _ in range(4):
        if best.value <= bound or time.perf_counter() > deadline:
            break
        search = Search(problem, matrix, byte_price)
        search.polish(deadline)
        matrix = search.matrix
        byte_price *= 1.02 if search.value <= target else 0.98
        trimmed = Search(problem, matrix)
        trimmed.trim(target)
        used = problem.used(trimmed.matrix, "total")
        if used < best.value and trimmed.value <= target:
            best = Stage(trimmed.matrix, used, bound)
    return best


def _least_worst(problem: Problem, target: float, start: Stage, deadline: float) -> Stage:
    """The least cap on every client's bytes; `start` meets the target, its bound is not used."""
    everything = np.append(problem.fixed, problem.costs[problem.allowed])
    unit = max(int(np.gcd.reduce(everything)), 1)
    alone = np.where(problem.allowed, problem.fixed[:, None] + problem.costs, UNLIMITED)
    bound, high = max(int(problem.fixed.max()), int(alone.min(axis=0).max())), int(start.value)
    prices, whole = _prices(problem, start.matrix), np.zeros_like(start.matrix)
    now = time.perf_counter()
    for turn in range(8):
        # Prices rule out the caps below one; at that one they are taken anew.
        before, bound = bound, _bound_cap(problem, prices, target, bound, high, unit)
        if turn and bound - before <= 1e-7 * bound:
            break
        capped = problem.capped(bound)
        relaxed = relax(capped, (now + deadline) / 2)
        if relaxed is None:
            break
        prices, whole = relaxed.prices, relaxed.whole(capped)
    low, cap, matrix = bound, bound, start.matrix
    for _ in range(8):
        if low >= high or time.perf_counter() > deadline:
            break
        capped = problem.capped(cap)
        search = Search(capped, whole)
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
