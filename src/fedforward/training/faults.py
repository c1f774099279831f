"""What goes wrong with simulated clients: they drop out, straggle, report wrongly, or join late.

Every choice is a function of the run seed, so that a run with faults can be repeated.
"""

from dataclasses import dataclass, replace

import numpy as np

from fedforward.core.seeds import derive, generator
from fedforward.messages.report import Report


@dataclass(frozen=True)
class Faults:
    """The settings.

    Attributes:
        run_seed: of every choice.
        dropout: chance that a client is gone for a round.
        straggler: chance that a report comes after the deadline.
        byzantine: share of the clients whose reports are wrong.
        late_join: so many clients, the last ones, join in round `late_join_round`.
        late_join_round: counted from 1.
    """

    run_seed: int = 0
    dropout: float = 0.0
    straggler: float = 0.0
    byzantine: float = 0.0
    late_join: int = 0
    late_join_round: int = 1

    def available(self, round_number: int, clients: int) -> list[int]:
        """Who has joined by a round (from 0)."""
        there = clients - self.late_join if round_number + 1 < self.late_join_round else clients
        return list(range(there))

    def fails(self, round_number: int, attempt: int, client: int) -> bool:
        """Whether a client is gone for a round, and sends nothing."""
        return self._chance("failing", round_number, attempt, client) < self.dropout

    def late_report(self, round_number: int, attempt: int, client: int) -> bool:
        """Whether its report comes after the deadline."""
        return self._chance("slow", round_number, attempt, client) < self.straggler

    def sent(self, client: int, data: bytes) -> bytes:
        """The report as it is sent: a byzantine client sends a wrong one.

        It multiplies its projected gradients by -10, claims another state than it holds, or sends
        a message that is cut short.
        """
        if self._chance("lying", client) >= self.byzantine:
            return data
        report = Report.decode(data)
        mode = derive(self.run_seed, "lie", client) % 3
        if mode == 0:
            return replace(report, gradients=np.float32(-10.0) * report.gradients).encode()
        if mode == 1 and report.digest:
            return replace(report, digest=bytes(b ^ 0xFF for b in report.digest)).encode()
        return data if mode == 1 else data[:-1]

    def _chance(self, purpose: str, *where: int) -> float:
        return float(generator(self.run_seed, purpose, *where).random())
