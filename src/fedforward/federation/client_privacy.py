"""Privacy of whole clients: each bounds its report, and the server adds noise to their sum.

The sum is that of `secure_sums`, in whole units, so the ledger holds noisy sums alone. Imports
no PyTorch.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from fedforward.core.entropy import Entropy, SystemEntropy
from fedforward.federation.secure_sums import EXTRA, LIMIT, UNIT
from fedforward.messages.report import Report
from fedforward.messages.secure import Total
from fedforward.methods.privacy import Mechanism, Noise

#: What a bound is shortened by for the rounding of a number to float32, as a share of it.
_ROUNDING = 2.0**-20


@dataclass(frozen=True)
class ClientBound:
    """A report filter: all projected gradients of a round as one vector of length C at most.

    Attributes:
        clip: C.
        noise: "gaussian" bounds the L2 length, "laplace" the L1 length.
    """

    clip: float
    noise: Noise = "gaussian"

    def __call__(self, report: Report) -> Report:
        """The report with no loss and no skipped steps, which are not bounded."""
        numbers = report.gradients.astype(np.float64)
        # In fixed point each number moves by half a unit at most.
        most = self.clip * (1.0 - _ROUNDING) - len(numbers) * UNIT
        found = np.zeros_like(numbers)
        if most > 0.0:
            bound = Mechanism(most, 0.0, expected=1, chance=1.0, examples=1, noise=self.noise)
            found = bound.clipped(numbers[None])[0]
        gradients = found.astype(np.float32)
        return replace(report, gradients=gradients, loss=float("nan"), skipped=0)


@dataclass(frozen=True)
class SumNoise:
    """What a server adds to a sum before it is written.

    Attributes:
        scale: σC in units of a sum.
        noise: its kind.
        entropy: where it comes from.
    """

    scale: int
    noise: Noise = "gaussian"
    entropy: Entropy = field(default_factory=SystemEntropy, compare=False)

    @classmethod
    def of(cls, clip: float, noise_multiplier: float, noise: Noise) -> "SumNoise":
        """Of σC, rounded up to a whole unit."""
        return cls(int(np.ceil(clip * noise_multiplier / UNIT)), noise)

    def added(self, total: Total) -> Total:
        """The sum with noise, within the range of sums, and without losses and skipped steps."""
        sums = total.values[:-EXTRA].view(np.int64)
        draw = self.entropy.laplace if self.noise == "laplace" else self.entropy.gaussian
        most = round(total.clients * LIMIT / UNIT)
        noisy = np.clip(sums + draw(len(sums), self.scale), -most, most)
        values = np.concatenate([noisy, np.zeros(EXTRA, np.int64)]).view(np.uint64)
        return Total(total.clients, values)
