"""The client's side of a round: catch up with the ledger, run the method, report.

A `Replica` is one copy of the weights with its place in the ledger. In a deployment every client
has its own; in a simulation all clients share one, and only the first to catch up does the work.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import MessageError
from fedforward.core.steps import Evaluation, Probe
from fedforward.data.sampler import Batches, PoissonSamples
from fedforward.federation.releases import Releases
from fedforward.federation.secure_sums import part_of
from fedforward.federation.witness import Seen
from fedforward.messages.entry import Entry, remaining, takes_back
from fedforward.messages.report import DIGEST_BYTES, NO_FLOATS, Report
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from fedforward.methods.base import BatchStream, Method
from fedforward.methods.privacy import Mechanism
from fedforward.methods.report_filters import ReportFilter
from fedforward.models.base import CausalModel


class Replica:
    """A model and how many ledger rounds it has committed.

    Attributes:
        model: holds the weights.
        method: knows what a ledger entry does to them.
        rounds: ledger rounds that the weights contain.
        state: what the method remembers.
        seen: what it was sent of the ledger.
        known: what was seen before, by the round where it begins; other entries are refused.
        last_entry: the last round that the weights contain; None before one, or if it came in a
            snapshot alone.
    """

    def __init__(self, model: CausalModel, method: Method) -> None:
        """`model` is at its base weights."""
        self.model = model
        self.method = method
        self.rounds = 0
        self.state: Any = method.new_state()
        self.seen = Seen(0, 0)
        self.known: dict[int, Seen] = {}
        self.last_entry: Entry | None = None
        self._digest: tuple[int, bytes] = (-1, b"")
        if method.capabilities.from_base:
            # Before anything moves: every state is a sum on top of the base.
            model.keep_base()

    def catch_up(self, entries: Sequence[Entry]) -> None:
        """Commit the entries that are not yet in the weights.

        Where one takes back rounds that the weights contain, all begins again from the base.

        Raises:
            MessageError: entries are missing in between, or are not of this run's method.
        """
        if takes_back(entries, self.rounds):
            if entries[0].round:
                raise MessageError(
                    f"Ledger rounds from {entries[0].round} on were refused: they take back rounds "
                    "that this client holds, so all rounds from 0 on are needed."
                )
            self.reset()
        due = [entry for entry in entries if entry.round >= self.rounds]
        for place, entry in enumerate(due):
            if entry.round != self.rounds + place:
                raise MessageError(
                    f"Ledger round {entry.round} was refused: this client has "
                    f"{self.rounds + place} rounds, so the ones in between are missing."
                )
        seen = self._recognised(due)
        before = self.state.encode()
        try:
            updates = [
                self.method.update(entry, self.state)
                for entry in remaining(due)
                if not entry.goes_back
            ]
        except Exception:
            # What the first entries changed would be changed again when they come again.
            self.state = self.method.new_state()
            self.state.restore(before)
            raise
        try:
            self.model.commit(updates)
        except Exception:
            # Some of the weights may have moved.
            self.reset()
            raise
        self.rounds += len(due)
        self.seen = seen
        # A snapshot comes with the last entry that is in it.
        if entries and entries[-1].round == self.rounds - 1:
            self.last_entry = entries[-1]

    def digest(self) -> bytes:
        """The first bytes of the tuned state's SHA-256, as reports carry them."""
        if self._digest[0] != self.rounds:
            self._digest = (self.rounds, self.model.digest()[:DIGEST_BYTES])
        return self._digest[1]

    def reset(self) -> None:
        """Back to the base model, with no round committed."""
        self.model.reset()
        self.rounds = 0
        self.state = self.method.new_state()
        self.seen = Seen(0, 0)
        self.last_entry = None
        self._digest = (-1, b"")

    def _recognised(self, entries: Sequence[Entry]) -> Seen:
        """What was seen with the next entries, which are those that were seen before."""
        found, known = self.seen, self.known.get(self.seen.begin)
        for found in self.seen.each(entries):
            if known is not None and found.rounds == known.rounds and found != known:
                raise MessageError(
                    f"Ledger rounds {known.begin} to {known.rounds - 1} were refused: they are not "
                    "those that this site was sent before. The server has another history of this "
                    "run now. If that is as it should be, remove the run's file in seen/ of this "
                    "site's folder, and start the site again."
                )
        return found

    def snapshot(self) -> Snapshot:
        """The tuned state as another client can take it over."""
        tensors = b"" if self.method.capabilities.state_is_whole else self.model.export_bytes()
        return Snapshot(self.rounds, self.model.digest(), tensors, self.state.encode())

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a state in place of the entries that led to it.

        Raises:
            MessageError: its size or its digest is not that of this run's tuned state.
        """
        if snapshot.rounds <= self.rounds:
            return
        try:
            self.method.restore(self.model, snapshot, self.state)
        except MessageError:
            # Half of it may have been taken over.
            self.reset()
            raise
        self.rounds = snapshot.rounds
        self.seen = Seen(snapshot.rounds, snapshot.rounds)
        self.last_entry = None
        if (snapshot.data or snapshot.digest) and self.model.digest() != snapshot.digest:
            self.reset()
            raise MessageError(
                f"A snapshot after {snapshot.rounds} rounds was refused: its bytes are not what "
                "its digest says. This client starts again from the base."
            )


def along_update(evaluations: Sequence[Sequence[Evaluation]]) -> NDArray[np.float32]:
    """The mean losses at three points, and the standard error of the second less the first.

    Args:
        evaluations: of the same batches at each point.

    Returns:
        float32 [4]; what is not finite, or beyond float32, is the largest number that it holds.
    """
    sums = [np.concatenate([part.sums for part in point]) for point in evaluations]
    counts = np.concatenate([part.counts for part in evaluations[0]])
    total = max(1, int(counts.sum()))
    with np.errstate(invalid="ignore", over="ignore"):
        losses = [float(part.sum()) / total for part in sums]
        rises = (sums[1] - sums[0]) * (len(counts) / total)
        # A single example says nothing of chance: no rise is more than that.
        rise = abs(losses[1] - losses[0])
        error = rises.std(ddof=1) / math.sqrt(len(rises)) if len(rises) > 1 else rise
    numbers = np.array([*losses, error])
    largest = float(np.finfo(np.float32).max) / 2
    known = np.nan_to_num(numbers, nan=largest, posinf=largest, neginf=-largest)
    reported: NDArray[np.float32] = known.clip(-largest, largest).astype(np.float32)
    return reported


class Client:
    """One party: its batches, its number, and the replica that it works on.

    Attributes:
        filters: what is done to a report before it leaves, in this order.
        sums: whether it answers with a part of a sum, a `MaskedReport` without masks.
        mechanism: that its scalars go through before it moves or reports; None is none.
        releases: the rounds that it has answered with noise.
    """

    def __init__(
        self,
        number: int,
        batches: BatchStream,
        replica: Replica,
        filters: Sequence[ReportFilter] = (),
        *,
        sums: bool = False,
        mechanism: Mechanism | None = None,
        releases: Releases | None = None,
    ) -> None:
        """`batches` are `Batches` where there is a mechanism."""
        self.number = number
        self.batches = batches
        self.replica = replica
        self.filters = tuple(filters)
        self.sums = sums
        self.mechanism = mechanism
        self.releases = Releases() if releases is None else releases

    def answer(self, data: bytes) -> Generator[Sequence[Probe], Sequence[Evaluation], bytes]:
        """Do an encoded task; yields probes, is sent evaluations, returns the encoded report."""
        task = Task.decode(data)
        if task.client != self.number:
            raise MessageError(
                f"A task for client {task.client} was refused by client {self.number}."
            )
        self.sync(task)
        if self.mechanism is not None:
            return (yield from self._answer_once(task, self.mechanism))
        digest = self.replica.digest() if task.digest_wanted else b""
        searched = NO_FLOATS
        if task.line_search:
            searched = yield from self._search(task)
        report = yield from self.replica.method.local_round(task, self.batches, self.replica.model)
        report = self._filtered(replace(report, line_search=searched))
        report = replace(report, digest=digest)
        return (part_of(report) if self.sums else report).encode()

    def _filtered(self, report: Report) -> Report:
        """What leaves in place of a report; filters see votes as scalars of 1 and -1."""
        method = self.replica.method
        votes = method.capabilities.votes
        if votes:
            report = replace(report, gradients=method.scalars(report).astype(np.float32))
        for apply in self.filters:
            report = apply(report)
        return method.with_scalars(report, report.gradients) if votes else report

    def _answer_once(
        self, task: Task, mechanism: Mechanism
    ) -> Generator[Sequence[Probe], Sequence[Evaluation], bytes]:
        """The report of a private round: a new one, or the one that was sent before."""
        if task.line_search:
            raise MessageError("A task with a line search was refused: these terms have [privacy].")
        state = self.replica.digest()
        report = self.releases.again(task, state)
        if report is None:
            report = yield from self._private_round(task, mechanism)
            self.releases.note(task, state, report)
        return replace(report, digest=state if task.digest_wanted else b"").encode()

    def _private_round(
        self, task: Task, mechanism: Mechanism
    ) -> Generator[Sequence[Probe], Sequence[Evaluation], Report]:
        """The method's round on noisy scalars of Poisson samples."""
        method = mechanism.applied(self.replica.method)
        samples = PoissonSamples(
            cast(Batches, self.batches),
            mechanism.entropy,
            chance=mechanism.chance,
            said=mechanism.examples,
        )
        report = yield from method.local_round(task, samples)
        return self._filtered(report)

    def _search(
        self, task: Task
    ) -> Generator[Sequence[Probe], Sequence[Evaluation], NDArray[np.float32]]:
        """Measure the coming batches at 0, 1 and 2 times the last round's update.

        Returns:
            As `Report.line_search`; empty where the last round came in a snapshot alone.
        """
        last, method = self.replica.last_entry, self.replica.method
        if last is None or last.round != task.round - 1:
            return NO_FLOATS
        update = method.round_steps(last)
        first = task.round * method.local_steps
        batches = [self.batches[first + place] for place in range(task.line_search)]
        evaluations = yield [
            probe
            for batch in batches
            for probe in (
                Probe(batch, perturbation=update.scaled(-1.0)),
                Probe(batch),
                Probe(batch, perturbation=update),
            )
        ]
        return along_update([evaluations[place::3] for place in range(3)])

    def sync(self, task: Task) -> None:
        """Bring the replica to the state that a task starts from.

        Raises:
            MessageError: the task does not hold what this client lacks, or is damaged.
        """
        blocks = len(self.replica.model.layout.blocks)
        if task.blocks is not None and len(task.blocks) != blocks:
            raise MessageError(
                f"A task with a set of {len(task.blocks)} blocks was refused: this model has "
                f"{blocks} blocks."
            )
        if task.reset:
            self.replica.reset()
        if task.snapshot:
            if takes_back(task.entries, self.replica.rounds):
                # The snapshot is of rounds that stayed, perhaps of fewer than are held here.
                self.replica.reset()
            self.replica.restore(Snapshot.decode(task.snapshot))
        self.replica.catch_up(task.entries)
        if task.round != self.replica.rounds:
            raise MessageError(
                f"A task for round {task.round} was refused: this client has "
                f"{self.replica.rounds} rounds and was not sent what it lacks."
            )
