"""The server's side of a round: who takes part, at which rate, and what their reports add up to.

It knows seeds, the layout and scalars, and no weights. All of its state is in the ledger, so a
server that was killed goes on from the file. It imports no PyTorch.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import MessageError
from fedforward.core.seeds import generator
from fedforward.federation.agreement import QuorumError, TieError, majority
from fedforward.federation.client_privacy import SumNoise
from fedforward.federation.ledger import Ledger, Round
from fedforward.federation.plausibility import plausible_sizes, size_of
from fedforward.federation.rate_search import RateSearch, line_search_batches
from fedforward.federation.round_maker import RoundMaker, RoundSettings, weights_of
from fedforward.federation.secure_sums import EXTRA, bare_report, check_total, threshold_of
from fedforward.federation.snapshots import Snapshots
from fedforward.federation.state_file import read_state, write_state
from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.secure import MaskedReport, Total
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from fedforward.methods.base import Method

#: Clients prove their tuned state in every round whose number this divides.
DIGEST_EVERY = 10

#: From the participants of a round to the blocks that each perturbs, bool [participants, B].
Allocate = Callable[[Sequence[int]], NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class ServerSettings(RoundSettings):
    """What the server must know of a run, beside what an entry depends on.

    Attributes:
        examples: training examples of each client at the start; clients are numbered from 0.
        participation: share of the clients in each round, in (0, 1].
        quorum: reports without which a round cannot be closed.
        deadline: seconds after which a round is closed with the reports that are there.
        allocate: which blocks each participant perturbs; None is all.
        state_bytes: of the tuned tensors, which a snapshot carries.
        sum_noise: what is added to a sum before it is written; None is nothing.
    """

    examples: tuple[int, ...]
    participation: float
    quorum: int = 1
    deadline: float = math.inf
    allocate: Allocate | None = None
    state_bytes: int = 0
    sum_noise: SumNoise | None = None


class Server:
    """Opens rounds with tasks, checks reports, and closes rounds into the ledger.

    Attributes:
        examples: training examples of each client.
        held: for each client, how many ledger rounds it has shown to hold.
        refused: reports that were refused since the server was built, late ones included.
        disbelieved: clients whose projected gradients were too large to be believed in the last
            round that was to be closed.
        reset: clients whose state was refused, and that start again from the base next time.
        snapshots: of clients.
    """

    def __init__(self, settings: ServerSettings, method: Method, ledger: Ledger) -> None:
        """Bring a server to the end of a ledger.

        Raises:
            FedForwardError: the ledger's state lies beside it, and is missing or differs.
        """
        self.settings = settings
        self.method = method
        self.ledger = ledger
        self.examples = list(settings.examples)
        self.held = dict.fromkeys(range(len(settings.examples)), 0)
        self.refused = 0
        self.disbelieved: set[int] = set()
        self.reset: set[int] = set()
        self.snapshots = Snapshots(settings.state_bytes)
        self._maker = RoundMaker(settings, method)
        self._rates: dict[int, float] = {}
        self._multipliers: dict[int, float] = {}
        self._blocks: dict[int, NDArray[np.bool_]] = {}
        self._reports: dict[int, Any] = {}
        #: Clients that have started again because no state was that of most.
        self._tied: set[int] = set()
        self._digest_wanted = self._unproven = False
        self._own: tuple[int, bytes] = (-1, b"")
        self._read: tuple[int, dict[int, tuple[Entry, ...]]] = (0, {})
        self._returns: list[Entry] = []
        for record in ledger.remaining_rounds():
            self._maker.observe(record)
            self._remember(record)
        if not method.capabilities.replayable:
            read_state(ledger, self.state)

    @property
    def round(self) -> int:
        """The number of the round that is open or comes next."""
        return self.ledger.length

    @property
    def state(self) -> Any:
        """What the method remembers."""
        return self._maker.state

    @property
    def search(self) -> RateSearch | None:
        """Of the learning rate; None where it is given."""
        return self._maker.search

    def _remember(self, record: Round) -> None:
        """Take in a round that is in the ledger."""
        if record.entry.goes_back:
            self._returns.append(record.entry)
            # Sites that hold other rounds say so.
            self.held = dict.fromkeys(self.held, record.entry.round + 1)
        for result in record.results:
            self.held[result.report.client] = record.entry.round
        self._maker.remember(record)

    def participants(self, available: Sequence[int] | None = None) -> list[int]:
        """The coming round's clients, ascending: a function of run seed, round, and who is there.

        Args:
            available: clients that can be reached; None is all.
        """
        there = sorted(range(len(self.examples)) if available is None else available)
        count = max(1, round(self.settings.participation * len(there)))
        if count >= len(there):
            return there
        random = generator(self.settings.run_seed, "participation", self.round)
        return sorted(there[n] for n in random.choice(len(there), size=count, replace=False))

    def open_round(self, available: Sequence[int] | None = None) -> dict[int, bytes]:
        """Encoded tasks for the participants, each with what that client lacks.

        Args:
            available: clients that can be reached; None is all.
        """
        participants = self.participants(available)
        allocate = self.settings.allocate
        self._blocks = {}
        if allocate is not None:
            matrix = allocate(participants)
            self._blocks = dict(zip(participants, matrix, strict=True))
            participants = [client for client in participants if self._blocks[client].any()]
        self._reports = {}
        self._multipliers = self._maker.multipliers(participants)
        self._rates = self._maker.task_rates(self._multipliers)
        lacking = {client: self._lacking(client) for client in participants}
        # Whoever catches up proves that it has arrived where the others are.
        behind = any(len(entries) > 1 or start for start, entries in lacking.values())
        due = self.round % DIGEST_EVERY == 0 or self._unproven
        self._digest_wanted = due or behind or bool(self.reset)
        self._unproven = False
        return {client: self._task(client, *lacking[client]) for client in participants}

    def _task(self, client: int, snapshot: bytes, entries: tuple[Entry, ...]) -> bytes:
        return Task(
            round=self.round,
            client=client,
            learning_rate=self._rates.get(client, 0.0),
            digest_wanted=self._digest_wanted,
            entries=entries,
            reset=client in self.reset,
            blocks=self._blocks.get(client),
            payload=self.method.task_payload(self.state),
            line_search=self._search_batches,
            snapshot=snapshot,
        ).encode()

    def task(self, client: int) -> bytes:
        """The encoded task of a client of the open round once more, with what it lacks now.

        For a client that was started again in the middle of a round.
        """
        snapshot, entries = self._lacking(client)
        # The open round asks all for a proof or none; the next one makes up for it.
        self._unproven = self._unproven or len(entries) > 1 or bool(snapshot)
        return self._task(client, snapshot, entries)

    def sync_task(self, client: int) -> bytes:
        """An encoded task that only brings a client to the coming round, for it to evaluate."""
        snapshot, entries = self._lacking(client)
        reset = client in self.reset
        return Task(self.round, client, 0.0, True, entries, reset=reset, snapshot=snapshot).encode()

    def arrived(self, client: int) -> None:
        """Note that a client has shown to be where the coming round begins."""
        self.held[client] = self.round
        self.reset.discard(client)

    def enrol(self, client: int, examples: int, rounds: int = 0) -> None:
        """Take in a client that was not there at the start, or one that has come back.

        Args:
            client: its number; new clients get the next one.
            examples: training examples that it holds.
            rounds: ledger rounds that it says to hold.

        Raises:
            ValueError: numbers between the last client's and this one's have no client.
        """
        if client > len(self.examples):
            raise ValueError(f"client {client} cannot follow {len(self.examples) - 1}")
        if client == len(self.examples):
            self.examples.append(examples)
        self.examples[client] = examples
        self.held[client] = min(rounds, self.round)
        if rounds > self.round or self._taken_back(rounds):
            # It holds rounds that this ledger has not, so what it holds is another run's; or
            # rounds that were taken back.
            self.reset.add(client)

    def _taken_back(self, rounds: int) -> bool:
        """Whether the last of so many rounds was taken back."""
        return any(entry.keeps < rounds <= entry.round for entry in self._returns)

    @property
    def _search_batches(self) -> int:
        """Batches on which clients of the open round measure the update before; 0 is none."""
        if self.search is None or not self.search.applied:
            return 0
        spent = self.method.local_steps * self.method.estimator.probes_per_step
        return line_search_batches(spent)

    def _lacking(self, client: int) -> tuple[bytes, tuple[Entry, ...]]:
        """What brings a client to the coming round: a snapshot or nothing, and ledger entries."""
        begin = 0 if client in self.reset else self.held[client]
        entries = self._entries(begin)
        replayable = self.method.capabilities.replayable
        size = sum(len(entry.encode()) for entry in entries) if len(entries) > 1 else 0
        own = self._own_snapshot()
        if own and (size > len(own) or (entries and not replayable)):
            return Snapshot(self.round, b"", b"", own).encode(), self._measured()
        if own or not replayable:
            return b"", entries if replayable else ()
        snapshot = self.snapshots.for_client(client, begin, size)
        if snapshot is not None:
            return snapshot.encode(), self._entries(snapshot.rounds) or self._measured()
        return b"", entries

    def _measured(self) -> tuple[Entry, ...]:
        """The last round, for clients that have it in a snapshot and measure along its update."""
        return (self._maker.history[-1].entry,) if self._search_batches else ()

    def _own_snapshot(self) -> bytes:
        """What the method remembers, where it is the tuned state; empty otherwise."""
        if not self.method.capabilities.state_is_whole:
            return b""
        if self._own[0] != self.round:
            self._own = self.round, self.state.encode()
        return self._own[1]

    def _entries(self, begin: int) -> tuple[Entry, ...]:
        """The ledger from a round on; read once for all clients that lack the same."""
        if self._read[0] != self.round:
            self._read = (self.round, {})
        read = self._read[1]
        if begin not in read:
            read[begin] = tuple(self.ledger.entries(begin))
        return read[begin]

    def snapshot_wanted(self, available: Sequence[int] | None = None) -> int | None:
        """The client that is to make a snapshot before the round is opened, if one pays.

        None where the method itself remembers what a client can take over.
        """
        if self._own_snapshot() or not self.method.capabilities.replayable:
            return None
        return self.snapshots.wanted(
            self.participants(available),
            lambda client: self.held[client],
            self.reset,
            lambda begin: sum(len(entry.encode()) for entry in self.ledger.entries(begin)),
        )

    def receive_snapshot(self, data: bytes, source: int) -> None:
        """Keep a client's snapshot; see `Snapshots.receive`."""
        self.snapshots.receive(data, source, self.round, self._taken_back)

    @property
    def snapshot_bytes(self) -> int:
        """What a client takes over in place of entries: the method's memory or tuned tensors."""
        return len(self._own_snapshot()) or self.settings.state_bytes

    @property
    def entry_bytes(self) -> int:
        """The last round's ledger entry; 0 before there is one."""
        return len(self._maker.history[-1].entry.encode()) if self._maker.history else 0

    def break_even(self) -> int | None:
        """Missed rounds beyond which a snapshot is fewer bytes; None before the first round."""
        return -(-self.snapshot_bytes // self.entry_bytes) if self.entry_bytes else None

    def receive(self, data: bytes, sender: int | None = None) -> None:
        """Take one encoded report.

        Args:
            sender: the client that it came from, where that is known.

        Raises:
            MessageError: it is damaged, of another round, from a client without a task, or not
                the sender's own.
        """
        try:
            kind = MaskedReport if self.settings.secure_sums else Report
            report = kind.decode(data)
            if sender not in (None, report.client):
                raise MessageError(
                    f"A report of client {report.client} was refused: client {sender} sent it."
                )
            self._take(report)
        except MessageError:
            self.refused += 1
            raise

    def _take(self, report: Report | MaskedReport) -> None:
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
        if bool(report.digest) != self._digest_wanted:
            raise MessageError(
                f"A report of client {report.client} was refused: it "
                f"{'lacks the digest' if self._digest_wanted else 'has a digest'} of the state."
            )
        if isinstance(report, Report):
            self._check_numbers(report)
        elif len(report.values) != self._numbers + EXTRA:
            raise MessageError(
                f"A report of client {report.client} was refused: it has {len(report.values)} "
                f"masked numbers, not {self._numbers + EXTRA}."
            )
        self._reports[report.client] = report

    @property
    def _numbers(self) -> int:
        """Projected gradients of a report."""
        return self.method.local_steps * self.method.directions

    def _check_numbers(self, report: Report) -> None:
        self.method.check_report(report, self.settings.layout.parameters)
        self._check_line_search(report)
        steps = self.method.local_steps
        # A site may withhold its loss; a loss without a finite step there is none.
        if report.skipped > steps or (report.skipped == steps and not math.isnan(report.loss)):
            raise MessageError(
                f"A report of client {report.client} was refused: {report.skipped} of {steps} "
                f"steps skipped and a loss of {report.loss} do not fit together."
            )

    def _check_line_search(self, report: Report) -> None:
        found = report.line_search
        if not len(found):
            # The client does not have the last update.
            return
        if not self._search_batches:
            wrong = f"{len(found)} numbers along the last update, which were not asked for"
        elif len(found) != 4:
            wrong = f"{len(found)} numbers along the last update, which are 4"
        elif found[3] < 0:
            wrong = f"a standard error of {found[3]:g} along the last update"
        else:
            return
        raise MessageError(f"A report of client {report.client} was refused: it has {wrong}.")

    def missing(self) -> list[int]:
        """Clients with a task in the open round that have not reported, ascending."""
        return sorted(self._rates.keys() - self._reports.keys())

    def waits_for(self, client: int) -> bool:
        """Whether a client has a task in the open round and has not reported."""
        return client in self._rates and client not in self._reports

    def ready(self, seconds: float, gone: Collection[int] = ()) -> bool:
        """Whether the round is to be closed: no one is waited for, or the deadline is over.

        Args:
            seconds: since the round was opened.
            gone: clients that are not waited for, as long as there is a quorum without them.
        """
        if len(self._reports) == len(self._rates):
            return True
        enough = len(self._reports) >= self.quorum
        return enough and (seconds >= self.settings.deadline or set(self.missing()) <= set(gone))

    @property
    def quorum(self) -> int:
        """Reports without which the open round is not closed, if so many were asked."""
        quorum = self.settings.quorum
        return threshold_of(len(self._rates), quorum) if self.settings.secure_sums else quorum

    def close_round(self) -> Round:
        """Join the reports, append the round to the ledger, and return it.

        Clients whose state is not that of the majority are left out and told to start again.

        Raises:
            QuorumError: too few clients have reported, or they disagree on the tuned state and no
                majority tells who is right.
        """
        if self.settings.secure_sums:
            self.agree_on_sum()
            return self.close_sum(np.zeros(self._numbers + EXTRA, np.uint64))
        reports = self._agreeing([self._reports[client] for client in sorted(self._reports)])
        reports = self._believed(reports)
        self._check_quorum(len(reports))
        results = self._results(reports)
        kept = tuple(replace(part, report=self.method.kept(part.report)) for part in results)
        return self._close(Round(self._maker.entry(results), kept))

    def agree_on_sum(self, least: int = 1) -> list[int]:
        """The clients that the open round's sum is of: those whose state is that of most.

        Reports of others are dropped. Raises `QuorumError` as `close_round` does.

        Args:
            least: reports that are needed beside the quorum.
        """
        reports = self._agreeing([self._reports[client] for client in sorted(self._reports)])
        self._check_quorum(len(reports), least)
        self.keep_reports([report.client for report in reports])
        return list(self._reports)

    def keep_reports(self, clients: Collection[int]) -> None:
        """Drop the reports of all but these clients; what comes from now on is late."""
        self._reports = {n: report for n, report in self._reports.items() if n in clients}
        self._rates = {n: rate for n, rate in self._rates.items() if n in clients}

    def close_sum(self, masks: NDArray[np.uint64]) -> Round:
        """Take the masks off the sum, append the round to the ledger, and return it.

        Args:
            masks: the sum of all masks in the reports of `agree_on_sum`, modulo 2⁶⁴, uint64
                [local steps * directions + 3].

        Raises:
            QuorumError: the sum is one that reports within their limits cannot have.
        """
        parts = list(self._reports.values())
        values = np.sum([part.values for part in parts], axis=0, dtype=np.uint64) - masks
        total = Total(len(parts), values)
        try:
            check_total(total, self.method.local_steps, self._numbers)
        except MessageError as error:
            raise QuorumError(str(error)) from error
        if self.settings.sum_noise is not None:
            total = self.settings.sum_noise.added(total)
        results = self._results([bare_report(part, self.examples[part.client]) for part in parts])
        return self._close(Round(self._maker.entry(results, total), tuple(results), total))

    def go_back(self, rounds: int) -> Round:
        """Take back all rounds after the first so many, as a round of its own.

        Rates are a third from then on. Clients that hold any of those rounds start again from the
        base. Of the rounds before an earlier return none can be taken back.

        Raises:
            ValueError: there are not so many rounds, or an earlier return is not among them.
        """
        if not self._maker.last_return < rounds <= self.round:
            raise ValueError(
                f"{rounds} rounds cannot be kept of {self.round}, of which round "
                f"{self._maker.last_return} is the last that took others back"
            )
        record = Round(Entry(self.round, (), keeps=rounds), ())
        before = list(self.held.items())
        self.ledger.append(record)
        self._maker.go_back(record, self.ledger.remaining_rounds(record.entry.round))
        self._returns.append(record.entry)
        self.snapshots.forget_after(rounds)
        self._start_again(client for client, held in before if held > rounds)
        self._reports, self._rates = {}, {}
        return record

    @property
    def last_return(self) -> int:
        """The number of the last round that took others back; -1 if none did."""
        return self._maker.last_return

    def _check_quorum(self, reports: int, least: int = 1) -> None:
        needed = self.quorum if self.settings.secure_sums else min(self.quorum, len(self._rates))
        if reports < max(least, needed):
            raise QuorumError(
                f"Round {self.round} cannot be closed: {reports} of {len(self._rates)} "
                f"clients have reported, and the quorum is {max(least, self.quorum)}."
            )

    def _results(self, reports: Sequence[Report]) -> list[ClientResult]:
        examples = [self.examples[report.client] for report in reports]
        return self._maker.results(
            reports,
            weights_of(self.settings, examples),
            self._multipliers,
            self._blocks,
            last=self.round + 1 >= self.settings.rates.rounds,
        )

    def _close(self, record: Round) -> Round:
        """Append a round to the ledger, and go on to the next."""
        self.ledger.check(record)
        self._maker.observe(record)
        if not self.method.capabilities.replayable:
            write_state(self.ledger.path.parent, self.round + 1, self.state.encode())
        self.ledger.append(record)
        self._remember(record)
        self.reset -= {part.report.client for part in record.results}
        self._reports, self._rates = {}, {}
        return record

    def _agreeing(self, reports: Sequence[Any]) -> list[Any]:
        """The reports from the state that most clients hold; the others' clients are to reset."""
        wrong = self.agree({report.client: report.digest for report in reports})
        self.refused += len(wrong)
        return [report for report in reports if report.client not in wrong]

    def _believed(self, reports: Sequence[Report]) -> list[Report]:
        """The reports whose projected gradients are of a size that those of others have."""
        sizes = [size_of(report.gradients) for report in reports]
        parts = [part for record in self._maker.history for part in record.results]
        before = [size_of(part.report.gradients) for part in parts]
        kept = plausible_sizes(sizes, before)
        self.disbelieved = {
            report.client for report, sound in zip(reports, kept, strict=True) if not sound
        }
        self.refused += len(self.disbelieved)
        return [report for report in reports if report.client not in self.disbelieved]

    def agree(self, digests: Mapping[int, bytes]) -> set[int]:
        """The clients whose state is not that of most; they start again from the base.

        Where no state is that of most, all do, once: from the base and the same entries all come
        to the same state, so clients that differ again hold another base model, or lie.

        Args:
            digests: of the tuned state that each client has at the beginning of the round.

        Raises:
            TieError: no state is that of most; a final one where two sides of it had started
                again before for that reason.
        """
        try:
            wrong = majority(digests, self.snapshots.recipients, self.round)
        except TieError as error:
            again = [set(side) <= self._tied for side in error.sides.values()]
            error.final = sum(again) > 1
            self._tied |= set(digests)
            self._start_again(digests)
            raise
        self._start_again(wrong)
        if any(digests.values()):
            self.snapshots.shown(digests)
        return wrong

    def _start_again(self, clients: Iterable[int]) -> None:
        for client in clients:
            self.snapshots.invalidate(client)
            self.reset.add(client)
            self.held[client] = 0
