"""Trace, norm and effective rank of a symmetric matrix that is known by its products alone.

Stochastic Lanczos quadrature (Ubaru, Chen and Saad, 2017), and Hutchinson's estimate of the trace
with the part of it taken out that the Krylov spaces know exactly (as in Hutch++, Meyer et al.,
2021). The largest eigenvalue is ARPACK's. Imports no PyTorch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, stats
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

#: Rows are vectors: float64 [k, d] to the products with them, float64 [k, d].
Products = Callable[[NDArray[np.float64]], NDArray[np.float64]]

#: Relative length of a Lanczos residual below which a Krylov space is invariant.
_INVARIANT = 1e-5
#: Squared length of what a vector adds to a basis, below which it adds nothing.
_APART = 1e-6
#: Lanczos vectors of ARPACK, and restarts.
_VECTORS, _RESTARTS = 12, 8
#: Bytes of the Krylov bases that are held at once.
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % confidence interval; both ends are NaN where one sample was taken.

    Example:
        >>> Interval.of([1.0, 2.0, 3.0]).value
        2.0
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float] | NDArray[np.float64]) -> "Interval":
        """The mean of independent samples, with Student's t."""
        values = np.asarray(samples, np.float64)
        mean, count = float(values.mean()), len(values)
        if count < 2:
            return cls(mean, float("nan"), float("nan"))
        half = float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count))
        return cls(mean, mean - half, mean + half)

    def over(self, divisor: float) -> "Interval":
        """The estimate divided by a positive number; NaN where that is 0."""
        if not divisor > 0.0:
            return Interval(float("nan"), float("nan"), float("nan"))
        return Interval(self.value / divisor, self.low / divisor, self.high / divisor)


@dataclass(frozen=True, eq=False)
class Krylov:
    """What some Lanczos steps from one start have found: H Q = Q T + β q eᵀ.

    Attributes:
        diagonal: α, float64 [m].
        beside: β, float64 [m]; the last leads out of the space, and is 0 if that is invariant.
        basis: float32 [m + 1, d], orthonormal rows; one row less in an invariant space.
        length: of the start.
    """

    diagonal: NDArray[np.float64]
    beside: NDArray[np.float64]
    basis: NDArray[np.float32]
    length: float

    @property
    def steps(self) -> int:
        """m."""
        return len(self.diagonal)

    def ritz(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ritz values, float64 [m], ascending, and the vectors in the basis as columns."""
        values, vectors = linalg.eigh_tridiagonal(self.diagonal, self.beside[:-1])
        return values, vectors

    def image(self) -> NDArray[np.float64]:
        """H Q, float64 [m, d], rows as those of the basis."""
        m = self.steps
        found = self.diagonal[:, None] * self.basis[:m].astype(np.float64)
        found[1:] += self.beside[: m - 1, None] * self.basis[: m - 1]
        others = self.basis[1 : m + 1]
        found[: len(others)] += self.beside[: len(others), None] * others
        return found


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What is known of a symmetric matrix H [d, d] from its products.

    Attributes:
        norm: ‖H‖, the largest magnitude of an eigenvalue.
        largest: eigenvalue that was seen, signed.
        least: likewise; an upper bound of the least eigenvalue.
        trace: tr(H).
        absolute_trace: tr|H|, by quadrature.
        squares: ‖H‖_F².
        effective_rank: tr(H) / ‖H‖ (FedMeZO, Assumption 1).
        absolute_rank: tr|H| / ‖H‖, which bounds H from above where it is indefinite.
        converged: whether ARPACK found the norm to its tolerance.
        products: matrix-vector products that it took.
        nodes: Ritz values of all starts.
        weights: of each, as shares of 1.
        top: float64 [d], the eigenvector of the norm.
        block_traces: tr(H_bb) of each block, in order; empty without blocks.
    """

    norm: float
    largest: float
    least: float
    trace: Interval
    absolute_trace: Interval
    squares: Interval
    effective_rank: Interval
    absolute_rank: Interval
    converged: bool
    products: int
    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]
    top: NDArray[np.float64]
    block_traces: tuple[Interval, ...] = ()


def lanczos(products: Products, starts: NDArray[np.float64], steps: int) -> list[Krylov]:
    """Lanczos steps from each start, all of them in one call of `products`.

    Every vector is made orthogonal to all before it, twice.

    Args:
        starts: float64 [k, d], none of them 0.
        steps: m, at most; a start whose space is invariant stops before.
    """
    count, size = starts.shape
    steps = min(steps, size)
    lengths = np.linalg.norm(starts, axis=1)
    bases = np.zeros((count, steps + 1, size), np.float32)
    bases[:, 0] = starts / lengths[:, None]
    diagonal, beside = np.zeros((2, count, steps))
    done = np.zeros(count, np.int64)
    live = list(range(count))
    for step in range(steps):
        if not live:
            break
        images = products(bases[live, step].astype(np.float64))
        for place, image in zip(list(live), images, strict=True):
            basis = bases[place, : step + 1]
            scale = float(np.linalg.norm(image))
            diagonal[place, step] = image @ basis[step]
            for _ in range(2):
                image = image - (basis @ image) @ basis
            rest = float(np.linalg.norm(image))
            done[place] = step + 1
            if rest <= _INVARIANT * max(scale, float(np.abs(diagonal[place]).max())):
                live.remove(place)
                continue
            beside[place, step] = rest
            bases[place, step + 1] = image / rest
    return [
        Krylov(
            diagonal[place, : done[place]],
            beside[place, : done[place]],
            bases[place, : done[place] + (beside[place, done[place] - 1] > 0.0)],
            float(lengths[place]),
        )
        for place in range(count)
    ]


def random_signs(count: int, size: int, seed: int) -> NDArray[np.float64]:
    """So many Rademacher vectors, float64 [count, size]."""
    generator = np.random.Generator(np.random.Philox(seed))
    return 2.0 * generator.integers(0, 2, (count, size)).astype(np.float64) - 1.0


def starts_that_fit(size: int, probes: int, steps: int) -> int:
    """How many starts' bases may be held at once, at least 1 and at most `probes`."""
    return max(1, min(probes, _MOST_BYTES // (4 * size * (steps + 1))))


def spectrum(
    products: Products,
    size: int,
    *,
    probes: int,
    steps: int,
    seed: int,
    owners: NDArray[np.int64] | None = None,
    groups: NDArray[np.bool_] | None = None,
) -> Spectrum:
    """Estimate trace, norm and effective rank of a symmetric matrix.

    A third of the probes are starts of Lanczos steps. Each probe then gives a sample of the trace:
    what the other starts' spaces know exactly, and Hutchinson's estimate of the rest.

    Args:
        size: d.
        probes: random vectors; the intervals are of their number.
        steps: Lanczos steps from each start.
        seed: of the probes.
        owners: int64 [d], the block of each coordinate; None is one block.
        groups: bool [d], one of two parts of the coordinates. Each probe of the trace then is two,
            one in each part: what couples the parts is not in the trace, and adds no noise.

    Example:
        >>> import numpy as np
        >>> found = spectrum(lambda v: v * np.arange(1.0, 6.0), 5, probes=6, steps=5, seed=0)
        >>> round(found.norm, 6), round(found.effective_rank.value, 6)
        (5.0, 3.0)
    """
    vectors = random_signs(probes, size, seed)
    count = starts_that_fit(size, -(-probes // 3), steps)
    spaces = lanczos(products, vectors[:count], steps)
    images = np.stack([_first_image(space) for space in spaces])
    rest = probes - count if groups is None else 0
    if rest:
        images = np.concatenate([images, products(vectors[count:])])
    pair, more, converged = _largest(products, spaces)
    norm = abs(pair[0])
    ritz = [space.ritz() for space in spaces]
    nodes = np.concatenate([values for values, _ in ritz])
    absolute = [size * float(mixed[0] ** 2 @ np.abs(values)) for values, mixed in ritz]
    if groups is None:
        trace, blocks = _traces(spaces, pair, vectors, images, owners)
    else:
        halves = np.concatenate([vectors * groups, vectors * ~groups])
        both = (halves * products(halves)).reshape(2, probes, size).sum(axis=0)
        trace, blocks = _by_block(both, owners)
        more += 2 * probes
    return Spectrum(
        norm=norm,
        largest=float(max(nodes.max(), pair[0])),
        least=float(min(nodes.min(), pair[0])),
        trace=trace,
        absolute_trace=Interval.of(absolute),
        # ‖H v‖² has the mean ‖H‖_F².
        squares=Interval.of(np.square(images).sum(axis=1)),
        effective_rank=trace.over(norm),
        absolute_rank=Interval.of(absolute).over(norm),
        converged=converged,
        products=sum(space.steps for space in spaces) + rest + more,
        nodes=nodes,
        weights=np.concatenate([mixed[0] ** 2 for _, mixed in ritz]) / len(ritz),
        top=pair[1],
        block_traces=blocks,
    )


def _traces(
    spaces: Sequence[Krylov],
    pair: tuple[float, NDArray[np.float64]],
    vectors: NDArray[np.float64],
    images: NDArray[np.float64],
    owners: NDArray[np.int64] | None,
) -> tuple[Interval, tuple[Interval, ...]]:
    """tr(H), and tr(H_bb) of each block; a start's own space does not count for its sample."""
    every = Known.of(spaces, pair)
    samples = []
    for place, (vector, image) in enumerate(zip(vectors, images, strict=True)):
        known = every
        if place < len(spaces):
            known = Known.of([s for n, s in enumerate(spaces) if n != place], pair)
        diagonal = None if owners is None else known.by_coordinate(vector, image)
        samples.append((known.trace + known.rest(vector, image), diagonal))
    blocks: tuple[Interval, ...] = ()
    if owners is not None:
        blocks = _by_block(np.stack([own for _, own in samples if own is not None]), owners)[1]
    return Interval.of([total for total, _ in samples]), blocks


def _by_block(
    diagonals: NDArray[np.float64], owners: NDArray[np.int64] | None
) -> tuple[Interval, tuple[Interval, ...]]:
    """tr(H) and that of each block, from samples of the diagonal, float64 [probes, d]."""
    blocks: tuple[Interval, ...] = ()
    if owners is not None:
        parts = np.stack([np.bincount(owners, own) for own in diagonals])
        blocks = tuple(Interval.of(column) for column in parts.T)
    return Interval.of(diagonals.sum(axis=1)), blocks


def _largest(
    products: Products, spaces: Sequence[Krylov]
) -> tuple[tuple[float, NDArray[np.float64]], int, bool]:
    """The eigenpair of the largest magnitude, products taken, and convergence."""
    best, vector = 0.0, spaces[0].basis[0].astype(np.float64)
    for space in spaces:
        values, vectors = space.ritz()
        place = int(np.abs(values).argmax())
        if abs(values[place]) > abs(best):
            best = float(values[place])
            vector = vectors[:, place] @ space.basis[: space.steps].astype(np.float64)
    size = len(vector)
    counted = 0

    def product(v: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal counted
        counted += 1
        image: NDArray[np.float64] = products(np.asarray(v, np.float64).reshape(1, -1))[0]
        return image

    if best == 0.0 or size < 3:
        return (best, vector), counted, True
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    try:
        values, vectors = eigsh(
            operator,
            k=1,
            which="LM",
            v0=vector,
            ncv=min(_VECTORS, size),
            tol=1e-3,
            maxiter=_RESTARTS,
        )
    except ArpackNoConvergence:
        return (best, vector), counted, False
    return (float(values[0]), np.asarray(vectors[:, 0], np.float64)), counted, True


@dataclass(frozen=True, eq=False)
class Known:
    """A subspace and what H makes of it, out of Krylov spaces and an eigenvector.

    Attributes:
        basis: Q, float64 [n, d], orthonormal rows.
        image: H Q, likewise.
    """

    basis: NDArray[np.float64]
    image: NDArray[np.float64]

    @classmethod
    def of(cls, spaces: Sequence[Krylov], pair: tuple[float, NDArray[np.float64]]) -> "Known":
        """The span of all of them; what they have in common counts once."""
        value, vector = pair
        rows = [*(space.basis[: space.steps].astype(np.float64) for space in spaces), vector[None]]
        images = [*(space.image() for space in spaces), value * vector[None]]
        basis, image = np.concatenate(rows), np.concatenate(images)
        lengths, mixed = np.linalg.eigh(basis @ basis.T)
        kept = lengths > _APART
        mixed = mixed[:, kept] / np.sqrt(lengths[kept])
        return cls(mixed.T @ basis, mixed.T @ image)

    @property
    def trace(self) -> float:
        """tr(Qᵀ H Q)."""
        return float(np.sum(self.basis * self.image))

    def rest(self, start: NDArray[np.float64], image: NDArray[np.float64]) -> float:
        """v'ᵀ H v' of v' = v - Q Qᵀ v, from v and H v."""
        inside = self.basis @ start
        within = inside @ (self.basis @ (inside @ self.image))
        return float(start @ image - 2.0 * inside @ (self.image @ start) + within)

    def by_coordinate(
        self, start: NDArray[np.float64], image: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """An unbiased sample of the diagonal of H, float64 [d]."""
        known = np.einsum("nd,nd->d", self.basis, self.image)
        return np.asarray(known + start * (image - (self.basis @ start) @ self.image))


def _first_image(space: Krylov) -> NDArray[np.float64]:
    """H v of the start v, float64 [d]."""
    image = space.diagonal[0] * space.basis[0].astype(np.float64)
    if len(space.basis) > 1:
        image += space.beside[0] * space.basis[1]
    found: NDArray[np.float64] = space.length * image
    return found
