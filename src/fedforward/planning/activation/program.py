"""f₁ from below: HiGHS on tangents of each block's part, as linear and mixed-integer programs.

The linear program gives prices of coverage. Any prices give a bound for the integer problem, which
is computed from them alone, so that no tolerance of the solver is part of it.
"""

import contextlib
import ctypes
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedforward.core.errors import FedForwardError
from fedforward.planning.activation.problem import SAME, Bools, Floats, Objective, Problem, Stage

#: The solver's tolerances are absolute, about 1e-7; f₁ is multiplied by this before.
_SCALE = 1e4
#: A relative gap of f₁ that is worth little time to close.
_CLOSE = 1e-6


class Relaxed(NamedTuple):
    """A solution of the linear program.

    Attributes:
        bound: a lower bound on f₁, or with a target on the bytes for blocks.
        prices: float64 [L], what a unit of each block's coverage is worth.
        worth: what a unit of f₁ is worth: 1, or with a target in bytes.
        fractions: float64 [N, L], how much of each block a client has.
    """

    bound: float
    prices: Floats
    worth: float
    fractions: Floats

    def whole(self, problem: Problem) -> Bools:
        """What is whole in the fractions, bool [N, L], within the budgets of this problem."""
        matrix: Bools = self.fractions > 1 - 1e-6
        # The solver's tolerance may hide some bytes too many; such a client begins with nothing.
        matrix[problem.memory(matrix) > problem.budgets] = False
        return matrix


def relax(problem: Problem, deadline: float, target: float | None = None) -> Relaxed | None:
    """Minimise f₁ over fractions of activations, or the bytes for blocks with f₁ ≤ target.

    Tangents are added where the solution lies until it meets its bound; None if not even the
    first program ends by `deadline`, one of `time.perf_counter`. With a target of very many cells
    the solver may come back later than that: it does not look at the clock while it tidies up.
    """
    program = Program(problem)
    best: Relaxed | None = None
    for turn in range(5):
        found = program.relaxed(deadline, target)
        if found is None:
            break
        if best is None or found.bound > best.bound:
            best = found
        coverage = np.maximum(problem.shares @ found.fractions, problem.coverages[0][0])
        reached = found.worth * float(problem.surrogates(coverage).sum())
        if target is not None:
            used = float((problem.costs * found.fractions).sum())
            reached += used - found.worth * target
        if reached - found.bound <= 3e-8 * reached:
            break
        program.add_tangents(coverage, 0.04 / 8**turn)
    return best


def lower_bound(
    problem: Problem, prices: Floats, worth: float = 1.0, byte_price: float = 0.0
) -> float:
    """A lower bound on worth · f₁ + byte_price · bytes for blocks, for any prices, float64 [L].

    Σ_b min_c (worth g_b(c) + y_b c) - Σ_i max {Σ_b (p_i y_b - byte_price cost_ib) A_ib}, the
    Lagrangian dual: coverage is bought at the prices y, and each client sells what its budget
    allows. The client's maximum is taken over fractions, which only lowers the bound; of coverage
    only such amounts are bought as some number of clients can give.
    """
    least, most = problem.coverages
    with np.errstate(divide="ignore", invalid="ignore"):
        best = np.sqrt(worth * problem.weights / np.maximum(worth * problem.slopes + prices, 0.0))
    # Where no so many clients are allowed, the largest coverage stands once more.
    coverage = np.minimum(np.maximum(np.nan_to_num(best, posinf=np.inf), least), most)
    bought = (worth * problem.surrogates(coverage) + prices * coverage).min(axis=0)
    gains = problem.shares[:, None] * prices - byte_price * problem.costs
    gains = np.where(problem.allowed, np.maximum(gains, 0.0), 0.0)
    costs = np.where(gains > 0, problem.costs, 0).astype(np.float64)
    # Each client's fractional knapsack: by gain per byte, until its budget is used up.
    with np.errstate(divide="ignore", invalid="ignore"):
        order = np.argsort(-np.where(gains > 0, gains / costs, 0.0), axis=1, kind="stable")
    gains, costs = (np.take_along_axis(each, order, axis=1) for each in (gains, costs))
    left = problem.capacity[:, None] - (np.cumsum(costs, axis=1) - costs)
    sold = gains * np.where(costs > 0, np.clip(left / np.maximum(costs, 1.0), 0.0, 1.0), 1.0)
    return float(bought.sum() - sold.sum())


class System(NamedTuple):
    """Minimise start + unit · goal · x for 0 ≤ x ≤ upper, rows @ x ≤ limits, ties @ x = 0."""

    start: float
    unit: float
    goal: Floats
    upper: Floats
    rows: Any
    limits: Floats
    ties: Any


class Program:
    """f₁ as the largest of lines below each block's part: tangents, and chords.

    Columns: the cells of A, then each block's coverage in pieces on which its part is linear, then
    the worst client's bytes. The slopes of the pieces ascend, so that the solver fills them in
    order. Between what n clients can give a block at most and n + 1 at least, no coverage is
    possible: there the line is the chord. So with equal shares f₁ itself is reached; with equal
    costs too, the program is one of flows in a network, whose solutions are whole.
    """

    def __init__(self, problem: Problem) -> None:
        from scipy.sparse import coo_array

        self.problem = problem
        clients, blocks = problem.costs.shape
        self.unit = max(int(np.gcd.reduce(np.append(problem.fixed, problem.costs))), 1)
        cells = np.arange(problem.costs.size)
        client, block = np.divmod(cells, blocks)
        self.used = coo_array((problem.costs.reshape(-1), (client, cells)))
        # In clients, not in shares, so that a step of coverage is about 1.
        self.coverage = coo_array((clients * problem.shares[client], (block, cells)))
        self.covered = coo_array((np.ones(cells.size), (block, cells)))
        least, most = problem.coverages
        middles = (most[:-1] + np.minimum(least[1:], most[-1])) / 2
        points = [
            np.geomspace(least[0], most[-1], 3 if problem.small else 40),
            middles[:: 1 + clients // 100],
        ]
        self.points = np.sort(np.vstack(points), axis=0)

    def add_tangents(self, coverage: Floats, spread: float = 0.0) -> None:
        """More tangents at a coverage of each block, float64 [L], and within a part of it."""
        near = 1 + spread * np.linspace(-1, 1, 25 if spread else 1)[:, None]
        self.points = np.sort(np.vstack([self.points, coverage * near]), axis=0)

    def _pieces(self) -> tuple[Floats, Floats, float]:
        """Widths of the pieces and slopes of f₁ on them, float64 [K, L] both; f₁ before them."""
        problem = self.problem
        least, most = problem.coverages
        points = np.clip(self.points, least[0], most[-1])
        # Each line touches w/c at `left` and `right`: a tangent where these are the same.
        count = (least <= points[:, None]).sum(axis=1)
        left = np.take_along_axis(most, count - 1, axis=0)
        right = np.take_along_axis(least, np.minimum(count, len(least) - 1), axis=0)
        possible = (points <= left) | (right <= points) | np.isinf(right)
        left, right = np.where(possible, points, left), np.where(possible, points, right)
        left, right = np.vstack([least[:1], left]), np.vstack([least[:1], right])
        # Lines meet where 1/a₁ + 1/b₁ - c/(a₁b₁) = 1/a₂ + 1/b₂ - c/(a₂b₂).
        levels, falls = 1 / left + 1 / right, 1 / (left * right)
        with np.errstate(divide="ignore", invalid="ignore"):
            edges = np.nan_to_num(np.diff(levels, axis=0) / np.diff(falls, axis=0))
        edges = np.minimum(np.maximum(edges, right[:-1]), left[1:])
        widths = np.diff(np.vstack([edges, most[-1:]]), axis=0, prepend=0.0)
        slopes = problem.slopes - problem.weights * falls
        # Less than the least coverage is dear, not forbidden: so there is always a solution.
        slopes[0] -= 2 * problem.slopes
        base = problem.surrogates(least[0]) - slopes[0] * least[0]
        return widths, slopes, float(base.sum())

    def _system(self, target: float | None, objective: Objective, whole: bool) -> System:
        """Least f₁, or least bytes with f₁ at most `target`, which is then the last row."""
        from scipy.sparse import coo_array, hstack, vstack

        problem = self.problem
        clients, blocks = problem.costs.shape
        widths, slopes, base = self._pieces()
        kept, block = np.nonzero(widths > 1e-12)
        pieces = kept.size
        split = coo_array((np.ones(pieces), (block, np.arange(pieces))), shape=(blocks, pieces))
        rises = np.zeros(problem.costs.size + pieces + 1)
        rises[problem.costs.size : -1] = _SCALE / clients * slopes[kept, block]

        # Whole units where cells are whole; else what suits the solver's tolerances.
        size = float(self.unit if whole else max(problem.costs.mean(), 1.0))
        used = self.used / size

        def wide(cells: Any, others: Any = None, last: float = 0.0) -> Any:
            rows = cells.shape[0]
            others = coo_array((rows, pieces)) if others is None else others
            return hstack([cells, others, coo_array(np.full((rows, 1), last))])

        rows, limits = [wide(used)], [problem.capacity / size]
        if whole:
            rows.append(wide(-self.covered))
            limits.append(np.full(blocks, -1.0))
        if target is not None and objective == "worst":
            rows.append(wide(used, last=-1.0))
            limits.append(-problem.fixed / size)
        start, unit, goal = base, 1 / _SCALE, rises
        if target is not None:
            rows.append(coo_array(rises[None]))
            limits.append(np.array([_SCALE * (target - base)]))
            start, unit, goal = 0.0, size, np.zeros(rises.size)
            if objective == "total":
                start = float(problem.fixed.sum())
                goal[: problem.costs.size] = used.data
            else:
                goal[-1] = 1.0
        width = clients * widths[kept, block]
        upper = np.concatenate([problem.allowed.reshape(-1), width, [np.inf]])
        ties = wide(self.coverage, -split)
        rows = vstack(rows, format="csr")
        return System(start, unit, goal, upper, rows, np.concatenate(limits), ties)

    def relaxed(self, deadline: float, target: float | None) -> Relaxed | None:
        """The linear program, with a target of all clients' bytes; None if it does not end."""
        from scipy.optimize import linprog

        problem, clients = self.problem, self.problem.shares.size
        system = self._system(target, "total", whole=False)
        with silent_output():
            answer = linprog(
                system.goal,
                system.rows,
                system.limits,
                system.ties,
                np.zeros(system.ties.shape[0]),
                np.stack([np.zeros(system.upper.size), system.upper], axis=1),
                # The simplex method is the faster one but for the dense row of a target.
                method="highs-ds" if target is None else "highs-ipm",
                options={"time_limit": max(deadline - time.perf_counter(), 0.1)},
            )
        if answer.status != 0:
            return None
        prices = system.unit * clients * answer.eqlin.marginals
        fractions = answer.x[: problem.costs.size].reshape(problem.costs.shape)
        if target is None:
            return Relaxed(lower_bound(problem, prices), prices, 1.0, fractions)
        worth = -system.unit * _SCALE * min(float(answer.ineqlin.marginals[-1]), 0.0)
        bound = lower_bound(problem, prices, worth, 1.0) - worth * target
        return Relaxed(bound, prices, worth, fractions)

    def least_surrogate(self, known: Stage, deadline: float) -> Stage:
        """The least f₁, beginning with what is known.

        Beyond a gap of `_CLOSE` only so much is proven as takes little.
        """
        known = self._minimise(known, None, "total", deadline, _CLOSE)
        return self._minimise(known, None, "total", deadline, nodes=50, rounds=10)

    def least_memory(
        self, known: Stage, target: float, objective: Objective, deadline: float
    ) -> Stage:
        """The least bytes with f₁ at most `target`, beginning with what is known."""
        return self._minimise(known, target, objective, deadline)

    def _minimise(
        self,
        best: Stage,
        target: float | None,
        objective: Objective,
        deadline: float,
        gap: float = 0.0,
        nodes: int = 20_000,
        rounds: int = 100,
    ) -> Stage:
        """Solve, and add tangents where the solution lies, until value and bound meet.

        Nodes and rounds are counted, which unlike a clock ends at the same place every time.
        """
        problem = self.problem
        for _ in range(rounds):
            if best.gap <= max(gap, 1e-2 * SAME) or time.perf_counter() > deadline:
                break
            system = self._system(target, objective, whole=True)
            options = {"mip_rel_gap": gap, "node_limit": nodes}
            answer = milp(system, problem.costs.size, deadline, options)
            units = answer.mip_dual_bound
            if units is not None and math.isfinite(units):
                if target is not None:
                    units = math.ceil(units - 1e-6 * max(1.0, units * 1e-3))
                best = replace(best, bound=max(best.bound, system.start + system.unit * units))
            if answer.x is None:
                break
            matrix = answer.x[: problem.costs.size].reshape(problem.costs.shape) > 0.5
            value = problem.surrogate(matrix)
            if target is not None:
                value = problem.used(matrix, objective) if value <= target else math.inf
            if value < best.value and problem.admits(matrix):
                best = Stage(matrix, value, best.bound)
            if answer.status != 0:
                break
            self.add_tangents(problem.shares @ matrix)
        return best


def cover(problem: Problem, deadline: float) -> Bools:
    """A matrix with every block on one client within the budgets, bool [N, L].

    A mixed-integer program, which misses as few bytes in all as possible; to try first what is
    quicker is the caller's part.

    Raises:
        FedForwardError: there is none; the sentence names client, block and missing bytes.
    """
    from scipy.sparse import coo_array, eye_array, hstack

    clients, blocks = problem.costs.shape
    program = Program(problem)
    cells = problem.costs.size
    room = np.minimum(problem.budgets - problem.fixed, problem.costs.sum()) / program.unit
    missed = np.append(np.zeros(cells), np.ones(clients))
    system = System(
        start=0.0,
        unit=program.unit,
        goal=missed,
        upper=np.append(np.ones(cells), np.full(clients, np.inf)),
        rows=hstack([program.used / program.unit, -eye_array(clients)]),
        limits=room,
        ties=hstack([program.covered, coo_array((blocks, clients))]),
    )
    answer = milp(system, cells, deadline, {"mip_rel_gap": 0.0}, tied=1.0)
    if answer.x is None:
        raise FedForwardError(
            "No activation was found that has every block on some client; raise a client's budget."
        )
    matrix: Bools = answer.x[:cells].reshape(clients, blocks) > 0.5
    if problem.admits(matrix):
        return matrix
    excess = problem.memory(matrix) - problem.budgets
    client = int(excess.argmax())
    # A block whose absence makes the others fit, if there is one.
    costs = np.where(matrix[client], problem.costs[client], -1)
    enough = np.where(costs >= excess[client], costs, np.iinfo(np.int64).max)
    block = int(enough.argmin() if (costs >= excess[client]).any() else costs.argmax())
    raise problem.uncovered(block, client, int(excess[client]), beside=True)


def milp(
    system: System, whole: int, deadline: float, options: dict[str, float], tied: float = 0.0
) -> Any:
    """Solve a system whose first `whole` variables are integers, and whose ties are `tied`.

    `deadline` is one of `time.perf_counter`; `options` are those of `scipy.optimize.milp`. Returns
    its result, whose x is None if nothing was found.
    """
    from scipy import optimize

    with silent_output():
        return optimize.milp(
            system.goal,
            integrality=np.arange(system.goal.size) < whole,
            bounds=optimize.Bounds(0, system.upper),
            constraints=[
                optimize.LinearConstraint(system.rows, -np.inf, system.limits),
                optimize.LinearConstraint(system.ties, tied, tied),
            ],
            options={**options, "time_limit": max(deadline - time.perf_counter(), 0.1)},
        )


@contextlib.contextmanager
def silent_output() -> Iterator[None]:
    """Send what compiled code writes to file descriptor 1 nowhere, for the whole process.

    HiGHS reports some of its incumbents there, whatever it is told.
    """
    # Python's stream may be missing, closed or none of a file's.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:
        # There is no standard output to keep clean.
        yield
        return
    try:
        _flush_compiled()
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        # The solver's lines wait in the C library's buffer.
        _flush_compiled()
        os.dup2(kept, 1)
        os.close(kept)


def _flush_compiled() -> None:
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
