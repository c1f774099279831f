"""The local runtime: any number of clients in one process, on one copy of the base weights.

Clients whose probes fit one forward pass together run in lockstep; a client is only its position
in its own round, so memory does not grow with their number. Messages are encoded and decoded as on
a wire, and their bytes are counted.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from fedforward.federation.client import Client
from fedforward.federation.ledger import Round
from fedforward.federation.server import Server
from fedforward.models.causal_lm import CausalModel
from fedforward.steps import Evaluation, Probe


@dataclass(frozen=True)
class Traffic:
    """Encoded bytes of one round, per participating client (the mean)."""

    up: float
    down: float


class LocalRuntime:
    """Carries the messages of a simulated federation."""

    def __init__(
        self, server: Server, clients: Sequence[Client], model: CausalModel, together: int
    ) -> None:
        """`together`: clients that run in lockstep, each with its own probes."""
        self.server = server
        self.clients = clients
        self.model = model
        self.together = together

    def run_round(self) -> tuple[Round, Traffic]:
        """One whole round, from tasks to the ledger."""
        tasks = self.server.open_round()
        participants = self.server.participants()
        reports: list[bytes] = []
        for begin in range(0, len(tasks), self.together):
            group = [
                self.clients[number].answer(task)
                for number, task in zip(
                    participants[begin : begin + self.together],
                    tasks[begin : begin + self.together],
                    strict=True,
                )
            ]
            reports += _in_lockstep(group, self.model)
        for report in reports:
            self.server.receive(report)
        record = self.server.close_round()
        traffic = Traffic(
            up=sum(map(len, reports)) / len(reports), down=sum(map(len, tasks)) / len(tasks)
        )
        return record, traffic


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
