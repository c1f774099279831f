"""FedMeZO: zeroth-order federated averaging (arXiv 2402.05926), and MeZO as its one-client case.

Faithful to the paper: two-point estimate along z ~ N(0, I_d), H local steps on the client's own
trajectory, weighted average of the clients, dropout off. It departs in what travels: the paper's
code uploads LoRA tensors; the same update is the H projected gradients (`docs/architecture.md`),
and averaging parameters is averaging steps:

    Σ_i p_i θ_i  =  θ - Σ_i Σ_h p_i η_i g_ih z(s_ih)        because Σ_i p_i = 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.report import ClientResult
from fedforward.methods.base import Capabilities, Method, coefficients, round_seeds


@dataclass(frozen=True, kw_only=True)
class FedMeZO(Method):
    """Every client has directions of its own.

    Example:
        >>> FedMeZO(local_steps=3).seeds(round_number=0, client=1).shape
        (3,)
    """

    capabilities: ClassVar[Capabilities] = Capabilities(scales=True, private=True)

    def seeds(self, round_number: int, client: int, payload: bytes = b"") -> NDArray[np.uint64]:
        """s_ih, new for each client and step."""
        return round_seeds(self.run_seed, round_number, client, self.local_steps, self.directions)

    def aggregate(self, round_number: int, results: Sequence[ClientResult], state: Any) -> Entry:
        """-p_i (η_i / n) g_ih, computed in float64 and rounded to float32 once.

        An aggregator may shorten what a client adds; directions are about as long as each other.
        """
        parts = []
        for part, scale in zip(results, self._scales(results), strict=True):
            rate = -scale * part.weight * (part.learning_rate / self.directions)
            values = rate * part.report.gradients.astype(np.float64)
            parts.append(Contribution(part.report.client, coefficients(values)))
        return Entry(round_number, tuple(parts))

    def _scales(self, results: Sequence[ClientResult]) -> Sequence[float]:
        """What the aggregator multiplies each client's update with."""
        if self.aggregator.scales is None:
            return [1.0] * len(results)
        updates = [
            part.learning_rate * part.report.gradients.astype(np.float64) for part in results
        ]
        scales: list[float] = self.aggregator.scales(np.array(updates)).tolist()
        return scales


@dataclass(frozen=True, kw_only=True)
class FedMeZOAuto(FedMeZO):
    """FedMeZO with the settings that need the fewest forward passes, and a rate that is found.

    The algorithm is FedMeZO's. What differs are the defaults of a configuration: one-sided
    estimates along many Rademacher directions on few examples, one local step a round, a rate that
    falls as a cosine, and adapters of which the R of B = U R is tuned alone, with A and U aligned.
    A classifier's and a stored adapter's B are tuned instead. `docs/how-to/efficiency.md` has what
    each is worth.

    Example:
        >>> FedMeZOAuto.defaults["method"]["estimator"]
        'one-sided'
    """

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "method": {
            "estimator": "one-sided",
            "directions": 16,
            "distribution": "rademacher",
            "local_steps": 1,
            "schedule": "cosine",
            "batch_size": 1,
        },
        "lora": {"factors": "R", "init": "aligned"},
    }
    lora_defaults: ClassVar[Mapping[str, Any]] = {"mu": 1e-2}
