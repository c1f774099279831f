"""The client's side of a round: catch up with the ledger, run the method, report.

A `Replica` is one copy of the weights with its place in the ledger. In a deployment every client
has its own; in a simulation all clients share one, and only the first to catch up does the work.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace

from fedforward.messages import DIGEST_BYTES, Entry, MessageError, Report, Task
from fedforward.methods import BatchStream, FirstOrderMethod, Method
from fedforward.models.causal_lm import CausalModel
from fedforward.steps import Evaluation, Probe, Update


class Replica:
    """A model and how many ledger rounds it has committed.

    Attributes:
        model: holds the weights.
        rounds: ledger rounds that the weights contain.
    """

    def __init__(self, model: CausalModel, run_seed: int, directions: int) -> None:
        self.model = model
        self.run_seed = run_seed
        self.directions = directions
        self.rounds = 0

    def catch_up(self, entries: Sequence[Entry]) -> None:
        """Commit the entries that are not yet in the weights.

        Raises:
            MessageError: entries are missing in between.
        """
        updates: list[Update] = []
        for entry in entries:
            if entry.round < self.rounds:
                continue
            if entry.round != self.rounds + len(updates):
                raise MessageError(
                    f"Ledger round {entry.round} was refused: this client has "
                    f"{self.rounds + len(updates)} rounds, so the ones in between are missing."
                )
            updates.append(entry.update(self.run_seed, self.directions))
        self.model.commit(updates)
        self.rounds += len(updates)


class Client:
    """One party: its batches, its number, and the replica that it works on."""

    def __init__(
        self,
        number: int,
        batches: BatchStream,
        replica: Replica,
        method: Method | FirstOrderMethod,
    ) -> None:
        self.number = number
        self.batches = batches
        self.replica = replica
        self.method = method

    def answer(self, data: bytes) -> Generator[Sequence[Probe], Sequence[Evaluation], bytes]:
        """Do an encoded task; yields probes, is sent evaluations, returns the encoded report."""
        task = Task.decode(data)
        if task.client != self.number:
            raise MessageError(
                f"A task for client {task.client} was refused by client {self.number}."
            )
        model = self.replica.model
        first_order = isinstance(self.method, FirstOrderMethod)
        if len(task.state) not in ((0, model.layout.parameters) if first_order else (0,)):
            raise MessageError(f"A task with a state of {len(task.state)} numbers was refused.")
        if len(task.state):
            model.assign_state(task.state)
        self.replica.catch_up(task.entries)
        if not first_order and task.round != self.replica.rounds:
            raise MessageError(
                f"A task for round {task.round} was refused: this client has "
                f"{self.replica.rounds} rounds and was not sent what it lacks."
            )
        digest = model.digest()[:DIGEST_BYTES] if task.digest_wanted else b""
        report: Report
        if isinstance(self.method, FirstOrderMethod):
            report = self.method.train(task, self.batches, model)
        else:
            report = yield from self.method.local_round(task, self.batches, self.replica.run_seed)
        return replace(report, digest=digest).encode()
