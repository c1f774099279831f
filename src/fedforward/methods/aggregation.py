"""How the server joins the scalars of clients that probed the same directions.

The weighted mean is what the methods' papers have. Anything that compares clients (a median, a
trimmed mean) needs shared directions: the scalars of clients with directions of their own multiply
different vectors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Join = Callable[
    [NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], int], NDArray[np.float64]
]


@dataclass(frozen=True)
class Aggregator:
    """A rule.

    Attributes:
        join: from projected gradients float64 [clients, H * n], learning rates and weights float64
            [clients], and n, to the round's coefficients float64 [H * n] before their sign.
        shared_directions: whether it compares clients, and so needs that they share directions.

    Example:
        >>> import numpy as np
        >>> g = np.array([[1.0], [2.0], [90.0]])
        >>> median.join(g, np.ones(3), np.ones(3), 1)
        array([2.])
    """

    join: Join
    shared_directions: bool = False


def _mean(
    gradients: NDArray[np.float64],
    rates: NDArray[np.float64],
    weights: NDArray[np.float64],
    directions: int,
) -> NDArray[np.float64]:
    """Σ_i p_i η_i g_i / (n Σ_i p_i)."""
    joined: NDArray[np.float64] = ((weights * rates) @ gradients) / (
        directions * sum(weights.tolist())
    )
    return joined


def _median(
    gradients: NDArray[np.float64],
    rates: NDArray[np.float64],
    weights: NDArray[np.float64],
    directions: int,
) -> NDArray[np.float64]:
    """The median over clients of η_i g_i, coordinate by coordinate, over n; weights do not count.

    Yin et al., 2018 (arXiv 1803.01498), for the scalars of shared directions.
    """
    joined: NDArray[np.float64] = np.median(rates[:, None] * gradients, axis=0) / directions
    return joined


mean = Aggregator(_mean)
median = Aggregator(_median, shared_directions=True)


def join(
    aggregator: Aggregator,
    gradients: Sequence[NDArray[np.float32]],
    rates: Sequence[float],
    weights: Sequence[float],
    directions: int,
) -> NDArray[np.float64]:
    """The coefficients of a round, float64 [H * n], with the sign of a step down."""
    stacked = np.array(gradients, dtype=np.float64)
    return -aggregator.join(stacked, np.array(rates), np.array(weights), directions)
