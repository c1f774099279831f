"""Mixed-integer programs of HiGHS for what is small, and its silence on the standard output."""

import contextlib
import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedforward.planning.activation.problem import SAME, Bools, Floats, Objective, Problem, Stage

#: A relative gap of f₁ that is worth little time to close.
CLOSE = 1e-6
#: The solver's tolerances are absolute, about 1e-6; objectives are multiplied by this before.
_SCALE = 1e4

#: A matrix with what lies below and above its products.
Rows = tuple[Any, Any, Any]


def run(
    goal: Floats,
    whole: int,
    upper: Floats,
    rows: list[Rows],
    deadline: float,
    options: Mapping[str, float],
) -> Any:
    """Minimise goal · x for 0 ≤ x ≤ upper, low ≤ matrix @ x ≤ high for each of the rows.

    The first `whole` variables are integers; `deadline` is one of `time.perf_counter`; `options`
    are those of `scipy.optimize.milp`. Returns its result, whose x is None if nothing was found.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    with silent_output():
        return milp(
            goal,
            integrality=np.arange(goal.size) < whole,
            bounds=Bounds(0, upper),
            constraints=[LinearConstraint(*row) for row in rows],
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


class Program:
    """f₁ from below by linear cuts on each block's coverage, refined where a solution lies.

    Variables: the cells of A, then a part of f₁ per block (times `_SCALE`), then the worst client's
    bytes. Between what n and n + 1 clients can give a block at most and at least, no coverage is
    possible: there the cut is the chord. With equal shares this is f₁ itself.
    """

    def __init__(self, problem: Problem) -> None:
        from scipy.sparse import block_diag

        self.problem = problem
        clients, blocks = problem.costs.shape
        self.cells = clients * blocks
        self.width = self.cells + blocks + 1
        self.unit = max(int(np.gcd.reduce(np.append(problem.fixed, problem.costs))), 1)
        self.upper = np.full(self.width, np.inf)
        self.upper[: self.cells] = problem.allowed.reshape(-1)
        costs = block_diag([row[None] for row in problem.costs // self.unit]).toarray()
        used = np.hstack([costs, np.zeros((clients, blocks + 1))])
        less_worst = used.copy()
        less_worst[:, -1] = -1.0
        covered = np.hstack([np.tile(np.eye(blocks), clients), np.zeros((blocks, blocks + 1))])
        self.rows: list[Rows] = [
            (used, -np.inf, problem.capacity // self.unit),
            (less_worst, -np.inf, -(problem.fixed // self.unit)),
            (covered, 1, np.inf),
        ]
        # What n clients can give a block at most, and n + 1 at least.
        least, most = problem.coverages
        for low, high, above in zip(least, most, np.vstack([least[1:], most[-1:]]), strict=True):
            if not problem.equal:
                middle = (np.minimum(low, high) + high) / 2
                self._cut(middle, middle)
            self._cut(high, above)

    def _cut(self, left: Floats, right: Floats) -> None:
        """Chords of each block's f₁ from a coverage to a larger one, else tangents between both."""
        problem = self.problem
        clients, blocks = problem.costs.shape
        right = np.where(np.isfinite(right), right, left)
        middle = (left + right) / 2
        apart = right - left > 1e-6 * left
        rise = problem.surrogates(right) - problem.surrogates(left)
        chord = rise / np.where(apart, right - left, 1.0)
        slope = np.where(apart, chord, problem.slopes - problem.weights / middle**2)
        start = np.where(apart, left, middle)
        level = problem.surrogates(start) - slope * start
        # part_b - slope · c_b ≥ level
        cells = np.zeros((blocks, clients, blocks))
        block = np.arange(blocks)
        cells[block, :, block] = -_SCALE * slope[:, None] * problem.shares
        matrix = np.hstack([cells.reshape(blocks, -1), np.eye(blocks), np.zeros((blocks, 1))])
        self.rows.append((matrix, _SCALE * level, np.inf))

    def least_surrogate(self, known: Stage, deadline: float) -> Stage:
        """The least f₁, beginning with what is known.

        Beyond a gap of `CLOSE` only so much is proven as takes little.
        """
        goal = np.zeros(self.width)
        goal[self.cells : -1] = 1.0
        value_of = self.problem.surrogate

        def unscaled(units: float) -> float:
            return units / _SCALE

        known = self._minimise(goal, [], known, value_of, unscaled, deadline, CLOSE)
        return self._minimise(goal, [], known, value_of, unscaled, deadline, nodes=50, rounds=10)

    def least_memory(
        self, known: Stage, target: float, objective: Objective, deadline: float
    ) -> Stage:
        """The least bytes with f₁ at most `target`, beginning with what is known."""
        goal = np.zeros(self.width)
        base = 0
        if objective == "total":
            goal[: self.cells] = self.problem.costs.reshape(-1) // self.unit
            base = int(self.problem.fixed.sum())
        else:
            goal[-1] = 1.0
        reach = np.zeros(self.width)
        reach[self.cells : -1] = 1.0

        def bytes_of(units: float) -> float:
            return base + self.unit * math.ceil(units - 1e-6 * max(1.0, units * 1e-3))

        def used(matrix: Bools) -> float:
            met = self.problem.surrogate(matrix) <= target
            return self.problem.used(matrix, objective) if met else math.inf

        limit = (reach, -np.inf, _SCALE * target)
        return self._minimise(goal, [limit], known, used, bytes_of, deadline)

    def _minimise(
        self,
        goal: Floats,
        more: list[Rows],
        best: Stage,
        value_of: Callable[[Bools], float],
        bound_of: Callable[[float], float],
        deadline: float,
        gap: float = 0.0,
        nodes: int = 20_000,
        rounds: int = 100,
    ) -> Stage:
        """Solve and cut where the solution lies, until value and bound meet but for the gap.

        Nodes and rounds are counted, which unlike a clock ends at the same place every time.
        """
        problem, options = self.problem, {"mip_rel_gap": gap, "node_limit": nodes}
        for _ in range(rounds):
            if best.gap <= max(gap, 1e-2 * SAME) or time.perf_counter() > deadline:
                break
            answer = run(goal, self.cells, self.upper, self.rows + more, deadline, options)
            bound, matrix = best.bound, best.matrix
            if answer.mip_dual_bound is not None:
                bound = max(bound, bound_of(float(answer.mip_dual_bound)))
            if answer.x is not None:
                matrix = answer.x[: self.cells].reshape(problem.costs.shape) > 0.5
            value = value_of(matrix) if problem.admits(matrix) else math.inf
            better = value < best.value
            best = Stage(matrix if better else best.matrix, min(value, best.value), bound)
            if answer.x is None or answer.status != 0:
                break
            coverage = problem.shares @ matrix
            self._cut(coverage, coverage)
        return best
