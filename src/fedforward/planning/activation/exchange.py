"""A local search: exchanges of blocks within a client and between two, which improve a matrix.

It begins with what is whole in the relaxation, or greedily with no block at all.
"""

import math
import time

import numpy as np
from numpy.typing import NDArray

from fedforward.planning.activation.problem import SAME, Bools, Floats, Ints, Problem

#: f₁ is at least 1: a gain below this is rounding, or not worth the time.
_LEAST = 1e-11
#: All subsets of 10 items, by their binary digits; the first 2**k rows are those of k items.
_SUBSETS = ((np.arange(1 << 10)[:, None] >> np.arange(10)) & 1).astype(np.float64)


def _knapsack(gains: Floats, costs: Ints, room: int) -> NDArray[np.intp]:
    """Places of items that fit and gain much; exact for equal costs.

    By gain per byte up to the first that does not fit; around that one all subsets are tried.
    """
    with np.errstate(divide="ignore"):
        order = np.argsort(-gains / costs, kind="stable")
    filled = np.cumsum(costs[order])
    end = int(np.searchsorted(filled, room, side="right"))
    if end == order.size or (costs == costs[0]).all():
        return order[:end]
    width = _SUBSETS.shape[1]
    begin = max(0, min(end - width // 2, order.size - width))
    core = order[begin : begin + width]
    sets = _SUBSETS[: 1 << core.size, : core.size]
    left = room - (int(filled[begin - 1]) if begin else 0)
    worth = np.where(sets @ costs[core].astype(np.float64) <= left, sets @ gains[core], -np.inf)
    return np.append(order[:begin], core[sets[int(worth.argmax())] > 0])


class Search:
    """A matrix within the budgets, improved in f₁ + byte_price · bytes for blocks.

    Attributes:
        matrix: bool [N, L]; a block that no client has counts with a high penalty.
    """

    def __init__(self, problem: Problem, matrix: Bools, byte_price: float = 0.0) -> None:
        self.problem = problem
        self.matrix = matrix.copy()
        # A last column stands for no block, so that adding and dropping are exchanges too.
        self.costs = np.pad(problem.costs, ((0, 0), (0, 1)))
        self.prices = byte_price * self.costs
        self.penalty = 1e6 * float((problem.weights / problem.shares.min()).sum())
        self.blocks = np.arange(problem.weights.size)
        self.coverage = problem.shares @ self.matrix
        self.counts = self.matrix.sum(axis=0)
        active = np.where(self.matrix, problem.costs, 0)
        self.room = problem.capacity - active.sum(axis=1)
        self.each = self._surrogates(self.coverage)

    def _surrogates(self, coverage: Floats) -> Floats:
        """Each block's part of f₁, with a penalty in place of infinity."""
        empty = coverage < 0.5 * self.problem.shares.min()
        parts = self.problem.surrogates(np.where(empty, 1.0, coverage))
        return np.where(empty, self.penalty, parts)

    @property
    def value(self) -> float:
        """f₁, infinite if a block is nowhere active."""
        return float(self.each.sum()) if self.counts.all() else math.inf

    @property
    def objective(self) -> float:
        """f₁ + byte_price · bytes for blocks."""
        return float(self.each.sum() + self.prices[:, :-1][self.matrix].sum())

    def polish(self, deadline: float, enough: float = -math.inf) -> None:
        """Exchange until nothing helps, or the objective is `enough`.

        The rounds are counted, so that large problems end in seconds without asking the clock.
        """
        order = np.argsort(self.problem.shares, kind="stable")
        clients = order.size
        # All pairs of few clients; of more those whose shares are near each other's in order;
        # and of very many none, because each client's own knapsack leaves little to gain.
        strides = [k for k in range(1, clients) if clients <= 24 or k.bit_count() == 1]
        if clients > 200:
            strides = []
        for _ in range(min(30, max(2, 600 // clients))):
            before = self.objective
            for client in range(clients):
                self._within(client)
            for stride in strides:
                if self.objective <= enough or time.perf_counter() > deadline:
                    break
                for first, second in zip(order[:-stride], order[stride:], strict=True):
                    self._between(int(first), int(second))
            after = self.objective
            if after > before * (1 - SAME) or after <= enough or time.perf_counter() > deadline:
                break

    def _within(self, client: int) -> None:
        """Choose a client's blocks anew with all others as they are: a knapsack."""
        problem, share = self.problem, self.problem.shares[client]
        active = self.matrix[client]
        kept = active & (self.counts == 1)
        others = np.where(active, self.coverage - share, self.coverage)
        others[kept] = 0.0
        gains = self._surrogates(others) - self._surrogates(others + share)
        gains -= self.prices[client, :-1]
        items = np.flatnonzero(problem.allowed[client] & ~kept & (gains > 0))
        costs = problem.costs[client]
        room = int(problem.capacity[client] - costs[kept].sum())
        row = kept.copy()
        row[items[_knapsack(gains[items], costs[items], room)]] = True
        if gains[row & ~kept].sum() > gains[active & ~kept].sum() + _LEAST:
            self._give(client, row)

    def _between(self, first: int, second: int) -> None:
        """Give one block of the first client for one of the second; either may be none."""
        rise = self.problem.shares[second] - self.problem.shares[first]
        none = self.matrix.shape[1]
        here, there = self.matrix[first], self.matrix[second]
        given = np.append(np.flatnonzero(here & ~there & self.problem.allowed[second]), none)
        taken = np.append(np.flatnonzero(there & ~here & self.problem.allowed[first]), none)
        up = np.append(self._surrogates(self.coverage + rise) - self.each, 0.0)
        down = np.append(self._surrogates(self.coverage - rise) - self.each, 0.0)
        dearer = self.prices[second] - self.prices[first]
        change = (up + dearer)[given][:, None] + (down - dearer)[taken]
        mine, theirs = self.costs[first], self.costs[second]
        change[mine[taken] - mine[given][:, None] > self.room[first]] = np.inf
        change[theirs[given][:, None] - theirs[taken] > self.room[second]] = np.inf
        best = int(change.argmin())
        if not change.flat[best] < -_LEAST:
            return
        give, take = given[best // taken.size], taken[best % taken.size]
        for client, gone, come in ((first, give, take), (second, take, give)):
            row = np.append(self.matrix[client], False)
            row[gone], row[come] = False, True
            self._give(client, row[:-1])

    def trim(self, target: float) -> None:
        """Drop what frees most bytes for its f₁ while f₁ stays at most `target`."""
        shares, costs = self.problem.shares[:, None], self.problem.costs
        dropped = True
        while dropped and self.value <= target:
            dropped = False
            droppable = self.matrix & (self.counts > 1) & (costs > 0)
            rest = np.where(droppable, self.coverage - shares, 1.0)
            loss = np.where(droppable, self.problem.surrogates(rest) - self.each, np.inf)
            possible = np.flatnonzero(self.value + loss <= target)
            worth = costs.flat[possible] / np.maximum(loss.flat[possible], 1e-12)
            # Losses grow with every drop, so only a part is taken by one reckoning.
            for cell in possible[np.argsort(-worth, kind="stable")[: 1 + possible.size // 50]]:
                client, block = divmod(int(cell), self.matrix.shape[1])
                before = self.matrix[client].copy()
                self._give(client, before & (self.blocks != block))
                if self.value <= target:
                    dropped = True
                else:
                    self._give(client, before)

    def _give(self, client: int, row: Bools) -> None:
        """Change a client's blocks; coverages are summed anew, so that no rounding piles up."""
        changed = np.flatnonzero(row != self.matrix[client])
        self.matrix[client] = row
        columns = self.matrix[:, changed]
        self.counts[changed] = columns.sum(axis=0)
        self.coverage[changed] = self.problem.shares @ columns
        self.room[client] = self.problem.capacity[client] - self.problem.costs[client][row].sum()
        self.each = self._surrogates(self.coverage)
