"""What the server does to a round's steps before they are written: all of it stays a sum of steps.

Decay multiplies the state, windowed momentum repeats the steps of the last rounds with smaller
coefficients, and the scalar-normalised step divides rates by one number for the whole model. None
has a state of its own: everything follows from the ledger.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fedforward.federation.ledger import Round
from fedforward.messages.entry import Entry
from fedforward.methods.base import coefficients


@dataclass(frozen=True)
class ServerOptimizer:
    """The settings.

    Attributes:
        learning_rate: multiplies the round's average update; 1 is plain averaging.
        decay: multiplies the tuned state in every round; 1 leaves it.
        momentum: β; the update of round t is Σ_{a<W} β^a Δ_{t-a}.
        window: W, rounds that momentum looks back, the current one included.
        normalise: divide learning rates by the root mean square of the projected gradients of the
            last `window` rounds, relative to that of the first round.
    """

    learning_rate: float = 1.0
    decay: float = 1.0
    momentum: float = 0.0
    window: int = 1
    normalise: bool = False

    def apply(self, entry: Entry, history: Sequence[Round]) -> Entry:
        """The entry as it is written.

        Args:
            entry: the round's average update.
            history: earlier rounds, oldest first; at least the last `window` - 1 of them.
        """
        fresh = [
            replace(part, coefficients=_times(self.learning_rate, part.coefficients))
            for part in entry.contributions
        ]
        parts = list(fresh)
        for back in range(1, min(self.window, len(history) + 1)):
            factor, before = self.momentum**back, history[-back].entry
            # Rounds that were taken back lie in between.
            age = entry.round - before.round
            parts += [
                replace(part, coefficients=_times(factor, part.coefficients), age=age)
                for part in before.contributions
                if not part.age and factor and age <= MAX_AGE
            ]
        return replace(entry, contributions=tuple(parts), decay=entry.decay * self.decay)

    def rate_factor(self, first: Round | None, history: Sequence[Round]) -> float:
        """What learning rates are multiplied with in the coming round.

        Args:
            first: round 0.
            history: earlier rounds, oldest first.
        """
        if not self.normalise or first is None or not history:
            return 1.0
        now = np.mean([_mean_square(record) for record in history[-self.window :]])
        return sqrt(_mean_square(first) / now) if now else 1.0


#: Rounds that an entry can look back.
MAX_AGE = 2**16 - 1
#: The clients' average as it is.
PLAIN = ServerOptimizer()


def _times(factor: float, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The product in float64, rounded once."""
    return coefficients(factor * values.astype(np.float64))


def _mean_square(record: Round) -> float:
    gradients = [result.report.gradients.astype(np.float64) for result in record.results]
    every = np.concatenate(gradients)
    return float(np.mean(every**2)) if len(every) else 0.0
