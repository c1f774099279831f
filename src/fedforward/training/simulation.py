"""The local runtime: any number of clients in one process, on one copy of the base weights.

Clients whose probes fit one forward pass together run in lockstep; a client is only its position
in its own round, so memory does not grow with their number. Messages are encoded and decoded as on
a wire, and their bytes are counted.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from fedforward.core.errors import MessageError
from fedforward.core.steps import Evaluation, Probe
from fedforward.federation.agreement import QuorumError
from fedforward.federation.client import Client
from fedforward.federation.ledger import Round
from fedforward.federation.server import Server
from fedforward.models.base import CausalModel
from fedforward.training.faults import Faults

NO_FAULTS = Faults()
#: Attempts at a round before its quorum counts as out of reach.
ATTEMPTS = 5


@dataclass(frozen=True)
class Traffic:
    """Encoded bytes of one round, per client that was asked (the mean).

    `snapshots` are bytes of snapshots that a client sent up, whole.
    """

    up: float
    down: float
    snapshots: int = 0


@dataclass(frozen=True)
class Attendance:
    """What became of the clients that were asked in a round."""

    asked: int
    reported: int
    failed: int
    late: int
    refused: int


class LocalRuntime:
    """Carries the messages of a simulated federation."""

    def __init__(
        self,
        server: Server,
        clients: Sequence[Client],
        model: CausalModel,
        together: int,
        faults: Faults = NO_FAULTS,
    ) -> None:
        """`together`: clients that run in lockstep, each with its own probes."""
        self.server = server
        self.clients = clients
        self.model = model
        self.together = together
        self.faults = faults

    def run_round(self) -> tuple[Round, Traffic, Attendance]:
        """One whole round, from tasks to the ledger.

        Raises:
            QuorumError: in no attempt enough clients reported.
        """
        number, server = self.server.round, self.server
        there = self.faults.available(number, len(self.clients))
        snapshots = self._snapshot(there)
        for attempt in range(ATTEMPTS):
            refused = server.refused
            tasks = server.open_round(there)
            failed = {c for c in tasks if self.faults.fails(number, attempt, c)}
            reports = self._answers({c: tasks[c] for c in tasks if c not in failed})
            late = [c for c in reports if self.faults.late_report(number, attempt, c)]
            for client in [c for c in reports if c not in late]:
                self._deliver(reports[client])
            # Beyond the deadline a server only waits for its quorum.
            waiting = list(late)
            while waiting and not server.ready(math.inf):
                self._deliver(reports[waiting.pop(0)])
            try:
                record = server.close_round()
            except QuorumError:
                if attempt == ATTEMPTS - 1:
                    raise
                continue
            for client in waiting:
                self._deliver(reports[client])
            break
        traffic = Traffic(
            up=sum(map(len, reports.values())) / len(tasks),
            down=sum(map(len, tasks.values())) / len(tasks),
            snapshots=snapshots,
        )
        attendance = Attendance(
            asked=len(tasks),
            reported=len(record.results),
            failed=len(failed),
            late=len(waiting),
            refused=server.refused - refused - len(waiting),
        )
        return record, traffic, attendance

    def _snapshot(self, there: Sequence[int]) -> int:
        """Fetch a snapshot if one pays; returns its bytes."""
        source = self.server.snapshot_wanted(there)
        if source is None:
            return 0
        data = self.clients[source].replica.snapshot().encode()
        self.server.receive_snapshot(data, source)
        return len(data)

    def _answers(self, tasks: Mapping[int, bytes]) -> dict[int, bytes]:
        """Every client's report as it is sent, some clients in lockstep."""
        asked = list(tasks)
        reports: dict[int, bytes] = {}
        for begin in range(0, len(asked), self.together):
            part = asked[begin : begin + self.together]
            group = [self.clients[client].answer(tasks[client]) for client in part]
            for client, data in zip(part, _in_lockstep(group, self.model), strict=True):
                reports[client] = self.faults.sent(client, data)
        return reports

    def _deliver(self, data: bytes) -> None:
        """Hand a report to the server, which may refuse it; without faults it must not."""
        try:
            self.server.receive(data)
        except MessageError:
            if self.faults == NO_FAULTS:
                raise


def _in_lockstep(
    group: Sequence[Generator[Sequence[Probe], Sequence[Evaluation], bytes]], model: CausalModel
) -> list[bytes]:
    """Advance all clients of a group step by step; their probes go to the model in one call."""
    reports: dict[int, bytes] = {}
    answers: dict[int, Sequence[Evaluation] | None] = dict.fromkeys(range(len(group)))
    while answers:
        asked: dict[int, Sequence[Probe]] = {}
        for place, answer in answers.items():
            try:
                # The first `send` must be None: it starts the generator.
                asked[place] = group[place].send(answer)  # type: ignore[arg-type]
            except StopIteration as done:
                reports[place] = done.value
        results = iter(model.evaluate([probe for probes in asked.values() for probe in probes]))
        answers = {place: [next(results) for _ in probes] for place, probes in asked.items()}
    return [reports[place] for place in range(len(group))]
