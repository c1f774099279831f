"""Which blocks of the model each client perturbs: heterogeneous block activation after ZorBA.

Of ZorBA (arXiv 2603.04436) only the abstract was available, which names the decision, its trade-off
between convergence and memory, and an ε-constraint lexicographic algorithm. The formulation here is
our own. Nothing in this module needs PyTorch.

With N clients, L blocks and the matrix A ∈ {0,1}^{N×L}, client i of share p_i and block b of weight
w_b and dimension d_b, the surrogate of slow convergence is

    f₁(A) = Σ_b w_b / c_b + λ Σ_i p_i (Σ_b A_ib d_b) / Σ_b d_b,    c_b = Σ_i A_ib p_i.

The variance of a block's update falls with its coverage c_b; the second term rises with the
dimension that a client perturbs. It equals λ Σ_b c_b d_b / Σ_b d_b, so that f₁ is a sum of convex
functions of one coverage each. Every block is active on some client, and fixed_i + Σ_b A_ib cost_ib
never exceeds client i's budget. First f₁ is made least, then the memory subject to
f₁ ≤ (1 + ε) min f₁.

What is exact, and what is certified:
- Equal shares and clients whose blocks cost the same: f₁ is separable and convex over the integer
  points of a polymatroid (Gale and Ryser), which decomposition solves exactly (Groenevelt 1991).
- Otherwise the continuous relaxation gives prices of coverage, and any prices give a lower bound
  for the integer problem; a rounding and exchanges of blocks give a matrix. The two meet closely
  when clients are many.
- If they do not and the problem is small, a mixed-integer program over tangents of 1/x closes the
  gap (with equal shares over chords between whole numbers of clients, which is the unary encoding).
The gaps that remain are reported.
"""

import contextlib
import ctypes
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import coo_array  # type: ignore[import-untyped]

from fedforward.errors import FedForwardError
from fedforward.units import format_bytes

Objective = Literal["total", "worst"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: A budget that binds nobody, in bytes.
UNLIMITED = 2**62
#: Surrogates that differ by less, relatively, count as the same.
SAME = 1e-9
#: Above so many decisions no mixed-integer program is tried: it would rarely end in time.
_SMALL = 400
#: A limit that, unlike a clock, stops a mixed-integer program at the same place every time.
_NODES = 20_000
#: The solver's tolerances are absolute, about 1e-6; objectives are multiplied by this before.
_SCALE = 1e4


# The problem and its answer -----------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """N clients with budgets, L blocks with costs.

    Attributes:
        shares: float64 [N], each client's part p_i in the average, > 0; brought to the sum 1.
        weights: float64 [L], how much each block matters, > 0; brought to the sum 1.
        dimensions: float64 [L], tuned parameters of each block, ≥ 0, not all 0.
        fixed: int64 [N], bytes that a client needs with no active block.
        costs: int64 [N, L], bytes that activating a block costs a client; may be 0.
        budgets: int64 [N], bytes that a client has; `UNLIMITED` if that does not matter.
        dimension_penalty: λ ≥ 0.
        client_names: N names for messages.
        block_names: L names for messages.

    Raises:
        FedForwardError: shapes disagree or a value is out of its range.
    """

    shares: Floats
    weights: Floats
    dimensions: Floats
    fixed: Ints
    costs: Ints
    budgets: Ints
    dimension_penalty: float = 0.1
    client_names: tuple[str, ...] = ()
    block_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        clients, blocks = np.size(self.shares), np.size(self.weights)
        if not clients or not blocks:
            raise FedForwardError("Block activation needs at least one client and one block.")
        for name, shape in {
            "shares": (clients,),
            "weights": (blocks,),
            "dimensions": (blocks,),
            "fixed": (clients,),
            "costs": (clients, blocks),
            "budgets": (clients,),
        }.items():
            number = _floats if name in ("shares", "weights", "dimensions") else _bytes
            object.__setattr__(self, name, number(name, getattr(self, name), shape))
        object.__setattr__(self, "shares", _positive_parts("shares", self.shares))
        object.__setattr__(self, "weights", _positive_parts("weights", self.weights))
        if not self.dimensions.any():
            raise FedForwardError("dimensions: all are 0; give each block's tuned parameters.")
        if not (math.isfinite(self.dimension_penalty) and self.dimension_penalty >= 0):
            raise FedForwardError(f"dimension_penalty is {self.dimension_penalty}; it must be ≥ 0.")
        for name, count, word in (
            ("client_names", clients, "client"),
            ("block_names", blocks, "block"),
        ):
            names = tuple(getattr(self, name)) or tuple(f"{word} {k}" for k in range(count))
            if len(names) != count:
                raise FedForwardError(f"{name} has {len(names)} names, there are {count}.")
            object.__setattr__(self, name, names)

    def surrogate(self, matrix: ArrayLike) -> float:
        """f₁ of an activation, bool [N, L]; infinite if it leaves a block without a client."""
        active = np.asarray(matrix, bool)
        coverage = self.shares @ active
        if not active.any(axis=0).all():
            return math.inf
        slopes = self.dimension_penalty * self.dimensions / self.dimensions.sum()
        return float((self.weights / coverage + slopes * coverage).sum())

    def memory(self, matrix: ArrayLike) -> Ints:
        """Bytes that each client needs for an activation, int64 [N]."""
        active: Ints = np.where(np.asarray(matrix, bool), self.costs, 0).sum(axis=1)
        return self.fixed + active

    def admits(self, matrix: ArrayLike) -> bool:
        """Whether every block is active somewhere and every client keeps to its budget."""
        active = np.asarray(matrix, bool)
        covered = bool(active.any(axis=0).all())
        return covered and bool((self.memory(active) <= self.budgets).all())


def _floats(name: str, values: ArrayLike, shape: tuple[int, ...]) -> Floats:
    array = np.array(values, np.float64)
    _check_shape(name, array.shape, shape)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise FedForwardError(f"{name} must be finite and not negative.")
    return array


def _bytes(name: str, values: ArrayLike, shape: tuple[int, ...]) -> Ints:
    raw = np.asarray(values)
    _check_shape(name, raw.shape, shape)
    if raw.dtype.kind not in "iu":
        raise FedForwardError(f"{name} must be whole numbers of bytes, not {raw.dtype}.")
    if (raw < 0).any() or (raw > UNLIMITED).any():
        raise FedForwardError(f"{name} must lie between 0 and 2**62 bytes.")
    # Sums of sizes are taken in 64 bits, and as floats that must stay exact.
    if name != "budgets" and raw.astype(np.float64).sum() >= 2**53:
        raise FedForwardError(f"{name} add up to more than 2**53 bytes.")
    return raw.astype(np.int64)


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise FedForwardError(f"{name} has shape {list(found)}; it must be {list(wanted)}.")


def _positive_parts(name: str, values: Floats) -> Floats:
    if not (values > 0).all():
        raise FedForwardError(f"{name} must be positive; leave out what has no part at all.")
    if np.ptp(values) <= 1e-12 * values.max():
        return np.full(values.size, 1.0 / values.size)
    parts: Floats = values / values.sum()
    return parts


@dataclass(frozen=True)
class Activation:
    """A solution and its certificates.

    Attributes:
        matrix: bool [N, L], which client perturbs which block.
        surrogate: f₁ of the matrix, at most (1 + epsilon) times `best_surrogate`.
        best_surrogate: the least f₁ found in the first stage.
        bound: a certified lower bound on min f₁.
        gap: (best_surrogate - bound) / bound; 0 is proven optimal.
        memory: int64 [N], bytes of each client, the fixed ones included.
        epsilon: what of f₁ was given up for memory, relatively.
        objective: "total" or "worst" memory is made least.
        memory_bound: bytes; a certified lower bound on the second stage's objective.
        memory_gap: (objective - memory_bound) / memory_bound; 0 is proven optimal.
        seconds: wall-clock time.
        coverage: float64 [L], c_b = Σ_i A_ib p_i.
    """

    matrix: Bools
    surrogate: float
    best_surrogate: float
    bound: float
    gap: float
    memory: Ints
    epsilon: float
    objective: Objective
    memory_bound: float
    memory_gap: float
    seconds: float
    shares: Floats = field(repr=False)

    @property
    def coverage(self) -> Floats:
        """The share of the clients that perturb each block, float64 [L]."""
        coverage: Floats = self.shares @ self.matrix
        return coverage

    @property
    def used(self) -> int:
        """The objective of the second stage: bytes of all clients, or of the worst one."""
        return _objective_of(self.memory, self.objective)


def _objective_of(memory: Ints, objective: Objective) -> int:
    return int(memory.sum() if objective == "total" else memory.max())


def _relative(value: float, bound: float) -> float:
    """The gap between a value and its lower bound, not below 0."""
    if value <= bound:
        return 0.0
    return (value - bound) / bound if bound > 0 else math.inf


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
    instance = _Instance.of(problem)
    first = _first_stage(problem, instance, begin + time_limit / 2)
    points: list[Activation] = []
    known = [first.matrix]
    for epsilon in epsilons:
        target = (1 + epsilon) * first.value * (1 + SAME)
        # The first point shares its limit with the first stage.
        deadline = begin + time_limit
        second = _second_stage(instance, first, target, objective, known, deadline)
        points.append(_activation(problem, first, second, float(epsilon), objective, begin))
        known.append(second.matrix)
        begin = time.perf_counter()
    return points


@dataclass(frozen=True)
class _Stage:
    """A stage's matrix, its objective and a lower bound on that."""

    matrix: Bools
    value: float
    bound: float


def _activation(
    problem: Problem,
    first: _Stage,
    second: _Stage,
    epsilon: float,
    objective: Objective,
    begin: float,
) -> Activation:
    if not problem.admits(second.matrix):
        raise RuntimeError("the activation found breaks a constraint")
    memory = problem.memory(second.matrix)
    used = _objective_of(memory, objective)
    return Activation(
        matrix=second.matrix,
        surrogate=problem.surrogate(second.matrix),
        best_surrogate=first.value,
        bound=first.bound,
        gap=_relative(first.value, first.bound),
        memory=memory,
        epsilon=epsilon,
        objective=objective,
        memory_bound=second.bound,
        memory_gap=_relative(used, second.bound),
        seconds=time.perf_counter() - begin,
        shares=problem.shares,
    )


# The instance as the algorithms see it ------------------------------------------------------------


@dataclass(frozen=True)
class _Instance:
    """Shares, convex functions of coverage, and what each client has left for blocks."""

    shares: Floats
    weights: Floats
    slopes: Floats
    costs: Ints
    fixed: Ints
    budgets: Ints

    @classmethod
    def of(cls, problem: Problem) -> "_Instance":
        slopes = problem.dimension_penalty * problem.dimensions / problem.dimensions.sum()
        return cls(
            problem.shares, problem.weights, slopes, problem.costs, problem.fixed, problem.budgets
        )

    def capped(self, most: int) -> "_Instance":
        """The same where no client may use more than `most` bytes."""
        budgets = np.minimum(self.budgets, most)
        return _Instance(self.shares, self.weights, self.slopes, self.costs, self.fixed, budgets)

    @cached_property
    def allowed(self) -> Bools:
        """Blocks that a client could afford alone, bool [N, L]."""
        allowed: Bools = self.costs <= (self.budgets - self.fixed)[:, None]
        return allowed

    @cached_property
    def capacity(self) -> Ints:
        """Bytes for blocks, int64 [N], less what no set of blocks could use."""
        costs = np.where(self.allowed, self.costs, 0)
        room = np.clip(self.budgets - self.fixed, 0, costs.sum(axis=1))
        step = np.maximum(np.gcd.reduce(costs, axis=1), 1)
        capacity: Ints = room // step * step
        return capacity

    @cached_property
    def equal(self) -> bool:
        """Whether coverage is a number of clients."""
        return bool(np.ptp(self.shares) == 0)

    @cached_property
    def flat(self) -> bool:
        """Whether to each client all blocks cost the same."""
        return bool((self.costs == self.costs[:, :1]).all())

    @cached_property
    def most_blocks(self) -> Ints:
        """How many blocks each client can have if they all cost it the same, int64 [N]."""
        cost = self.costs[:, 0]
        blocks = self.costs.shape[1]
        counts: Ints = np.where(cost > 0, self.capacity // np.maximum(cost, 1), blocks)
        return np.where(self.budgets >= self.fixed, counts, 0)

    @cached_property
    def groups(self) -> "_Groups":
        """Clients that nothing tells apart."""
        rows = np.column_stack([self.shares.view(np.int64), self.capacity, self.costs])
        _, first, members, sizes = np.unique(
            rows, axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        return _Groups(first, members.reshape(-1), sizes.astype(np.float64))

    def each(self, coverage: Floats) -> Floats:
        """w_b / c_b + λ_b c_b; the last axis is that of the blocks."""
        value: Floats = self.weights / coverage + self.slopes * coverage
        return value

    def value(self, matrix: Bools) -> float:
        """f₁, infinite if a block is nowhere active."""
        if not matrix.any(axis=0).all():
            return math.inf
        return float(self.each(self.shares @ matrix).sum())

    def used(self, matrix: Bools) -> Ints:
        """Bytes of each client, int64 [N]."""
        active: Ints = np.where(matrix, self.costs, 0).sum(axis=1)
        return self.fixed + active


@dataclass(frozen=True)
class _Groups:
    first: NDArray[np.intp]
    members: NDArray[np.intp]
    sizes: Floats


# What cannot be done ------------------------------------------------------------------------------


def _cover(problem: Problem, instance: _Instance, deadline: float) -> Bools:
    """A matrix with every block on one client within the budgets.

    Raises:
        FedForwardError: there is none; the sentence names client, block and missing bytes.
    """
    missing = problem.fixed - problem.budgets
    if (missing > 0).any():
        client = int(missing.argmax())
        raise FedForwardError(
            f"Client {problem.client_names[client]!r} cannot take part: with no active block it "
            f"needs {format_bytes(int(problem.fixed[client]))} and lacks "
            f"{format_bytes(int(missing[client]))}. Raise its budget or leave it out."
        )
    alone = missing[:, None] + problem.costs
    nearest = alone.argmin(axis=0)
    block = int(alone.min(axis=0).argmax())
    if alone[nearest[block], block] > 0:
        raise _uncovered(problem, block, int(nearest[block]), int(alone[nearest[block], block]))
    matrix = _greedy_cover(instance)
    return _least_excess(problem, instance, deadline) if matrix is None else matrix


def _greedy_cover(instance: _Instance) -> Bools | None:
    """The block with the fewest clients left first, each where most room stays."""
    matrix = np.zeros(instance.costs.shape, bool)
    room = instance.capacity.copy()
    open_blocks = np.ones(instance.weights.size, bool)
    while open_blocks.any():
        fits = instance.costs <= room[:, None]
        choices = np.where(open_blocks, fits.sum(axis=0), np.iinfo(np.int64).max)
        tied = np.flatnonzero(choices == choices.min())
        # Of equally scarce blocks the dearest first, as in packing.
        block = int(tied[instance.costs[:, tied].min(axis=0).argmax()])
        if not choices[block]:
            return None
        left = np.where(fits[:, block], room - instance.costs[:, block], -1)
        client = int(left.argmax())
        matrix[client, block] = True
        room[client] -= instance.costs[client, block]
        open_blocks[block] = False
    return matrix


def _least_excess(problem: Problem, instance: _Instance, deadline: float) -> Bools:
    """A cover by mixed-integer programming, which misses as few bytes in all as possible."""
    clients, blocks = problem.costs.shape
    room = problem.budgets - problem.fixed
    unit = max(int(np.gcd.reduce(problem.costs, axis=None)), 1)
    matrix_part = clients * blocks
    cell = np.arange(matrix_part)
    bytes_rows = coo_array(
        (
            np.append(problem.costs.reshape(-1) // unit, -np.ones(clients)),
            (
                np.append(cell // blocks, np.arange(clients)),
                np.append(cell, matrix_part + np.arange(clients)),
            ),
        ),
        shape=(clients, matrix_part + clients),
    )
    block_rows = coo_array(
        (np.ones(matrix_part), (cell % blocks, cell)), shape=(blocks, matrix_part + clients)
    )
    result = _run(
        np.append(np.zeros(matrix_part), np.ones(clients)),
        integrality=np.append(np.ones(matrix_part), np.zeros(clients)),
        bounds=Bounds(0, np.append(np.ones(matrix_part), np.full(clients, np.inf))),
        constraints=[
            LinearConstraint(bytes_rows, -np.inf, np.minimum(room, problem.costs.sum()) / unit),
            LinearConstraint(block_rows, 1, 1),
        ],
        options={"time_limit": max(deadline - time.perf_counter(), 0.1), "mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise FedForwardError(
            "No activation was found that has every block on some client; raise a client's budget."
        )
    matrix: Bools = result.x[:matrix_part].reshape(clients, blocks) > 0.5
    excess = np.where(matrix, problem.costs, 0).sum(axis=1) - room
    if (excess <= 0).all() and matrix.any(axis=0).all():
        return matrix
    client = int(excess.argmax())
    # A block whose absence makes the others fit, if there is one.
    costs = np.where(matrix[client], problem.costs[client], -1)
    enough = np.where(costs >= excess[client], costs, np.iinfo(np.int64).max)
    block = int(enough.argmin() if (costs >= excess[client]).any() else costs.argmax())
    raise _uncovered(problem, block, client, int(excess[client]), beside=True)


def _uncovered(
    problem: Problem, block: int, client: int, missing: int, beside: bool = False
) -> FedForwardError:
    where = " in addition to the others" if beside else ""
    return FedForwardError(
        f"Block {problem.block_names[block]!r} cannot be active on any client{where}: client "
        f"{problem.client_names[client]!r} comes nearest and lacks {format_bytes(missing)}. Raise "
        "its budget, or choose a smaller model or a lower cost of an active block."
    )


# Equal shares, and blocks of equal cost: exact by decomposition -----------------------------------


def _least_counts(instance: _Instance, total: int) -> Ints:
    """Clients per block, int64 [L], that make f₁ least with at most `total` activations.

    What is possible are the counts whose s largest add up to at most Σ_i min(s, k_i) for every s
    (Gale and Ryser; k_i is what client i can have): a polymatroid. Relax all of these but the last;
    where the result breaks one most, it is tight in the optimum, and the problem falls apart.
    """
    blocks = instance.costs.shape[1]
    sizes = np.arange(blocks + 1)
    rank = np.minimum(sizes[:, None], instance.most_blocks).sum(axis=1)
    steps = _steps(instance)
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


def _steps(instance: _Instance) -> Floats:
    """Change of f₁ by a block's n-th client, never positive, ascending in n, float64 [N, L]."""
    coverage = np.arange(1, instance.shares.size + 1)[:, None] * instance.shares[0]
    steps = np.diff(instance.each(coverage), axis=0)
    steps = np.maximum.accumulate(np.minimum(steps, 0.0), axis=0)
    # The first client of a block is no choice.
    return np.vstack([np.full((1, steps.shape[1]), -np.inf), steps])


def _place(instance: _Instance, counts: Ints) -> Bools:
    """A matrix with these counts: each block goes to the clients with most room left."""
    matrix = np.zeros(instance.costs.shape, bool)
    room = instance.most_blocks.copy()
    for block in range(counts.size):
        chosen = np.argsort(-room, kind="stable")[: counts[block]]
        matrix[chosen, block] = True
        room[chosen] -= 1
    if (room < 0).any():
        raise RuntimeError("no matrix has these counts")
    return matrix


def _exact_value(instance: _Instance, total: int) -> float:
    counts = _least_counts(instance, total)
    return float(instance.each(counts * instance.shares[0]).sum())


def _exact_total(instance: _Instance, target: float) -> _Stage:
    """The fewest activations that reach the target."""
    low, high = instance.weights.size, int(instance.most_blocks.sum())
    while low < high:
        middle = (low + high) // 2
        if _exact_value(instance, middle) <= target:
            high = middle
        else:
            low = middle + 1
    matrix = _place(instance, _least_counts(instance, low))
    used = float(instance.used(matrix).sum())
    return _Stage(matrix, used, used)


def _exact_worst(instance: _Instance, target: float, high: int) -> _Stage:
    """The least cap on every client that reaches the target; `high` is one that does."""
    low = int(instance.fixed.max())
    while low < high:
        middle = (low + high) // 2
        capped = instance.capped(middle)
        most = int(capped.most_blocks.sum())
        # Fewer places than blocks: some block would have no client.
        if most >= instance.weights.size and _exact_value(capped, most) <= target:
            high = middle
        else:
            low = middle + 1
    capped = instance.capped(high)
    total = int(capped.most_blocks.sum())
    if _same_cost(capped):
        return _Stage(_exact_total(capped, target).matrix, high, high)
    return _Stage(_place(capped, _least_counts(capped, total)), high, high)


def _same_cost(instance: _Instance) -> bool:
    """Whether every activation that can happen costs the same."""
    costs = instance.costs[instance.most_blocks > 0, 0]
    return bool(costs.size and np.ptp(costs) == 0)


# The continuous relaxation and the bounds that prices give ----------------------------------------


@dataclass(frozen=True)
class _Relaxed:
    """A near-optimal point of the relaxation."""

    fractions: Floats  # [N, L], between 0 and 1
    coverage: Floats  # [L]
    prices: Floats  # [L], what a unit of coverage is worth


def _relax(instance: _Instance, byte_price: float = 0.0) -> _Relaxed:
    """Minimise f₁ + byte_price · bytes over fractions of activations, each in [0, 1].

    A primal-dual interior-point method. Within a client the Hessian is a diagonal plus one row, its
    budget; between clients only the L coverages couple. So a step costs O(N L²) with one [L, L]
    system, and clients that nothing tells apart count as one. Some 40 steps reach a relative 1e-7;
    more is not needed, because the certificate is computed apart, from the prices.
    """
    groups = instance.groups
    first, sizes = groups.first, groups.sizes
    free = instance.allowed[first]
    costs = np.where(free, instance.costs[first], 0).astype(np.float64)
    capacity = instance.capacity[first].astype(np.float64)
    binding = costs.sum(axis=1) > capacity
    row = np.where(binding[:, None], costs / np.maximum(capacity, 1)[:, None], 0.0)
    state = _Interior(
        pull=np.where(free, (sizes * instance.shares[first])[:, None], 0.0),
        linear=byte_price * sizes[:, None] * costs,
        row=row,
        free=free,
        weights=instance.weights,
        slopes=instance.slopes,
    )
    for _ in range(100):
        if not state.step():
            break
    coverage = state.coverage
    prices = instance.weights / coverage**2 - instance.slopes
    fractions = np.where(free, state.x, 0.0)[groups.members]
    return _Relaxed(fractions, coverage, prices)


class _Interior:
    """The iterate of the interior-point method: x in (0, 1), slack of budgets, and multipliers."""

    def __init__(
        self,
        pull: Floats,
        linear: Floats,
        row: Floats,
        free: Bools,
        weights: Floats,
        slopes: Floats,
    ) -> None:
        self.pull, self.linear, self.row, self.free = pull, linear, row, free
        self.weights, self.slopes = weights, slopes
        start = np.minimum(0.5, 0.5 / np.maximum(row.sum(axis=1), 1e-300))
        self.x = np.repeat(start[:, None], row.shape[1], axis=1)
        self.slack = 1.0 - (row * self.x).sum(axis=1)
        self.pairs = 2 * int(free.sum()) + row.shape[0]
        centre = self.value / self.pairs
        self.lower, self.upper = centre / self.x, centre / (1.0 - self.x)
        self.multiplier = centre / self.slack

    @property
    def coverage(self) -> Floats:
        coverage: Floats = (self.pull * self.x).sum(axis=0)
        return coverage

    @property
    def value(self) -> float:
        coverage = self.coverage
        curved = self.weights / coverage + self.slopes * coverage
        return float(curved.sum() + (self.linear * self.x).sum())

    def step(self) -> bool:
        """One predictor-corrector step (Mehrotra 1992); False once there is nothing to gain."""
        rest = 1.0 - self.x
        values = (self.x, rest, self.slack, self.lower, self.upper, self.multiplier)
        gap = self._gap(values)
        if gap < 3e-8 * self.value:
            return False
        solver = self._solver()
        ahead = self._direction(solver, 0.0, (0.0, 0.0, 0.0))
        length = _longest(values, ahead)
        reached = tuple(value + length * move for value, move in zip(values, ahead, strict=True))
        # Where the predictor gets far, the central path needs little attention.
        centring = max((self._gap(reached) / gap) ** 3, 1e-3)
        bends = tuple(ahead[k] * ahead[k + 3] for k in range(3))
        moves = self._direction(solver, centring * gap / self.pairs, bends)
        length = _longest(values, moves)
        if not length > 1e-4:
            return False
        self.x = self.x + length * moves[0]
        self.slack = self.slack + length * moves[2]
        self.lower = self.lower + length * moves[3]
        self.upper = self.upper + length * moves[4]
        self.multiplier = self.multiplier + length * moves[5]
        return True

    def _gap(self, values: Sequence[Floats]) -> float:
        """Σ value · multiplier, which is the duality gap."""
        x, rest, slack, lower, upper, multiplier = values
        products = np.where(self.free, lower * x + upper * rest, 0.0).sum()
        return float(products + (multiplier * slack).sum())

    def _direction(
        self, solver: "_Solver", centre: float, bends: Sequence[Floats | float]
    ) -> tuple[Floats, ...]:
        """Changes of x, 1 - x, slack and their multipliers towards products of `centre`."""
        x, rest, row = self.x, 1.0 - self.x, self.row
        to_lower, to_upper = (centre - bends[0]) / x, (centre - bends[1]) / rest
        to_slack = (centre - bends[2]) / self.slack
        gradient = self.pull * (self.slopes - self.weights / self.coverage**2) + self.linear
        barrier = to_upper - to_lower + to_slack[:, None] * row
        change = solver.solve(-np.where(self.free, gradient + barrier, 0.0))
        moved = (row * change).sum(axis=1)
        lower = to_lower - self.lower - self.lower / x * change
        upper = to_upper - self.upper + self.upper / rest * change
        multiplier = to_slack - self.multiplier + self.multiplier / self.slack * moved
        return change, -change, -moved, lower, upper, multiplier

    def _solver(self) -> "_Solver":
        diagonal = self.lower / self.x + self.upper / (1.0 - self.x)
        inverse = np.where(self.free, 1.0 / diagonal, 0.0)
        curvature = 2.0 * self.weights / self.coverage**3
        return _Solver(self.pull, self.row, self.multiplier / self.slack, inverse, curvature)


class _Solver:
    """Systems with the matrix: diagonal + one row per client + curvature of the coverages."""

    def __init__(
        self, pull: Floats, row: Floats, ratio: Floats, inverse: Floats, curvature: Floats
    ) -> None:
        self.pull, self.row, self.inverse = pull, row, inverse
        self.weighted = inverse * row
        self.factor = ratio / (1.0 + ratio * (row * self.weighted).sum(axis=1))
        coupled = pull * self.weighted * np.sqrt(self.factor)[:, None]
        self.system = -coupled.T @ coupled
        diagonal = np.diag_indices_from(self.system)
        self.system[diagonal] += (pull**2 * inverse).sum(axis=0) + 1.0 / curvature

    def solve(self, right: Floats) -> Floats:
        """The solution for one right-hand side, float64 [clients, L]."""
        alone = self._within_clients(right)
        force = np.linalg.solve(self.system, (self.pull * alone).sum(axis=0))
        return alone - self._within_clients(self.pull * force)

    def _within_clients(self, vectors: Floats) -> Floats:
        scaled = self.inverse * vectors
        shared = self.factor * (self.row * scaled).sum(axis=1)
        solved: Floats = scaled - self.weighted * shared[:, None]
        return solved


def _longest(values: Sequence[Floats], moves: Sequence[Floats]) -> float:
    """The longest step, at most 1, that keeps all values positive."""
    pairs = zip(values, moves, strict=True)
    shrink = max(float((-move / value).max()) for value, move in pairs)
    return min(1.0, 0.99 / shrink) if shrink > 0 else 1.0


def _dual(
    instance: _Instance, prices: Floats, byte_price: float = 0.0, whole: bool = False
) -> float:
    """A lower bound on f₁ + byte_price · bytes for blocks over all activations, for any prices.

    Σ_b min_c (g_b(c) + y_b c) - Σ_i max {Σ_b (p_i y_b - byte_price cost_ib) A_ib}: coverage is
    bought at the prices y, and each client sells what its budget allows. The client's maximum is
    taken over fractions, which only lowers the bound, or with `whole` nearly over whole blocks.
    """
    gains = instance.shares[:, None] * prices - byte_price * instance.costs
    gains = np.where(instance.allowed, np.maximum(gains, 0.0), 0.0)
    sold = _sold(instance, gains)
    if whole and not instance.flat:
        sold = _sold_whole(instance, gains, sold)
    return _bought(instance, prices) - float(sold.sum())


def _bought(instance: _Instance, prices: Floats) -> float:
    """Σ_b min_c (w_b / c + (λ_b + y_b) c) over the coverages that are possible."""
    most = instance.shares @ instance.allowed
    if not most.all():
        return math.inf
    if instance.equal:
        counts = np.arange(1, instance.shares.size + 1)[:, None]
        table = instance.each(counts * instance.shares[0]) + counts * instance.shares[0] * prices
        possible = counts <= instance.allowed.sum(axis=0)
        return float(np.where(possible, table, np.inf).min(axis=0).sum())
    least = np.where(instance.allowed, instance.shares[:, None], np.inf).min(axis=0)
    slope = instance.slopes + prices
    with np.errstate(divide="ignore"):
        best = np.sqrt(instance.weights / np.maximum(slope, 0.0))
    coverage = np.clip(best, least, most)
    return float((instance.each(coverage) + prices * coverage).sum())


def _sold(instance: _Instance, gains: Floats) -> Floats:
    """Each client's best fractional knapsack, float64 [N]."""
    costs = instance.costs.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(gains > 0, gains / costs, 0.0)
    order = np.argsort(-density, axis=1, kind="stable")
    gains = np.take_along_axis(gains, order, axis=1)
    # What gains nothing is not taken, whatever it costs.
    costs = np.where(gains > 0, np.take_along_axis(costs, order, axis=1), 0.0)
    before = np.cumsum(costs, axis=1) - costs
    left = instance.capacity[:, None] - before
    part = np.where(costs > 0, np.clip(left / np.maximum(costs, 1.0), 0.0, 1.0), 1.0)
    sold: Floats = (part * gains).sum(axis=1)
    return sold


def _sold_whole(instance: _Instance, gains: Floats, fractional: Floats) -> Floats:
    """An upper bound on each client's best knapsack of whole blocks, float64 [N].

    Either the best set differs from the fractional one only within the core, where all subsets are
    tried, or it differs in another item, and then it loses that item's distance from break-even.
    """
    sold = fractional.copy()
    for client, room in enumerate(instance.capacity.tolist()):
        items = np.flatnonzero(gains[client])
        costs = instance.costs[client, items]
        if costs.sum() <= room:
            continue
        taken = _taken(gains[client, items], costs, room)
        best = float(gains[client, items[taken.places]].sum())
        outside = np.ones(items.size, bool)
        outside[taken.core] = False
        losses = np.abs(gains[client, items] - taken.density * costs)[outside]
        most = fractional[client] - losses.min() if losses.size else best
        sold[client] = min(sold[client], max(best, float(most)) + 1e-15)
    return sold


# Rounding and exchanges ---------------------------------------------------------------------------


def _round(instance: _Instance, fractions: Floats) -> Bools:
    """A matrix within the budgets near the fractions.

    Clients of large shares come first; what one has too much or too little of a block is passed on
    to the next ones, as in error diffusion.
    """
    matrix = np.zeros(fractions.shape, bool)
    owed = np.zeros(fractions.shape[1])
    for client in np.argsort(-instance.shares, kind="stable"):
        share = instance.shares[client]
        wished = fractions[client] + owed / share
        wished[~instance.allowed[client]] = -np.inf
        order = np.argsort(-wished, kind="stable")
        count = int(np.floor(fractions[client].sum() + 0.5))
        room = instance.capacity[client]
        for block in order[: max(count, 1)]:
            if instance.allowed[client, block] and instance.costs[client, block] <= room:
                matrix[client, block] = True
                room -= instance.costs[client, block]
        owed += share * (fractions[client] - matrix[client])
    return matrix


@dataclass(frozen=True)
class _Taken:
    """A knapsack's items, those among which all subsets were tried, and the break-even density."""

    places: NDArray[np.intp]
    core: NDArray[np.intp]
    density: float


def _knapsack(gains: Floats, costs: Ints, room: int) -> NDArray[np.intp]:
    """Places of a set of items that fits and gains much; exact for equal costs."""
    if not costs.size:
        return np.arange(0)
    if (costs == costs[0]).all():
        end = costs.size if not costs[0] else room // int(costs[0])
        return np.argsort(-gains, kind="stable")[:end]
    return np.arange(costs.size) if costs.sum() <= room else _taken(gains, costs, room).places


def _taken(gains: Floats, costs: Ints, room: int) -> _Taken:
    """Items that gain, by gain per byte, up to the first that does not fit; there is one.

    The items around that one are chosen by trying all their subsets.
    """
    with np.errstate(divide="ignore"):
        order = np.argsort(-gains / costs, kind="stable")
    filled = np.cumsum(costs[order])
    end = int(np.searchsorted(filled, room, side="right"))
    width = _CORE.shape[1]
    begin = max(0, min(end - width // 2, order.size - width))
    core = order[begin : begin + width]
    sets = _CORE[: 1 << core.size, : core.size]
    left = room - (int(filled[begin - 1]) if begin else 0)
    worth = np.where(sets @ costs[core].astype(np.float64) <= left, sets @ gains[core], -np.inf)
    places = np.append(order[:begin], core[sets[int(worth.argmax())] > 0])
    return _Taken(places, core, float(gains[order[end]] / costs[order[end]]))


#: All subsets of 12 items, by their binary digits; the first 2**k rows are those of k items.
_CORE = ((np.arange(1 << 12)[:, None] >> np.arange(12)) & 1).astype(np.float64)


class _Search:
    """A matrix that exchanges of blocks improve, in f₁ + byte_price · bytes."""

    def __init__(self, instance: _Instance, matrix: Bools, byte_price: float = 0.0) -> None:
        self.instance = instance
        self.matrix = matrix.copy()
        # A last column stands for no block, so that adding and dropping are exchanges too.
        clients = matrix.shape[0]
        self.costs = np.hstack([instance.costs, np.zeros((clients, 1), np.int64)])
        self.prices = byte_price * self.costs
        self.penalty = 1e6 * float((instance.weights / instance.shares.min()).sum())
        # f₁ is at least 1: a gain below this is rounding, or with many cells not worth the time.
        self.least = 1e-12 if matrix.size <= _SMALL else 1e-10
        self.recount()

    def recount(self) -> None:
        """Coverage and bytes from the matrix, without what additions left behind."""
        self.coverage = self.instance.shares @ self.matrix
        self.counts = self.matrix.sum(axis=0)
        self.room = self.instance.capacity - np.where(self.matrix, self.instance.costs, 0).sum(
            axis=1
        )
        self.each = self.value_of(self.coverage)

    def value_of(self, coverage: Floats) -> Floats:
        """Each block's part of f₁, with a penalty in place of infinity."""
        empty = coverage < 0.5 * self.instance.shares.min()
        value = self.instance.each(np.where(empty, 1.0, coverage))
        return np.where(empty, self.penalty, value)

    @property
    def value(self) -> float:
        """f₁, infinite if a block is nowhere active."""
        return float(self.each.sum()) if self.counts.all() else math.inf

    @property
    def objective(self) -> float:
        return float(self.each.sum() + self.prices[:, :-1][self.matrix].sum())

    def polish(self, rounds: int, deadline: float, enough: float = -math.inf) -> None:
        """Exchange until nothing helps, or the objective is `enough`."""
        order = np.argsort(self.instance.shares, kind="stable")
        clients = order.size
        # All pairs of few clients; of many those whose shares are near each other's in order.
        strides = range(1, clients) if clients <= 24 else [1 << k for k in range(20)]
        if clients > 200 and not self.instance.flat:
            # Each client's own knapsack leaves little to gain between so many.
            strides = []
        for _ in range(rounds):
            before = self.objective
            for client in range(clients):
                self._within(client)
            for stride in strides:
                if stride >= clients or self.objective <= enough:
                    break
                pairs = np.column_stack([order[:-stride], order[stride:]])
                for first, second in pairs[self._promising(pairs)]:
                    self._between(int(first), int(second))
                if time.perf_counter() > deadline:
                    break
            self.recount()
            after = self.objective
            if after > before * (1 - SAME) or after <= enough or time.perf_counter() > deadline:
                break

    def _promising(self, pairs: NDArray[np.intp]) -> Bools:
        """Which pairs [P, 2] of clients might exchange with gain, were there no budgets."""
        allowed, shares = self.instance.allowed, self.instance.shares
        first, second = pairs.T
        rise = (shares[second] - shares[first])[:, None]
        dearer = (self.prices[second] - self.prices[first])[:, :-1]
        here, there = self.matrix[first], self.matrix[second]
        up = self.value_of(self.coverage + rise) - self.each + dearer
        down = self.value_of(self.coverage - rise) - self.each - dearer
        giving = np.where(here & ~there & allowed[second], up, 0.0).min(axis=1)
        taking = np.where(there & ~here & allowed[first], down, 0.0).min(axis=1)
        gaining: Bools = np.minimum(giving, 0.0) + np.minimum(taking, 0.0) < -self.least
        return gaining

    def _within(self, client: int) -> None:
        """Choose a client's blocks anew with all others as they are: a knapsack."""
        instance, share = self.instance, self.instance.shares[client]
        active = self.matrix[client]
        kept = active & (self.counts == 1)
        others = np.where(active, self.coverage - share, self.coverage)
        others[kept] = 0.0
        gains = self.value_of(others) - self.value_of(others + share) - self.prices[client, :-1]
        items = np.flatnonzero(instance.allowed[client] & ~kept & (gains > 0))
        costs = instance.costs[client]
        room = instance.capacity[client] - costs[kept].sum()
        row = kept.copy()
        row[items[_knapsack(gains[items], costs[items], int(room))]] = True
        if gains[row & ~kept].sum() <= gains[active & ~kept].sum() + self.least:
            return
        for block in np.flatnonzero(row != active):
            self._set(client, int(block), bool(row[block]))

    def _between(self, first: int, second: int) -> None:
        """Give one block of the first client for one of the second; either may be none."""
        rise = self.instance.shares[second] - self.instance.shares[first]
        none = self.matrix.shape[1]
        here, there = self.matrix[first], self.matrix[second]
        given = np.append(np.flatnonzero(here & ~there & self.instance.allowed[second]), none)
        taken = np.append(np.flatnonzero(there & ~here & self.instance.allowed[first]), none)
        up = np.append(self.value_of(self.coverage + rise) - self.each, 0.0)
        down = np.append(self.value_of(self.coverage - rise) - self.each, 0.0)
        dearer = self.prices[second] - self.prices[first]
        giving, taking = (up + dearer)[given], (down - dearer)[taken]
        if giving.min() + taking.min() >= -self.least:
            return
        change = giving[:, None] + taking
        mine, theirs = self.costs[first], self.costs[second]
        change[mine[taken] - mine[given][:, None] > self.room[first]] = np.inf
        change[theirs[given][:, None] - theirs[taken] > self.room[second]] = np.inf
        best = int(change.argmin())
        if not change.flat[best] < -self.least:
            return
        give, take = int(given[best // taken.size]), int(taken[best % taken.size])
        self.room[first] += mine[give] - mine[take]
        self.room[second] += theirs[take] - theirs[give]
        for block, sign in ((give, 1), (take, -1)):
            if block != none:
                self.matrix[first, block] = sign < 0
                self.matrix[second, block] = sign > 0
                self._shift(block)

    def trim(self, target: float) -> None:
        """Drop what gives most bytes for its f₁ while f₁ stays at most `target`."""
        shares, costs = self.instance.shares[:, None], self.instance.costs
        while self.value <= target:
            droppable = self.matrix & (self.counts > 1) & (costs > 0)
            rest = np.where(droppable, self.coverage - shares, 1.0)
            loss = np.where(droppable, self.instance.each(rest) - self.each, np.inf)
            possible = np.flatnonzero(self.value + loss <= target)
            worth = costs.flat[possible] / np.maximum(loss.flat[possible], 1e-12)
            # Losses grow with every drop, so only a part is taken by one reckoning.
            chosen = possible[np.argsort(-worth, kind="stable")[: 1 + possible.size // 50]]
            for cell in chosen:
                client, block = divmod(int(cell), self.matrix.shape[1])
                rest_one = self.coverage[block] - self.instance.shares[client]
                if self.counts[block] == 1:
                    continue
                if self.value + self._one(block, rest_one) - self.each[block] <= target:
                    self._set(client, block, False)
            if not chosen.size:
                break

    def extend(self, target: float) -> None:
        """Add what gives most f₁ for its bytes until f₁ is at most `target`, if that can be."""
        shares, costs = self.instance.shares[:, None], self.instance.costs
        while self.value > target:
            addable = ~self.matrix & self.instance.allowed & (costs <= self.room[:, None])
            gain = np.where(addable, self.each - self.value_of(self.coverage + shares), 0.0)
            worth = gain / np.maximum(costs, 1)
            client, block = np.unravel_index(int(worth.argmax()), worth.shape)
            if not gain[client, block] > 0:
                return
            self._set(int(client), int(block), True)

    def _one(self, block: int, coverage: float) -> float:
        """One block's part of f₁."""
        instance = self.instance
        return float(instance.weights[block] / coverage + instance.slopes[block] * coverage)

    def _set(self, client: int, block: int, active: bool) -> None:
        sign = 1 if active else -1
        self.matrix[client, block] = active
        self.counts[block] += sign
        self.room[client] -= sign * self.costs[client, block]
        self._shift(block)

    def _shift(self, block: int) -> None:
        """One block's coverage anew, exactly, after its column has changed."""
        coverage = float(self.instance.shares @ self.matrix[:, block])
        self.coverage[block] = coverage
        self.each[block] = self._one(block, coverage) if coverage else self.penalty


# The two stages -----------------------------------------------------------------------------------


def _first_stage(problem: Problem, instance: _Instance, deadline: float) -> _Stage:
    """The least f₁ and a lower bound on it."""
    cover = _cover(problem, instance, deadline)
    if instance.equal and instance.flat:
        counts = _least_counts(instance, int(instance.most_blocks.sum()))
        matrix = _place(instance, counts)
        value = instance.value(matrix)
        return _Stage(matrix, value, value)
    relaxed = _relax(instance)
    bound = _dual(instance, relaxed.prices, whole=True)
    enough = bound * (1 + _enough(cover))
    best = _searched(instance, [_round(instance, relaxed.fractions), cover], enough, deadline)
    stage = _Stage(best, instance.value(best), bound)
    if _relative(stage.value, bound) > SAME and best.size <= _SMALL:
        stage = _Program(instance).first(stage, deadline)
    return _Stage(stage.matrix, stage.value, min(stage.bound, stage.value))


def _searched(
    instance: _Instance, starts: Sequence[Bools], enough: float, deadline: float
) -> Bools:
    """The best of the starts after exchanges; large instances take the first that covers all."""
    best: Bools | None = None
    for start in starts:
        search = _Search(instance, start)
        search.polish(_rounds(instance), deadline, enough)
        if best is None or search.value < instance.value(best):
            best = search.matrix
        if math.isfinite(search.value) and best.size > _SMALL:
            break
    assert best is not None
    return best


def _enough(matrix: Bools) -> float:
    """The gap at which exchanges end; a small instance goes on for an exact answer."""
    return SAME if matrix.size <= _SMALL else 1e-7


def _rounds(instance: _Instance) -> int:
    """Rounds of exchanges, so that large instances end in seconds by count, not by the clock."""
    clients = instance.shares.size
    if clients <= 50:
        return 30
    return 6 if clients <= 200 else 2


def _second_stage(
    instance: _Instance,
    first: _Stage,
    target: float,
    objective: Objective,
    known: Sequence[Bools],
    deadline: float,
) -> _Stage:
    """The least memory with f₁ at most `target`, and a lower bound on it."""
    best = min(known, key=lambda matrix: _objective_of(instance.used(matrix), objective))
    start = _Stage(best, _objective_of(instance.used(best), objective), 0.0)
    exact = instance.equal and instance.flat
    if objective == "total":
        if exact and _same_cost(instance):
            return _exact_total(instance, target)
        found = _least_total(instance, first, target, start, deadline)
    else:
        if exact:
            return _exact_worst(instance, target, int(start.value))
        found = _least_worst(instance, target, start, deadline)
    if found.bound < found.value and best.size <= _SMALL:
        found = _Program(instance).second(found, target, objective, deadline)
    return _Stage(found.matrix, found.value, min(found.bound, found.value))


def _least_total(
    instance: _Instance,
    first: _Stage,
    target: float,
    start: _Stage,
    deadline: float,
) -> _Stage:
    """The least total: prices of a byte, found so that the relaxation just meets the target."""
    base = int(instance.fixed.sum())
    costs = np.where(instance.allowed, instance.costs, 0)
    unit = max(int(np.gcd.reduce(costs, axis=None)), 1)
    # Each block is paid for once at least.
    lowest = int(np.where(instance.allowed, costs, np.iinfo(np.int64).max).min(axis=0).sum())
    bytes_left = int(start.value) - base
    if bytes_left <= lowest:
        return _Stage(start.matrix, start.value, start.value)
    priced = _byte_price(instance, first, target, bytes_left, deadline)
    whole = _dual(instance, priced.relaxed.prices, priced.price, whole=True)
    bound = max(_whole((whole - target) / priced.price, unit), lowest)
    tried = _Search(instance, start.matrix)
    tried.trim(target)
    best, least = start.matrix, bytes_left
    for matrix in (tried.matrix, *_near(instance, priced, target, deadline)):
        used = int(instance.used(matrix).sum()) - base
        if used < least and instance.value(matrix) <= target:
            best, least = matrix, used
        if least <= bound * (1 + 1e-6):
            break
    return _Stage(best, base + least, base + min(bound, least))


def _whole(bound: float, unit: int) -> int:
    """A lower bound on a multiple of `unit`, raised to the next one but for rounding errors."""
    units = bound / unit
    return unit * math.ceil(units - 1e-9 * max(1.0, abs(units)))


@dataclass(frozen=True)
class _Priced:
    """The bound on bytes that a price of a byte gives."""

    price: float
    bound: float
    excess: float  # the relaxation's f₁ less the target: the bound's slope in 1 / price
    relaxed: _Relaxed


def _byte_price(
    instance: _Instance, first: _Stage, target: float, scale: int, deadline: float
) -> _Priced:
    """The price of a byte that bounds the bytes for blocks best.

    For any price θ > 0, bytes ≥ (min (f₁ + θ bytes) - target) / θ whenever f₁ ≤ target. That is
    concave in 1/θ. Prices on both sides of the best one are taken where their tangents meet.
    """
    begin = price = target**2 / (first.value * scale)
    low: _Priced | None = None
    high: _Priced | None = None
    best: _Priced | None = None
    factor = 4.0
    for _ in range(14):
        relaxed = _relax(instance, price)
        bound = (_dual(instance, relaxed.prices, price) - target) / price
        excess = float(instance.each(relaxed.coverage).sum()) - target
        found = _Priced(price, bound, excess, relaxed)
        best = found if best is None or bound > best.bound else best
        if time.perf_counter() > deadline or not 1e-6 < price / begin < 1e6:
            break
        low, high = (low, found) if excess > 0 else (found, high)
        if low is None or high is None:
            price = price / factor if low is None else price * factor
            factor = min(factor * factor, 256.0)
            continue
        ends = 1 / high.price, 1 / low.price
        rise = low.bound - high.bound + high.excess * ends[0] - low.excess * ends[1]
        meet = rise / max(high.excess - low.excess, 1e-300)
        if high.bound + high.excess * (meet - ends[0]) <= best.bound + 1e-6 * scale:
            break
        # Not too near an end: the relaxation is not solved to the last digit.
        margin = 0.05 * (ends[1] - ends[0])
        price = 1 / min(max(meet, ends[0] + margin), ends[1] - margin)
    assert best is not None
    return best


def _near(instance: _Instance, priced: _Priced, target: float, deadline: float) -> Iterable[Bools]:
    """Matrices that meet the target, from the relaxation's fractions at prices near its own."""
    matrix, price = _round(instance, priced.relaxed.fractions), priced.price
    change, last = 0.04, 0
    few = matrix.shape[0] <= 200
    for _ in range(8 if few else 3):
        search = _Search(instance, matrix, price)
        # The objective of the search is f₁ and all bytes for blocks, which the prices bound.
        bound = _dual(instance, priced.relaxed.prices, price, whole=True)
        search.polish(_rounds(instance) if few else 1, deadline, bound * (1 + _enough(matrix)))
        matrix = search.matrix
        met = _Search(instance, matrix)
        met.extend(target)
        met.trim(target)
        if met.value <= target:
            yield met.matrix
        if time.perf_counter() > deadline:
            return
        side = 1 if search.value <= target else -1
        change = change / 2 if side == -last else change
        price, last = price * (1 + side * change), side


def _least_worst(instance: _Instance, target: float, start: _Stage, deadline: float) -> _Stage:
    """The least cap on every client's bytes with which f₁ still meets the target."""
    everything = np.append(instance.fixed, instance.costs[instance.allowed])
    unit = max(int(np.gcd.reduce(everything)), 1)
    alone = np.where(instance.allowed, instance.fixed[:, None] + instance.costs, UNLIMITED)
    lowest = max(int(instance.fixed.max()), int(alone.min(axis=0).max()))
    high = int(start.value)
    relaxed = _relax(instance)
    bound = lowest
    for _ in range(8):
        raised = _cap_bound(instance, relaxed.prices, target, bound, high, unit)
        if raised >= high or time.perf_counter() > deadline:
            bound = raised
            break
        settled = raised - bound <= 1e-7 * bound and raised > lowest
        bound = raised
        relaxed = _relax(instance.capped(bound))
        if settled:
            break
    if not instance.flat:
        bound = _cap_bound(instance, relaxed.prices, target, bound, high, unit, whole=True)
    best = _cap_down(instance, relaxed, target, start, bound, unit, deadline)
    tidy = _Search(instance.capped(int(best.value)), best.matrix)
    tidy.trim(target)
    return _Stage(tidy.matrix, best.value, min(bound, best.value))


def _cap_bound(
    instance: _Instance,
    prices: Floats,
    target: float,
    low: int,
    high: int,
    unit: int,
    whole: bool = False,
) -> int:
    """A cap in [low, high] below which these prices rule out that f₁ meets the target.

    It is a multiple of `unit` (caps between those change nothing). Over fractions it is the largest
    such cap; over whole blocks, where each trial takes long, it is found to a part in 256.
    """
    low, high = -(-low // unit), high // unit
    for _ in range(8 if whole else 64):
        if low >= high:
            break
        middle = (low + high) // 2
        if _dual(instance.capped(middle * unit), prices, whole=whole) <= target:
            high = middle
        else:
            low = middle + 1
    return low * unit


def _cap_down(
    instance: _Instance,
    relaxed: _Relaxed,
    target: float,
    start: _Stage,
    bound: int,
    unit: int,
    deadline: float,
) -> _Stage:
    """Caps from the bound upwards until one is met, then between that and the last that was not."""
    low, high, matrix = bound, int(start.value), start.matrix
    stride = max(unit, bound // 10_000 // unit * unit)
    cap, found = low, False
    for _ in range(14):
        if low >= high or time.perf_counter() > deadline:
            break
        capped = instance.capped(cap)
        tried = _searched(capped, [_round(capped, relaxed.fractions)], target, deadline)
        if capped.value(tried) <= target:
            found, matrix = True, tried
            high = int(instance.used(tried).max())
        else:
            low = cap + unit
        if found:
            cap = (low + high) // 2 // unit * unit
        else:
            cap, stride = min(cap + stride, high - unit), 2 * stride
        cap = max(cap, low)
    return _Stage(matrix, high, bound)


# Mixed-integer programs for what is small ---------------------------------------------------------


def _run(*arguments: Any, **options: Any) -> Any:
    """The solver, without the lines that it writes to the standard output whatever it is told."""
    with _silent_output():
        return milp(*arguments, **options)


@contextlib.contextmanager
def _silent_output() -> Iterator[None]:
    """Send what compiled code writes to the standard output nowhere."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except OSError:
        # There is no standard output to keep clean.
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        if os.name == "posix":
            # The solver's lines wait in the C library's buffer.
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


class _Program:
    """f₁ from below by linear cuts on each block's coverage, refined where a solution lies.

    Variables: the cells of A, then a part of f₁ per block (times `_SCALE`), then the worst client's
    bytes. With equal shares the cuts are the chords between whole numbers of clients: f₁ itself.
    """

    def __init__(self, instance: _Instance) -> None:
        self.instance = instance
        self.clients, self.blocks = instance.costs.shape
        self.cells = self.clients * self.blocks
        self.width = self.cells + self.blocks + 1
        self.unit = max(int(np.gcd.reduce(np.append(instance.fixed, instance.costs))), 1)
        self.cuts: list[Floats] = []
        self.levels: list[float] = []
        self.seen: set[tuple[int, float]] = set()
        least = np.where(instance.allowed, instance.shares[:, None], np.inf).min(axis=0)
        most = instance.shares @ instance.allowed
        if instance.equal and self.clients > 1:
            for count in range(1, self.clients):
                self._chord(count)
        else:
            for point in np.geomspace(least, most, 8):
                self.cut(point)

    def cut(self, coverage: Floats) -> bool:
        """Tangents at a coverage; False if all were there before."""
        instance = self.instance
        slope = instance.slopes - instance.weights / coverage**2
        level = instance.each(coverage) - slope * coverage
        fresh = [b for b in range(self.blocks) if (b, float(coverage[b])) not in self.seen]
        for block in fresh:
            self.seen.add((block, float(coverage[block])))
            self._add(block, slope[block], level[block])
        return bool(fresh)

    def _chord(self, count: int) -> None:
        instance = self.instance
        ends = np.array([count, count + 1])[:, None] * instance.shares[0]
        left, right = instance.each(ends)
        slope = (right - left) / instance.shares[0]
        for block in range(self.blocks):
            self._add(block, slope[block], left[block] - slope[block] * ends[0, 0])

    def _add(self, block: int, slope: float, level: float) -> None:
        """part_b - slope · c_b ≥ level."""
        row = np.zeros(self.width)
        row[block : self.cells : self.blocks] = -_SCALE * slope * self.instance.shares
        row[self.cells + block] = 1.0
        self.cuts.append(row)
        self.levels.append(_SCALE * level)

    def first(self, known: _Stage, deadline: float) -> _Stage:
        """The least f₁, beginning with what is known."""
        goal = np.zeros(self.width)
        goal[self.cells : -1] = 1.0
        best, bound = known, known.bound
        for _ in range(100):
            self._cut_at(best.matrix)
            answer = self._solve(goal, [], deadline)
            if answer is None:
                break
            if answer.mip_dual_bound is not None:
                bound = max(bound, float(answer.mip_dual_bound) / _SCALE)
            matrix = self._matrix(answer)
            if matrix is not None and self.instance.value(matrix) < best.value:
                best = _Stage(matrix, self.instance.value(matrix), bound)
            closed = best.value - bound <= 1e-2 * SAME * best.value
            if closed or answer.status != 0 or matrix is None or not self._cut_at(matrix):
                break
        return _Stage(best.matrix, best.value, bound)

    def second(self, known: _Stage, target: float, objective: Objective, deadline: float) -> _Stage:
        """The least memory with f₁ at most `target`, beginning with what is known."""
        goal = np.zeros(self.width)
        base = int(self.instance.fixed.sum()) if objective == "total" else 0
        if objective == "total":
            goal[: self.cells] = self.instance.costs.reshape(-1) // self.unit
        else:
            goal[-1] = 1.0
        reach = np.zeros(self.width)
        reach[self.cells : -1] = 1.0
        best, bound = known, known.bound
        for _ in range(100):
            limit = [LinearConstraint(reach, -np.inf, _SCALE * target)]
            answer = self._solve(goal, limit, deadline)
            if answer is None or answer.mip_dual_bound is None:
                break
            units = float(answer.mip_dual_bound)
            units = math.ceil(units - 1e-6 * max(1.0, units * 1e-3))
            bound = max(bound, base + self.unit * units)
            matrix = self._matrix(answer)
            if matrix is not None and self.instance.value(matrix) <= target:
                used = _objective_of(self.instance.used(matrix), objective)
                best = _Stage(matrix, used, bound) if used < best.value else best
            if bound >= best.value or answer.status != 0 or matrix is None:
                break
            if not self._cut_at(matrix):
                break
        return _Stage(best.matrix, best.value, bound)

    def _cut_at(self, matrix: Bools) -> bool:
        return not self.instance.equal and self.cut(self.instance.shares @ matrix)

    def _matrix(self, answer: Any) -> Bools | None:
        """The solution if it keeps to the constraints in whole bytes."""
        if answer.x is None:
            return None
        matrix: Bools = answer.x[: self.cells].reshape(self.clients, self.blocks) > 0.5
        fits = (self.instance.used(matrix) <= self.instance.budgets).all()
        return matrix if fits and matrix.any(axis=0).all() else None

    def _solve(self, goal: Floats, more: list[Any], deadline: float) -> Any:
        """One run of the solver; None if no time is left."""
        left = deadline - time.perf_counter()
        if left <= 0:
            return None
        instance = self.instance
        integrality = np.zeros(self.width)
        integrality[: self.cells] = 1
        upper = np.full(self.width, np.inf)
        upper[: self.cells] = instance.allowed.reshape(-1)
        rows = [
            LinearConstraint(np.array(self.cuts).reshape(-1, self.width), self.levels, np.inf),
            LinearConstraint(self._client_rows(0.0), -np.inf, instance.capacity // self.unit),
            LinearConstraint(self._client_rows(1.0), -np.inf, -(instance.fixed // self.unit)),
            LinearConstraint(self._block_rows(), 1, np.inf),
        ]
        return _run(
            goal,
            integrality=integrality,
            bounds=Bounds(0, upper),
            constraints=rows + more,
            options={"time_limit": left, "node_limit": _NODES, "mip_rel_gap": 0.0},
        )

    def _client_rows(self, worst: float) -> Floats:
        """Each client's bytes for blocks, less the worst client's if `worst` is 1."""
        rows = np.zeros((self.clients, self.clients, self.blocks))
        clients = np.arange(self.clients)
        rows[clients, clients] = np.where(
            self.instance.allowed, self.instance.costs // self.unit, 0
        )
        parts = np.zeros((self.clients, self.blocks + 1))
        parts[:, -1] = -worst
        return np.hstack([rows.reshape(self.clients, -1), parts])

    def _block_rows(self) -> Floats:
        """How many clients have each block."""
        cells = np.tile(np.eye(self.blocks), self.clients)
        return np.hstack([cells, np.zeros((self.blocks, self.blocks + 1))])
