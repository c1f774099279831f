"""The client's side of a round: catch up with the ledger, run the method, report.

A `Replica` is one copy of the weights with its place in the ledger. In a deployment every client
has its own; in a simulation all clients share one, and only the first to catch up does the work.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np

from fedforward.core.steps import Evaluation, Probe, Update
from fedforward.messages.codec import (
    DIGEST_BYTES,
    Entry,
    MessageError,
    Report,
    Snapshot,
    Task,
    unpack_blocks,
)
from fedforward.methods.base import BatchStream, FirstOrderMethod, Method
from fedforward.methods.fedkseed import Accumulators
from fedforward.models.base import CausalModel


class Replica:
    """A model and how many ledger rounds it has committed.

    Attributes:
        model: holds the weights.
        rounds: ledger rounds that the weights contain.
    """

    def __init__(
        self, model: CausalModel, run_seed: int, directions: int, candidates: int = 0
    ) -> None:
        """`candidates`: K, for a method whose directions come from K seeds of the whole run."""
        self.model = model
        self.run_seed = run_seed
        self.directions = directions
        self.candidates = candidates
        self.rounds = 0
        self._accumulators = Accumulators(run_seed, candidates)
        self._digest: tuple[int, bytes] = (-1, b"")
        if candidates:
            # Before anything moves: every state is a sum on top of the base.
            model.keep_base()

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
            updates.append(self._update(entry))
        self.model.commit(updates)
        self.rounds += len(updates)

    def _update(self, entry: Entry) -> Update:
        if not self.candidates:
            return entry.update(self.run_seed, self.directions, len(self.model.layout.blocks))
        if entry.increments is None:
            raise MessageError(
                f"Ledger round {entry.round} was refused: it has no increments of candidate seeds."
            )
        self._accumulators.add(entry.increments)
        return self._accumulators.update(entry.round)

    def digest(self) -> bytes:
        """The first bytes of the tuned state's SHA-256, as reports carry them."""
        if self._digest[0] != self.rounds:
            self._digest = (self.rounds, self.model.digest()[:DIGEST_BYTES])
        return self._digest[1]

    def reset(self) -> None:
        """Back to the base model, with no round committed."""
        self.model.reset()
        self.rounds = 0
        self._accumulators = Accumulators(self.run_seed, self.candidates)
        self._digest = (-1, b"")

    def snapshot(self) -> Snapshot:
        """The tuned state as another client can take it over."""
        return Snapshot(self.rounds, self.model.digest(), self.model.export_bytes())

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a state in place of the entries that led to it.

        Raises:
            MessageError: its size or its digest is not that of this run's tuned state.
        """
        if snapshot.rounds <= self.rounds:
            return
        if self.candidates:
            if len(snapshot.data) != 8 * self.candidates:
                raise MessageError(
                    f"A snapshot of {len(snapshot.data)} bytes was refused: the accumulators of "
                    f"{self.candidates} candidate seeds are {8 * self.candidates}."
                )
            self._accumulators.values = np.frombuffer(snapshot.data, "<i8").astype(np.int64)
            self.model.commit([self._accumulators.update(snapshot.rounds - 1)])
        else:
            self.model.assign_bytes(snapshot.data)
        self.rounds = snapshot.rounds
        if snapshot.digest and self.model.digest() != snapshot.digest:
            self.reset()
            raise MessageError(
                f"A snapshot after {snapshot.rounds} rounds was refused: its bytes are not what "
                "its digest says. This client starts again from the base."
            )


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
        self.come_to(task)
        report: Report
        if isinstance(self.method, FirstOrderMethod):
            model = self.replica.model
            digest = model.digest()[:DIGEST_BYTES] if task.digest_wanted else b""
            report = self.method.train(task, self.batches, model)
        else:
            digest = self.replica.digest() if task.digest_wanted else b""
            blocks = len(self.replica.model.layout.blocks)
            active = unpack_blocks(task.blocks, blocks) if task.blocks else None
            report = yield from self.method.local_round(task, self.batches, active)
        return replace(report, digest=digest).encode()

    def come_to(self, task: Task) -> None:
        """Bring the replica to the state that a task starts from.

        Raises:
            MessageError: the task does not hold what this client lacks, or is damaged.
        """
        model = self.replica.model
        first_order = isinstance(self.method, FirstOrderMethod)
        if len(task.state) not in ((0, model.layout.parameters) if first_order else (0,)):
            raise MessageError(f"A task with a state of {len(task.state)} numbers was refused.")
        if len(task.state):
            model.assign_state(task.state)
        if task.reset:
            self.replica.reset()
        if task.snapshot:
            self.replica.restore(Snapshot.decode(task.snapshot))
        self.replica.catch_up(task.entries)
        if not first_order and task.round != self.replica.rounds:
            raise MessageError(
                f"A task for round {task.round} was refused: this client has "
                f"{self.replica.rounds} rounds and was not sent what it lacks."
            )
