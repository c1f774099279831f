"""Equal shares, and to each client blocks of equal cost: exact by decomposition (Groenevelt 1991).

f₁ depends only on how many clients each block has, and is separable and convex in these counts.
"""

from bisect import bisect_left

import numpy as np

from fedforward.planning.activation.problem import Bools, Floats, Ints, Problem, Stage


def applies(problem: Problem) -> bool:
    """Whether this is such a problem, with room for every block."""
    room = problem.flat and problem.most_blocks.sum() >= problem.weights.size
    return problem.equal and bool(room)


def least_surrogate(problem: Problem) -> Stage:
    """The least f₁."""
    matrix = _matrix(problem, int(problem.most_blocks.sum()))
    value = problem.surrogate(matrix)
    return Stage(matrix, value, value)


def same_cost(problem: Problem) -> bool:
    """Whether every activation that can happen costs the same number of bytes."""
    costs = problem.costs[problem.most_blocks > 0, 0]
    return bool(costs.size and np.ptp(costs) == 0)


def least_total(problem: Problem, target: float) -> Stage:
    """The fewest activations whose f₁ is at most `target`, where they cost the same."""
    totals = range(problem.weights.size, int(problem.most_blocks.sum()))
    reached = bisect_left(totals, True, key=lambda total: _value(problem, total) <= target)
    matrix = _matrix(problem, totals.start + reached)
    used = problem.used(matrix, "total")
    return Stage(matrix, used, used)


def least_worst(problem: Problem, target: float, high: int) -> Stage:
    """The least cap on every client's bytes that reaches the target; `high` is one that does."""

    def reached(cap: int) -> bool:
        capped = problem.capped(cap)
        most = int(capped.most_blocks.sum())
        # Fewer places than blocks: some block would have no client.
        return most >= problem.weights.size and _value(capped, most) <= target

    low = int(problem.fixed.max())
    cap = low + bisect_left(range(low, high), True, key=reached)
    capped = problem.capped(cap)
    if same_cost(capped):
        return Stage(least_total(capped, target).matrix, cap, cap)
    return Stage(_matrix(capped, int(capped.most_blocks.sum())), cap, cap)


def _value(problem: Problem, total: int) -> float:
    counts = _least_counts(problem, total)
    return float(problem.surrogates(counts * problem.shares[0]).sum())


def _least_counts(problem: Problem, total: int) -> Ints:
    """Clients per block, int64 [L], that make f₁ least with at most `total` activations.

    What is possible are the counts whose s largest add up to at most Σ_i min(s, k_i) for every s
    (Gale and Ryser; k_i is what client i can have): a polymatroid. Relax all of these but the last;
    where the result breaks one most, it is tight in the optimum, and the problem falls apart.
    """
    blocks = problem.weights.size
    sizes = np.arange(blocks + 1)
    rank = np.minimum(sizes[:, None], problem.most_blocks).sum(axis=1)
    steps = _steps(problem)
    counts = np.zeros(blocks, np.int64)
    parts = [(np.arange(blocks), rank, min(total, int(rank[-1])))]
    while parts:
        members, rank, total = parts.pop()
        # Row by row, so that of equal steps the lower count comes first.
        rows = steps[:, members]
        taken = np.argsort(rows, axis=None, kind="stable")[:total] % members.size
        found = np.bincount(taken, minlength=members.size)
        order = np.argsort(-found, kind="stable")
        excess = np.cumsum(found[order]) - rank[1:]
        tight = int(excess.argmax()) + 1
        if excess[tight - 1] <= 0:
            counts[members] = found
            continue
        within = int(rank[tight])
        parts.append((members[order[:tight]], rank[: tight + 1], within))
        parts.append((members[order[tight:]], rank[tight:] - within, total - within))
    # Steps that gain nothing were dummies; to give them up keeps the counts possible.
    useful = np.maximum((steps < 0).sum(axis=0), 1)
    least: Ints = np.minimum(counts, useful)
    return least


def _steps(problem: Problem) -> Floats:
    """Change of f₁ by a block's n-th client, never positive, ascending in n, float64 [N, L]."""
    coverage = np.arange(1, problem.shares.size + 1)[:, None] * problem.shares[0]
    steps = np.diff(problem.surrogates(coverage), axis=0)
    steps = np.maximum.accumulate(np.minimum(steps, 0.0), axis=0)
    # The first client of a block is no choice.
    return np.vstack([np.full((1, steps.shape[1]), -np.inf), steps])


def _matrix(problem: Problem, total: int) -> Bools:
    """The best `total` activations: each block goes to the clients with most room left."""
    matrix = np.zeros(problem.costs.shape, bool)
    room = problem.most_blocks.copy()
    for block, count in enumerate(_least_counts(problem, total)):
        chosen = np.argsort(-room, kind="stable")[:count]
        matrix[chosen, block] = True
        room[chosen] -= 1
    if (room < 0).any():
        raise RuntimeError("no matrix has these counts")
    return matrix
