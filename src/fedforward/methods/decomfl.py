"""DeComFL (arXiv 2405.15861): the same directions for all clients, one averaged scalar each.

Faithful to the paper: in local step h every client probes along the same P directions, moves along
them by its own scalars, and goes back to the server's state after reporting; the server averages
the scalars and everyone applies

    θ ← θ - (1/P) Σ_h Σ_p ḡ_hp z(s_hp),        ḡ_hp = Σ_i p_i η_i g_i,hp.

It departs in the estimator (two-point as FedMeZO has it; the paper's is one-sided) and in weights
and rates per client, which the paper has equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedforward.core.seeds import SHARED
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.report import ClientResult
from fedforward.methods.base import (
    Capabilities,
    Method,
    coefficients,
    round_seeds,
    shared_contribution,
)


@dataclass(frozen=True, kw_only=True)
class DeComFL(Method):
    """Shared directions.

    Example:
        >>> method = DeComFL(local_steps=2)
        >>> (method.seeds(0, client=1) == method.seeds(0, client=2)).all()
        np.True_
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        shared_directions=True, scales=True, sums=True, private=True
    )

    def seeds(self, round_number: int, client: int, payload: bytes = b"") -> NDArray[np.uint64]:
        """s_h, the same for every client."""
        return round_seeds(self.run_seed, round_number, SHARED, self.local_steps, self.directions)

    def aggregate(self, round_number: int, results: Sequence[ClientResult], state: Any) -> Entry:
        """One averaged coefficient for each direction."""
        return Entry(round_number, (shared_contribution(self, results, SHARED),))

    def aggregate_sum(
        self, round_number: int, mean: NDArray[np.float64], learning_rate: float
    ) -> Entry:
        """-(η / P) ḡ for each direction."""
        joined = coefficients(-(learning_rate * mean) / self.directions)
        return Entry(round_number, (Contribution(SHARED, joined),))
