"""The two stages in their order: the least f₁, then the least memory for each ε."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import get_args

from fedforward.core.errors import FedForwardError
from fedforward.planning.activation import exact
from fedforward.planning.activation.cover import check_each, cover
from fedforward.planning.activation.exchange import Search
from fedforward.planning.activation.memory import least_total, least_worst
from fedforward.planning.activation.problem import (
    SAME,
    Activation,
    Bools,
    Objective,
    Problem,
    Stage,
)
from fedforward.planning.activation.program import Program
from fedforward.planning.activation.relaxation import coverage_prices, lower_bound


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
        time_limit: seconds after which the best matrix so far is returned, with its true gaps.

    Raises:
        FedForwardError: an argument is out of its range, or no activation keeps to the budgets.
    """
    return _front(problem, [epsilon], objective, time_limit)[0]


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
    return _front(problem, sorted(epsilons), objective, time_limit)


def _front(
    problem: Problem, epsilons: Sequence[float], objective: Objective, time_limit: float
) -> list[Activation]:
    for epsilon in epsilons:
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise FedForwardError(f"epsilon is {epsilon}; it must be finite and ≥ 0.")
    if objective not in get_args(Objective):
        raise FedForwardError(f"objective is {objective!r}; it must be 'total' or 'worst'.")
    if not time_limit > 0:
        raise FedForwardError(f"time_limit is {time_limit} seconds; it must be positive.")
    begin = time.perf_counter()
    first = _first_stage(problem, begin + time_limit / 2)
    points: list[Activation] = []
    known = [first.matrix]
    for epsilon in epsilons:
        target = (1 + epsilon) * first.value * (1 + SAME)
        # The first point shares its limit with the first stage.
        second = _second_stage(problem, target, objective, known, begin + time_limit)
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


def _first_stage(problem: Problem, deadline: float) -> Stage:
    """The least f₁ and a lower bound on it."""
    check_each(problem)
    if exact.applies(problem):
        return exact.least_surrogate(problem)
    bound = lower_bound(problem, coverage_prices(problem))
    enough = bound * (1 + (SAME if problem.small else 1e-7))
    search = Search(problem)
    search.polish(deadline, enough)
    if math.isinf(search.value):
        search = Search(problem, cover(problem, deadline))
        search.polish(deadline, enough)
    best = Stage(search.matrix, problem.surrogate(search.matrix), bound)
    if best.gap > SAME and problem.small:
        best = Program(problem).least_surrogate(best, deadline)
    return Stage(best.matrix, best.value, min(best.bound, best.value))


def _second_stage(
    problem: Problem, target: float, objective: Objective, known: Sequence[Bools], deadline: float
) -> Stage:
    """The least memory with f₁ at most `target`, and a lower bound on it."""
    best = min(known, key=lambda matrix: problem.used(matrix, objective))
    start = Stage(best, problem.used(best, objective), 0.0)
    if exact.applies(problem) and objective == "worst":
        return exact.least_worst(problem, target, int(start.value))
    if exact.applies(problem) and exact.same_cost(problem):
        return exact.least_total(problem, target)
    stage = least_total if objective == "total" else least_worst
    found = stage(problem, target, start, deadline)
    if found.bound < found.value and problem.small:
        found = Program(problem).least_memory(found, target, objective, deadline)
    return Stage(found.matrix, found.value, min(found.bound, found.value))
