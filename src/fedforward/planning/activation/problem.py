"""What is asked and what is answered: clients and blocks, and an activation's certificates."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedforward.core.errors import FedForwardError

Objective = Literal["total", "worst"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: A budget that binds nobody, in bytes.
UNLIMITED = 2**62
#: Surrogates that differ by less, relatively, count as the same.
SAME = 1e-9


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
        if not active.any(axis=0).all():
            return math.inf
        return float(self.surrogates(self.shares @ active).sum())

    def surrogates(self, coverage: Floats) -> Floats:
        """Each block's part of f₁, w_b / c_b + λ_b c_b; the last axis is that of the blocks."""
        parts: Floats = self.weights / coverage + self.slopes * coverage
        return parts

    def memory(self, matrix: ArrayLike) -> Ints:
        """Bytes that each client needs for an activation, int64 [N]."""
        active: Ints = np.where(np.asarray(matrix, bool), self.costs, 0).sum(axis=1)
        return self.fixed + active

    def used(self, matrix: ArrayLike, objective: Objective) -> int:
        """Bytes of all clients ("total"), or of the one that needs most ("worst")."""
        memory = self.memory(matrix)
        return int(memory.sum() if objective == "total" else memory.max())

    def admits(self, matrix: ArrayLike) -> bool:
        """Whether every block is active somewhere and every client keeps to its budget."""
        active = np.asarray(matrix, bool)
        covered = bool(active.any(axis=0).all())
        return covered and bool((self.memory(active) <= self.budgets).all())

    def capped(self, most: int) -> "Problem":
        """The same where no client may use more than `most` bytes."""
        return replace(self, budgets=np.minimum(self.budgets, most))

    @cached_property
    def slopes(self) -> Floats:
        """λ_b = λ d_b / Σ_b d_b, what a unit of a block's coverage adds to f₁, float64 [L]."""
        slopes: Floats = self.dimension_penalty * self.dimensions / self.dimensions.sum()
        return slopes

    @cached_property
    def equal(self) -> bool:
        """Whether all shares are equal, so that coverage is a number of clients."""
        return bool(np.ptp(self.shares) == 0)

    @cached_property
    def flat(self) -> bool:
        """Whether to each client all blocks cost the same."""
        return bool((self.costs == self.costs[:, :1]).all())

    @cached_property
    def small(self) -> bool:
        """Whether a mixed-integer program may end in time: at most 400 decisions."""
        return self.costs.size <= 400

    @cached_property
    def allowed(self) -> Bools:
        """Blocks that a client could afford alone, bool [N, L]."""
        allowed: Bools = self.costs <= (self.budgets - self.fixed)[:, None]
        return allowed

    @cached_property
    def capacity(self) -> Ints:
        """Bytes for blocks, int64 [N], less what no set of blocks could use."""
        if self.flat:
            return self.most_blocks * self.costs[:, 0]
        most = np.where(self.allowed, self.costs, 0).sum(axis=1)
        room: Ints = np.clip(self.budgets - self.fixed, 0, most)
        return room

    @cached_property
    def most_blocks(self) -> Ints:
        """How many blocks each client can have where `flat`, int64 [N]."""
        cost, room = self.costs[:, 0], np.maximum(self.budgets - self.fixed, 0)
        blocks = self.costs.shape[1]
        counts: Ints = np.where(cost > 0, np.minimum(room // np.maximum(cost, 1), blocks), blocks)
        return counts

    @cached_property
    def coverages(self) -> tuple[Floats, Floats]:
        """Least and largest coverage that n + 1 of its clients give a block, float64 [N, L] both.

        Past the number of clients that are allowed the least is infinite, the largest that of all.
        """
        shares = self.shares[:, None]
        least: Floats = np.sort(np.where(self.allowed, shares, np.inf), axis=0).cumsum(axis=0)
        most: Floats = -np.sort(np.where(self.allowed, -shares, 0.0), axis=0).cumsum(axis=0)
        return least, most


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
        shares: float64 [N], as in the problem.
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
        """c_b = Σ_i A_ib p_i, the share of the clients that perturb each block, float64 [L]."""
        coverage: Floats = self.shares @ self.matrix
        return coverage

    @property
    def used(self) -> int:
        """The objective of the second stage: bytes of all clients, or of the worst one."""
        return int(self.memory.sum() if self.objective == "total" else self.memory.max())


@dataclass(frozen=True)
class Stage:
    """A stage's matrix, bool [N, L], its objective (f₁ or bytes) and a lower bound on that."""

    matrix: Bools
    value: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the objective lies above its bound, relatively; not below 0."""
        if self.value <= self.bound:
            return 0.0
        return (self.value - self.bound) / self.bound if self.bound > 0 else math.inf
