"""The local runtime: any number of clients in one process, on one copy of the base weights.

Clients whose probes fit one forward pass together run in lockstep; a client is only its position
in its own round, so memory does not grow with their number. Messages are encoded and decoded as on
a wire, and their bytes are counted.
"""

import math
from collections.abc import Generator, Mapping, Sequence

from fedforward.core.errors import MessageError
from fedforward.core.steps import Evaluation, Probe
from fedforward.federation.agreement import QuorumError, TieError
from fedforward.federation.client import Client
from fedforward.federation.server import Server
from fedforward.models.base import CausalModel
from fedforward.training.attacks import Attack
from fedforward.training.faults import Faults
from fedforward.training.metrics import Attendance, RoundOutcome, Traffic

NO_FAULTS = Faults()
NO_ATTACK = Attack()
#: Attempts at a round before its quorum counts as out of reach.
ATTEMPTS = 5


class LocalRuntime:
    """Carries the messages of a simulated federation."""

    def __init__(
        self,
        server: Server,
        clients: Sequence[Client],
        model: CausalModel,
        together: int,
        faults: Faults = NO_FAULTS,
        attack: Attack = NO_ATTACK,
    ) -> None:
        """`together`: clients that run in lockstep, each with its own probes."""
        self.server = server
        self.clients = clients
        self.model = model
        self.together = together
        self.faults = faults
        self.attack = attack

    def run_round(self) -> RoundOutcome:
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
            except QuorumError as error:
                if isinstance(error, TieError) and error.final:
                    raise QuorumError(error.sentence("clients")) from error
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
        return RoundOutcome(record, traffic, attendance)

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
            reports |= zip(part, _in_lockstep(group, self.model), strict=True)
        sent = self.attack.sent(self.server.method, self.server.round, reports)
        return {
            client: self.faults.sent(client, data)
            for client, data in zip(reports, sent, strict=True)
        }

    def _deliver(self, data: bytes) -> None:
        """Hand a report to the server, which may refuse it; one of an honest run it must not."""
        try:
            self.server.receive(data)
        except MessageError:
            if self.faults == NO_FAULTS and self.attack == NO_ATTACK:
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
