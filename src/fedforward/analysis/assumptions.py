"""The constants of FedMeZO's assumptions from sampled gradients, and what its theorems say.

Arithmetic on inner products of gradients; knows no model. Imports no PyTorch. Assumptions, step
sizes and rates are those of arXiv 2402.05926; how constants are estimated is ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from fedforward.analysis.spectrum import Interval

#: x and y of an inequality y ≤ c x + σ² at the sampled points, each float64 [n].
Points = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Moments:
    """What gradients of batches say at one point.

    Attributes:
        products: ⟨∇f_i, ∇f_j⟩, float64 [N, N]; the diagonal without the noise of the batches.
        squares: E‖∇F_i‖² of a batch, float64 [N].
        weights: p_i, float64 [N].
    """

    products: NDArray[np.float64]
    squares: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, gram: NDArray[np.float64], weights: NDArray[np.float64]) -> "Moments":
        """From inner products of batches' gradients, float64 [N, K, N, K], K at least 2."""
        clients, batches = gram.shape[:2]
        products = gram.mean(axis=(1, 3))
        own = np.einsum("ikil->ikl", gram)
        squares = np.einsum("ikk->i", own) / batches
        unlike = (own.sum(axis=(1, 2)) - squares * batches) / (batches * (batches - 1))
        products[np.arange(clients), np.arange(clients)] = unlike
        return cls(products, squares, weights)

    @property
    def mean_square(self) -> float:
        """‖∇f‖², of f = Σ p_i f_i; may be below 0 by chance."""
        return float(self.weights @ self.products @ self.weights)

    @property
    def own_squares(self) -> NDArray[np.float64]:
        """‖∇f_i‖², float64 [N]."""
        return np.diagonal(self.products)

    @property
    def noise(self) -> NDArray[np.float64]:
        """E‖∇F_i - ∇f_i‖², float64 [N]."""
        return self.squares - self.own_squares

    @property
    def distances(self) -> NDArray[np.float64]:
        """‖∇f - ∇f_i‖², float64 [N]."""
        along = self.products @ self.weights
        return np.asarray(self.mean_square - 2.0 * along + self.own_squares)

    @property
    def cosines(self) -> NDArray[np.float64]:
        """Of ∇f_i and ∇f, float64 [N]; NaN where chance leaves no length."""
        with np.errstate(invalid="ignore", divide="ignore"):
            lengths = np.sqrt(self.own_squares * self.mean_square)
            return np.asarray(np.clip(self.products @ self.weights / lengths, -1.0, 1.0))


@dataclass(frozen=True)
class Constants:
    """c and σ² of an assumption of the form y ≤ c x + σ².

    Attributes:
        slope: c, by least squares with neither below its least value.
        rest: σ², likewise.
        enough: the σ² with which the inequality holds at every sampled point, given that slope.
        told: whether the points' x differ enough to tell c from σ²; else c is at its least value.
    """

    slope: Interval
    rest: Interval
    enough: float
    told: bool


#: x of the points must span this ratio for c and σ² to be told apart.
LEAST_SPAN = 1.5


def noise_constants(
    grams: Sequence[NDArray[np.float64]], weights: NDArray[np.float64]
) -> Constants:
    """c_g and σ_g² of E‖∇F_i‖² ≤ c_g ‖∇f_i‖² + σ_g² (Assumption 4).

    As E‖∇F_i‖² = ‖∇f_i‖² + E‖∇F_i - ∇f_i‖², the second term is fitted, and c_g is at least 1.

    Args:
        grams: of each point, see `Moments.of`.
        weights: p_i, float64 [N].
    """

    def points(own: Sequence[NDArray[np.float64]]) -> Points:
        moments = [Moments.of(gram, weights) for gram in own]
        return (
            np.concatenate([m.own_squares for m in moments]),
            np.concatenate([m.noise for m in moments]),
        )

    return _fitted(grams, points, 1.0)


def heterogeneity_constants(
    grams: Sequence[NDArray[np.float64]], weights: NDArray[np.float64]
) -> Constants:
    """c_h and σ_h² of ‖∇f - ∇f_i‖² ≤ c_h ‖∇f‖² + σ_h² (Assumption 6); see `noise_constants`."""

    def points(own: Sequence[NDArray[np.float64]]) -> Points:
        moments = [Moments.of(gram, weights) for gram in own]
        return (
            np.repeat([m.mean_square for m in moments], len(weights)),
            np.concatenate([m.distances for m in moments]),
        )

    return _fitted(grams, points, 0.0)


def _fitted(
    grams: Sequence[NDArray[np.float64]],
    points: Callable[[Sequence[NDArray[np.float64]]], Points],
    least: float,
) -> Constants:
    """The fit, with intervals by leaving out one batch of every client at a time (jackknife)."""
    x, y = points(grams)
    lengths = x[x > 0.0]
    told = len(lengths) > 0 and float(lengths.max() / lengths.min()) >= LEAST_SPAN
    slope, rest = _least_squares(x, y, told)
    batches = grams[0].shape[1]
    left: list[tuple[float, float]] = []
    for batch in range(batches) if batches > 2 else ():
        kept = np.arange(batches) != batch
        left.append(_least_squares(*points([g[:, kept][:, :, :, kept] for g in grams]), told))
    return Constants(
        slope=_jackknife(least + slope, [least + s for s, _ in left] if told else [], least),
        rest=_jackknife(rest, [r for _, r in left], 0.0),
        enough=float(max(0.0, np.max(y - slope * x))),
        told=told,
    )


def _least_squares(
    x: NDArray[np.float64], y: NDArray[np.float64], told: bool
) -> tuple[float, float]:
    """Non-negative slope and intercept; the mean alone where the slope cannot be told."""
    if not told:
        return 0.0, float(max(0.0, y.mean()))
    scale = max(float(np.abs(x).max()), 1e-300)
    found, _ = optimize.nnls(np.stack([x / scale, np.ones_like(x)], axis=1), y)
    return float(found[0] / scale), float(found[1])


def _jackknife(value: float, left: Sequence[float], least: float) -> Interval:
    if not left:
        return Interval(value, float("nan"), float("nan"))
    count = len(left)
    spread = (count - 1) * float(np.var(left))
    half = float(stats.t.ppf(0.975, count - 1)) * sqrt(spread)
    return Interval(value, max(least, value - half), value + half)


@dataclass(frozen=True)
class StepBound:
    """η ≤ min of three terms (Appendix D).

    Attributes:
        curvature: 1 / (3 H L √(c_g d)).
        clients: N / (3 c_g H L).
        steps: 1 / H².
    """

    curvature: float
    clients: float
    steps: float

    @property
    def rate(self) -> float:
        """The least of them."""
        return min(self.curvature, self.clients, self.steps)

    @property
    def binding(self) -> str:
        """Which one that is, as a formula."""
        terms = {
            "1/(3HL√(c_g d))": self.curvature,
            "N/(3 c_g H L)": self.clients,
            "1/H²": self.steps,
        }
        return min(terms, key=lambda name: terms[name])


def step_bound(*, steps: int, smoothness: float, c_g: float, size: int, clients: int) -> StepBound:
    """The paper's bound of the learning rate.

    Args:
        steps: H.
        smoothness: L.
        size: d.
        clients: N.

    Example:
        >>> step_bound(steps=10, smoothness=1.0, c_g=1.0, size=10**6, clients=3).binding
        '1/(3HL√(c_g d))'
    """
    smoothness = max(smoothness, 1e-300)
    return StepBound(
        curvature=1.0 / (3.0 * steps * smoothness * sqrt(c_g * size)),
        clients=clients / (3.0 * c_g * steps * smoothness),
        steps=1.0 / steps**2,
    )


@dataclass(frozen=True)
class RateConstants:
    """What the paper's rates depend on. Orders without their constants: they only compare settings.

    Attributes:
        gamma: γ = (d r + d - 2) / (n (d + 2)) = Θ(r / n).
        zeta: ζ = (d + 2) n² / ((d r + d - 2)(d + n - 1)) = Θ(1 / (r d)).
        iid: r^{3/2} (N H T)^{-1/2}, of Theorem i.i.d.
        non_iid: r^{3/2} (c̃_h N H T)^{-1/2} with c̃_h = c_h + N; None for one client.
        gained: σ_h² / (c_h N), which the paper takes off; None where c_h is 0 or not known.
    """

    gamma: float
    zeta: float
    iid: float
    non_iid: float | None
    gained: float | None


def rate_constants(
    *,
    size: int,
    rank: float,
    directions: int,
    clients: int,
    steps: int,
    rounds: int,
    c_h: float | None = None,
    sigma_h2: float | None = None,
) -> RateConstants:
    """γ, ζ and the rates of the paper's theorems; see `RateConstants`."""
    d, n = size, directions
    inner = d * rank + d - 2.0
    order = rank**1.5 / sqrt(clients * steps * rounds)
    known = c_h is not None and clients > 1
    return RateConstants(
        gamma=inner / (n * (d + 2.0)),
        zeta=(d + 2.0) * n**2 / (inner * (d + n - 1.0)),
        iid=order,
        non_iid=order / sqrt(c_h + clients) if known and c_h is not None else None,
        gained=sigma_h2 / (c_h * clients) if c_h and sigma_h2 is not None else None,
    )


@dataclass(frozen=True)
class LocalRate:
    """The learning rate at which one round's expected loss is least, in the quadratic model.

    Attributes:
        rate: η.
        gain: by how much the expected loss then falls in that round, in nats.
        noise: E of the round's noise zᵀ H z terms, per step and η².
    """

    rate: float
    gain: float
    noise: float


def local_rate(
    moments: Moments,
    *,
    trace: float,
    along: float,
    directions: int,
    steps: int,
    shared: bool,
) -> LocalRate:
    """The best rate where the loss is f + ∇f·u + ½ uᵀ H u and steps do not drift.

    A client's estimate (1/n) Σ z zᵀ g has E[ĝᵀ H ĝ] = ((tr(H) + (n + 1) λ) / n) ‖g‖², where
    λ = gᵀHg/‖g‖² is taken to be that of ∇f for every batch. Ours.

    Args:
        trace: tr(H).
        along: λ.
        directions: n.
        steps: H.
        shared: whether clients probe the same directions.
    """
    p, square = moments.weights, max(moments.mean_square, 0.0)
    bend = (trace + (directions + 1.0) * along) / directions
    own = np.maximum(moments.own_squares, 0.0)
    if shared:
        batch = square + float(p**2 @ (moments.squares - own))
        noise = bend * batch - along * square
    else:
        noise = float(p**2 @ (bend * moments.squares - along * own))
    divisor = steps * along * square + noise
    if not divisor > 0.0 or not square > 0.0:
        return LocalRate(float("nan"), float("nan"), noise)
    rate = square / divisor
    return LocalRate(rate, 0.5 * steps * rate * square, noise)
