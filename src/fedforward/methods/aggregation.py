"""How the server joins the scalars of clients.

The weighted mean is what the methods' papers have. What compares numbers of clients one by one (a
median, a trimmed mean) or as vectors (Krum) needs shared directions: the scalars of clients with
directions of their own multiply different vectors. How long their updates are can be compared in
any case, because directions are about as long as each other.

A rule sees each client's update as the vector η_i g_i of a round's H · n scalars.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Join = Callable[[Floats, Floats, Floats, int], Floats]
#: How long an update may be, in multiples of the median one of its round.
CLIP = 1.5
#: Steps of Weiszfeld's algorithm, and the relative change at which it ends.
_MOST_STEPS, _STILL = 200, 1e-12


def _one(tolerated: int) -> int:
    return 1


@dataclass(frozen=True)
class Aggregator:
    """A rule.

    Attributes:
        join: from projected gradients float64 [clients, H * n], learning rates and weights float64
            [clients], and n, to the round's coefficients float64 [H * n] before their sign.
        shared_directions: whether it compares clients' numbers, and so needs shared directions.
        scales: from updates float64 [clients, H * n] to what each is multiplied with, float64
            [clients]; for clients with directions of their own. None leaves them as they are.
        tolerating: the join where so many clients may report wrong numbers; None where that
            number does not matter.
        clients_for: the fewest clients of which so many may.
        least: the fewest clients that `join` takes.

    Example:
        >>> import numpy as np
        >>> g = np.array([[1.0], [2.0], [90.0]])
        >>> median.join(g, np.ones(3), np.ones(3), 1)
        array([2.])
    """

    join: Join
    shared_directions: bool = False
    scales: Callable[[Floats], Floats] | None = None
    tolerating: Callable[[int], Join] | None = None
    clients_for: Callable[[int], int] = _one
    least: int = 1

    def for_tolerated(self, tolerated: int) -> "Aggregator":
        """The rule where so many clients may report wrong numbers."""
        if self.tolerating is None:
            return self
        least = self.clients_for(tolerated)
        return replace(self, join=self.tolerating(tolerated), least=least)


def _mean(gradients: Floats, rates: Floats, weights: Floats, directions: int) -> Floats:
    """Σ_i p_i η_i g_i / (n Σ_i p_i)."""
    joined: Floats = ((weights * rates) @ gradients) / (directions * sum(weights.tolist()))
    return joined


def clip_scales(updates: Floats) -> Floats:
    """min(1, c · median_j ‖u_j‖ / ‖u_i‖) with c = 1.5: no update is longer than that.

    A c of 1 shortens half of all honest updates, and costs a tenth of what a run learns.
    Args:
        updates: float64 [clients, H * n].
    """
    # Rounded once, so that every machine has the same bits.
    norms = np.array([math.sqrt(math.fsum(np.square(update).tolist())) for update in updates])
    limit = CLIP * float(np.median(norms))
    scales = np.ones(len(norms))
    longer = norms > limit
    scales[longer] = limit / norms[longer]
    return scales


def _clipped_mean(gradients: Floats, rates: Floats, weights: Floats, directions: int) -> Floats:
    """The weighted mean of updates that are clipped to 1.5 times their median length."""
    scales = clip_scales(rates[:, None] * gradients)
    return _mean(scales[:, None] * gradients, rates, weights, directions)


def _median(gradients: Floats, rates: Floats, weights: Floats, directions: int) -> Floats:
    """The median over clients of η_i g_i, coordinate by coordinate, over n; weights do not count.

    Yin et al., 2018 (arXiv 1803.01498), for the scalars of shared directions.
    """
    joined: Floats = np.median(rates[:, None] * gradients, axis=0) / directions
    return joined


def _trimmed_mean(
    tolerated: int, gradients: Floats, rates: Floats, weights: Floats, directions: int
) -> Floats:
    """The mean of each coordinate without its f largest and f least values; no weights.

    Yin et al., 2018 (arXiv 1803.01498), Definition 2.
    """
    values = np.sort(rates[:, None] * gradients, axis=0)
    joined: Floats = values[tolerated : len(values) - tolerated].mean(axis=0) / directions
    return joined


def _geometric_median(gradients: Floats, rates: Floats, weights: Floats, directions: int) -> Floats:
    """The vector whose weighted sum of distances to the updates is least, by Weiszfeld's algorithm.

    Pillutla et al., 2022 (arXiv 1912.13445), with distances held above 10⁻⁶ of the median one.
    """
    updates = rates[:, None] * gradients
    found: Floats = np.median(updates, axis=0)
    for _ in range(_MOST_STEPS):
        distances = np.linalg.norm(updates - found, axis=1)
        floor = 1e-6 * float(np.median(distances))
        if not floor:
            break
        pulls = weights / np.maximum(distances, floor)
        moved = (pulls / pulls.sum()) @ updates
        still = np.linalg.norm(moved - found) <= _STILL * np.linalg.norm(moved)
        found = moved
        if still:
            break
    return found / directions


def krum_order(tolerated: int, updates: Floats) -> NDArray[np.intp]:
    """Clients by the sum of squared distances to their n - f - 2 nearest, the least first."""
    distances = ((updates[:, None] - updates[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    near = np.sort(distances, axis=1)[:, : len(updates) - tolerated - 2]
    return np.argsort(near.sum(axis=1), kind="stable")


def _krum(
    tolerated: int, gradients: Floats, rates: Floats, weights: Floats, directions: int
) -> Floats:
    """The update of the client that is nearest to others (Blanchard et al., 2017)."""
    updates = rates[:, None] * gradients
    chosen: Floats = updates[krum_order(tolerated, updates)[0]] / directions
    return chosen


def _multi_krum(
    tolerated: int, gradients: Floats, rates: Floats, weights: Floats, directions: int
) -> Floats:
    """The weighted mean of the n - f clients that are nearest to others."""
    order = krum_order(tolerated, rates[:, None] * gradients)
    kept = np.sort(order[: len(order) - tolerated])
    return _mean(gradients[kept], rates[kept], weights[kept], directions)


def _twice_and_one(tolerated: int) -> int:
    return 2 * tolerated + 1


def _twice_and_three(tolerated: int) -> int:
    return 2 * tolerated + 3


def _tolerant(join: Callable[..., Floats], clients_for: Callable[[int], int]) -> Aggregator:
    """A rule for shared directions that is told how many clients may report wrong numbers."""
    rule = Aggregator(
        partial(join, 1),
        shared_directions=True,
        tolerating=lambda tolerated: partial(join, tolerated),
        clients_for=clients_for,
    )
    return rule.for_tolerated(1)


mean = Aggregator(_mean)
clipped_mean = Aggregator(_clipped_mean, scales=clip_scales)
median = Aggregator(_median, shared_directions=True)
geometric_median = Aggregator(_geometric_median, shared_directions=True)
trimmed_mean = _tolerant(_trimmed_mean, _twice_and_one)
krum = _tolerant(_krum, _twice_and_three)
multi_krum = _tolerant(_multi_krum, _twice_and_three)


def join(
    aggregator: Aggregator,
    gradients: Sequence[NDArray[np.float32]],
    rates: Sequence[float],
    weights: Sequence[float],
    directions: int,
) -> Floats:
    """The coefficients of a round, float64 [H * n], with the sign of a step down."""
    stacked = np.array(gradients, dtype=np.float64)
    return -aggregator.join(stacked, np.array(rates), np.array(weights), directions)
