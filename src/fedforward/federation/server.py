"""The server's side of a round: who takes part, at which rate, and what their reports add up to.

It knows seeds, the layout and scalars, and no weights. All of its state is in the ledger, so a
server that was killed goes on from the file. It imports no PyTorch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedforward.directions import Distribution, Layout
from fedforward.federation.learning_rates import WINDOW, RateSettings, rates, update_differences
from fedforward.federation.ledger import Ledger, Origin, Round
from fedforward.messages import Entry, MessageError, Report, Task
from fedforward.methods import FirstOrderMethod, Method, Returned
from fedforward.seeds import generator

#: Clients prove their tuned state in every round whose number this divides.
DIGEST_EVERY = 10


@dataclass(frozen=True)
class ServerSettings:
    """What the server must know of a run.

    Attributes:
        run_seed: of every derived choice.
        examples: training examples of each client; clients are numbered from 0.
        participation: share of the clients in each round, in (0, 1].
        weights: "equal" or "examples".
        rates: how learning rates are chosen.
        layout: of the tunable space.
        distribution: of the directions.
    """

    run_seed: int
    examples: tuple[int, ...]
    participation: float
    weights: str
    rates: RateSettings
    layout: Layout
    distribution: Distribution


class Server:
    """Opens rounds with tasks, checks reports, and closes rounds into the ledger."""

    def __init__(
        self, settings: ServerSettings, method: Method | FirstOrderMethod, ledger: Ledger
    ) -> None:
        self.settings = settings
        self.method = method
        self.ledger = ledger
        self._history = list(ledger.rounds(ledger.length - WINDOW))
        self._sent = dict.fromkeys(range(len(settings.examples)), 0)
        for entry in ledger.entries():
            for part in entry.contributions:
                self._sent[part.client] = entry.round
        self._rates: dict[int, float] = {}
        self._reports: dict[int, Report] = {}

    @property
    def round(self) -> int:
        """The number of the round that is open or comes next."""
        return self.ledger.length

    @property
    def _digest_wanted(self) -> bool:
        return self.round % DIGEST_EVERY == 0

    def participants(self) -> list[int]:
        """The clients of the coming round, ascending: a function of run seed and round."""
        clients = len(self.settings.examples)
        count = max(1, round(self.settings.participation * clients))
        if count == clients:
            return list(range(clients))
        random = generator(self.settings.run_seed, "participation", self.round)
        return sorted(random.choice(clients, size=count, replace=False).tolist())

    def open_round(self) -> list[bytes]:
        """Encoded tasks, one per participant, each with the ledger entries that client lacks."""
        participants = self.participants()
        self._reports = {}
        self._rates = rates(
            self.settings.rates,
            self.round,
            participants,
            self._history,
            self.settings.run_seed,
            self._differences,
        )
        tasks = []
        for client in participants:
            task = Task(
                round=self.round,
                client=client,
                learning_rate=self._rates[client],
                digest_wanted=self._digest_wanted,
                entries=self._lacking(client),
                state=self._state(),
            )
            tasks.append(task.encode())
            self._sent[client] = self.round
        return tasks

    def _lacking(self, client: int) -> tuple[Entry, ...]:
        return tuple(self.ledger.entries(self._sent[client]))

    def _state(self) -> NDArray[np.float32]:
        return np.empty(0, np.float32)

    def _differences(self, record: Round) -> dict[int, float]:
        return update_differences(
            record,
            self.settings.layout,
            self.settings.distribution,
            self.settings.run_seed,
            self.method.directions,
        )

    def receive(self, data: bytes) -> None:
        """Take one encoded report.

        Raises:
            MessageError: it is damaged, of another round, or from a client without a task.
        """
        report = Report.decode(data)
        if report.round != self.round:
            raise MessageError(
                f"A report for round {report.round} was refused: round {self.round} is open."
            )
        if report.client not in self._rates:
            raise MessageError(
                f"A report of client {report.client} was refused: it has no task in this round."
            )
        if report.client in self._reports:
            raise MessageError(f"A second report of client {report.client} was refused.")
        self._check(report)
        if bool(report.digest) != self._digest_wanted:
            raise MessageError(
                f"A report of client {report.client} was refused: it "
                f"{'lacks the digest' if self._digest_wanted else 'has a digest'} of the state."
            )
        steps = self.method.local_steps
        if report.skipped > steps or math.isnan(report.loss) != (report.skipped == steps):
            raise MessageError(
                f"A report of client {report.client} was refused: {report.skipped} of {steps} "
                f"steps skipped and a loss of {report.loss} do not fit together."
            )
        self._reports[report.client] = report

    def _check(self, report: Report) -> None:
        expected = self.method.local_steps * self.method.directions
        if len(report.gradients) != expected or report.state is not None:
            raise MessageError(
                f"A report of client {report.client} was refused: it has "
                f"{len(report.gradients)} projected gradients, not {expected}."
            )

    def close_round(self) -> Round:
        """Join the reports, append the round to the ledger, and return it.

        Raises:
            MessageError: clients disagree on the tuned state.
        """
        if not self._reports:
            raise MessageError(f"Round {self.round} cannot be closed: nobody has reported.")
        reports = [self._reports[client] for client in sorted(self._reports)]
        _agree(reports)
        returned = [
            Returned(weight, self._rates[report.client], report)
            for weight, report in zip(self._weights(reports), reports, strict=True)
        ]
        record = self._join(returned)
        self.ledger.append(record)
        self._history = [*self._history, record][-WINDOW:]
        self._reports, self._rates = {}, {}
        return record

    def _join(self, returned: Sequence[Returned]) -> Round:
        if isinstance(self.method, FirstOrderMethod):
            raise TypeError("first-order methods need a TensorServer")
        entry = Entry(self.round, self.method.aggregate(returned))
        return Round(entry, origins(returned))

    def _weights(self, reports: Sequence[Report]) -> list[float]:
        if self.settings.weights == "equal":
            return [1.0 / len(reports)] * len(reports)
        counts = [self.settings.examples[report.client] for report in reports]
        return [count / sum(counts) for count in counts]


def origins(returned: Sequence[Returned]) -> tuple[Origin, ...]:
    """What the ledger keeps of the reports of a round."""
    return tuple(Origin(part.learning_rate, part.weight, part.report) for part in returned)


def _agree(reports: Sequence[Report]) -> None:
    digests = {report.digest for report in reports if report.digest}
    if len(digests) > 1:
        first = next(r for r in reports if r.digest)
        other = next(r for r in reports if r.digest and r.digest != first.digest)
        raise MessageError(
            f"Clients {first.client} and {other.client} hold different tuned states "
            f"({first.digest.hex()} and {other.digest.hex()}) in round {first.round}. One of them "
            "has another base model or a damaged state; it must start again from the base."
        )
