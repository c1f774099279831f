"""Which of several parties' numbers are believed: those that the others' make plausible.

A party may report what it likes. One that is far from most is left out, so that it neither ends a
run nor hides that the run diverges. Where fewer than three parties say something, all are believed.
Imports no PyTorch.
"""

from collections.abc import Sequence
from statistics import median, median_low

import numpy as np
from numpy.typing import NDArray

#: Numbers from which on most of them say what is plausible.
LEAST_TELLERS = 3
#: A loss beyond so many times the median, and so many nats, is not believed.
FAR_LOSS, NATS = 10.0, 1.0
#: Projected gradients whose root mean square is beyond so many times the median are not believed.
FAR_GRADIENTS = 30.0


def plausible_losses(losses: Sequence[float]) -> list[bool]:
    """For each loss, in nats, whether it is believed.

    Example:
        >>> plausible_losses([1.0, 1.2, 1e30])
        [True, True, False]
    """
    if len(losses) < LEAST_TELLERS:
        return [True] * len(losses)
    most = FAR_LOSS * median_low(losses) + NATS
    return [bool(loss <= most) for loss in losses]


def size_of(gradients: NDArray[np.float32]) -> float:
    """The root mean square of projected gradients; 0 where there are none."""
    if not len(gradients):
        return 0.0
    return float(np.sqrt(np.mean(gradients.astype(np.float64) ** 2)))


def plausible_sizes(sizes: Sequence[float], before: Sequence[float]) -> list[bool]:
    """For each client's `size_of`, whether it is believed.

    Args:
        before: of clients in the last rounds.
    """
    known = [size for size in (*sizes, *before) if size > 0.0]
    if len(known) < LEAST_TELLERS:
        return [True] * len(sizes)
    most = FAR_GRADIENTS * median(known)
    believed = [size <= most for size in sizes]
    # Where most have become large together, none of them is alone.
    return believed if 2 * sum(believed) >= len(sizes) else [True] * len(sizes)


def capped_weights(examples: Sequence[int], ratio: float, share: float) -> list[float]:
    """Shares of an average by numbers of examples, which sum to one.

    Args:
        examples: of each client, at least 1.
        ratio: most that a client's examples count, as a multiple of the median.
        share: most that a client weighs, where there are three or more.

    Example:
        >>> capped_weights([10, 10, 2**31], 10.0, 0.5)
        [0.25, 0.25, 0.5]
    """
    most = ratio * median_low(examples)
    counts = [min(count, most) for count in examples]
    total = sum(counts)
    weights = [count / total for count in counts]
    if len(weights) < LEAST_TELLERS:
        return weights
    # Where all weigh the same, none can weigh less.
    share = max(share, 1.0 / len(weights))
    held: set[int] = set()
    while over := {n for n, weight in enumerate(weights) if weight > share and n not in held}:
        held |= over
        rest = sum(count for n, count in enumerate(counts) if n not in held)
        left = 1.0 - share * len(held)
        weights = [share if n in held else count / rest * left for n, count in enumerate(counts)]
    return weights
