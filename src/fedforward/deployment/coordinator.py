"""The server across machines: it asks sites for rounds and evaluations, over any engine.

It carries messages between one `Server` and any number of sites through a `Transport`, which an
engine provides. What the engine does not know is here and in `enrollment`: who takes part,
deadlines, and sites that vanish and come back. What must not be lost is in the ledger and in
`federation.json`, so a coordinator that was killed goes on where the last round ended. The loop of
a run is `training.loop`'s. Imports no PyTorch.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.config.schema import Config
from fedforward.config.site import terms
from fedforward.core.errors import FedForwardError, MessageError
from fedforward.deployment.enrollment import Admission
from fedforward.deployment.participants import ByteCount, Participant, Participants
from fedforward.deployment.secure import sum_rounds
from fedforward.deployment.site_metrics import SiteMetrics, combined
from fedforward.deployment.state import CoordinatorState
from fedforward.deployment.transient import TransientErrors
from fedforward.deployment.transport import Transport
from fedforward.federation.agreement import QuorumError, TieError
from fedforward.federation.ledger import Round
from fedforward.federation.server import Server
from fedforward.messages.envelope import Enrollment, Envelope, MessageKind, encode_json
from fedforward.messages.refusal import Refusal
from fedforward.planning.allocator import BlockAllotment
from fedforward.training import assembly
from fedforward.training.callbacks import Callbacks
from fedforward.training.loop import Loop
from fedforward.training.metrics import Attendance, RoundOutcome, Traffic
from fedforward.training.run_directory import RunDirectory, errors_of_the_disk
from fedforward.training.summary import DeploymentSummary, Lines, RunSummary, mean_traffic

LOGGER = logging.getLogger("fedforward.deployment.coordinator")
#: Seconds between two looks at who is there and what has come.
POLL_INTERVAL_S = 0.2
#: Rounds that may end without a quorum, because states differed, before the run is given up.
MAX_ROUND_RETRIES = 5
#: Seconds that all wait for a snapshot, unless the deadline of a round is sooner.
SNAPSHOT_TIMEOUT_S = 120.0
#: Seconds for sites to keep what was tuned.
FINALIZE_TIMEOUT_S = 600.0
#: Seconds that sites which are still at work are waited for before that.
LAST_REPLIES_TIMEOUT_S = 60.0
#: Seconds between two status files, unless the state changes.
STATUS_INTERVAL_S = 1.0


#: What sites are asked for a secure sum, beside their reports.
SUM_STEPS = (MessageKind.SUM_START, MessageKind.SUM_ROSTER, MessageKind.SUM_OPENING)


class Stopped(FedForwardError):  # noqa: N818 - the run goes on later; it is no error
    """The run was asked to stop; everything up to here is kept."""


class Coordinator:
    """Carries out a run over a transport: the `RoundRunner` across machines.

    Attributes:
        participants: the sites that were seen.
        admission: which of them take part.
        server: None until the first sites have settled the model.
        loop: None until there is a server.
    """

    def __init__(
        self,
        config: Config,
        path: Path,
        transport: Transport,
        *,
        resume: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`path` is the run directory; `clock` and `sleep`, in seconds, are replaced in tests."""
        self.clock = clock
        self.sleep = sleep
        self.directory = RunDirectory(path)
        self.state = CoordinatorState(self.directory)
        self.callbacks = Callbacks(config.run.callbacks)
        config = self.config = self.state.open(config, resume)
        hello = encode_json({"terms": terms(config)})
        self.participants = Participants(transport, self.state, hello, clock)
        self.admission = Admission(config, self.directory, self.state, self.participants)
        self.method = assembly.build_method(config)
        self.server: Server | None = None
        self.loop: Loop | None = None
        self.what = "waiting for sites"
        self._blocks: BlockAllotment | None = None
        self._sums: Any = None
        self._late = 0
        self._disagreement = ""
        self._status_written = -math.inf
        self._errors = TransientErrors(LOGGER.warning)

    def run(self) -> RunSummary:
        """Carry the run to its end.

        Raises:
            Stopped: it was asked to stop.
            DivergenceError: after the results so far have been written.
        """
        try:
            self._begin()
            assert self.loop is not None
            summary = self.loop.run()
        except FedForwardError as error:
            self._status("stopped" if isinstance(error, Stopped) else "failed", error=str(error))
            raise
        self._status("finished")
        return summary

    def _begin(self) -> None:
        """Wait for the first sites; then there are a ledger, a server and a loop."""
        identity = self.admission.gather(self._wait)
        ledger = self.admission.open_ledger(identity)
        if self.method.capabilities.blocks:
            equal = self.config.federation.weights == "equal"
            self._blocks = BlockAllotment(self.config.planning, identity.layout, equal=equal)
        settings = assembly.server_settings(
            self.config,
            identity,
            self.state.examples(),
            self._allocate if self._blocks is not None else None,
        )
        self.server = Server(settings, self.method, ledger)
        self.server.reset |= self.state.reset
        if self.config.federation.secure_sums:
            self._sums = sum_rounds(self.config, self.participants, self.server, self._poll)
        self.admission.admit(self.server)
        self.loop = Loop(
            self.config,
            self.directory,
            ledger,
            self,
            callbacks=self.callbacks,
            clock=self.clock,
        )

    @property
    def _server(self) -> Server:
        assert self.server is not None
        return self.server

    def _wait(self, what: str) -> None:
        self.what = what
        self._poll()

    def _poll(self) -> None:
        """Take what has come, unless the run is to stop; then wait a moment."""
        with self._errors.noted("the run's folder cannot be looked at"):
            if self.state.stop_file.exists():
                self.state.stop_file.unlink(missing_ok=True)
                raise Stopped("The run was asked to stop. Everything up to here is kept.")
        self.participants.look(self._accept)
        if self.server is not None and self.admission.candidates:
            self.admission.admit(self.server)
        self._status("running")
        self.sleep(POLL_INTERVAL_S)

    def _accept(self, participant: Participant, reply: Envelope, asked: MessageKind) -> None:
        """Act on a reply; raises `MessageError` for what is wrong with it."""
        if reply.kind is MessageKind.REFUSAL:
            if self.server is not None and participant.number is not None:
                self.server.snapshots.invalidate(participant.number)
            raise MessageError(Refusal.decode(reply.body).sentence)
        if reply.kind is MessageKind.ENROLLMENT:
            try:
                enrollment = Enrollment.decode(reply.json())
            except MessageError as error:
                # Of another release, perhaps: both ends are told.
                self.participants.reject(participant, str(error))
            else:
                self.admission.consider(participant, enrollment)
        elif reply.kind in (MessageKind.REPORT, MessageKind.MASKED_REPORT):
            self._report(participant, reply.body)
        elif reply.kind is MessageKind.OUT_OF_SYNC:
            self._out_of_sync(participant, reply.json().get("rounds"))
        elif reply.kind is MessageKind.SNAPSHOT:
            self._server.receive_snapshot(reply.body, participant.client)
        elif asked in SUM_STEPS:
            assert self._sums is not None
            self._sums.accept(participant, reply)
        elif asked is not MessageKind.REJECT:
            metrics = SiteMetrics.decode(reply.json())
            if self.config.privacy.withholds:
                if not metrics.withheld:
                    raise MessageError("Metrics were refused that a site should have withheld.")
            elif asked is MessageKind.EVALUATION and not metrics.complete(self.config.metrics):
                raise MessageError(
                    f"Metrics of {', '.join(metrics.metrics) or 'nothing'} were refused where "
                    f"{', '.join(('loss', *self.config.metrics))} were asked for."
                )
            participant.metrics = metrics

    def _report(self, participant: Participant, body: bytes) -> None:
        if not self._server.waits_for(participant.client):
            self._late += 1
            participant.note = "its report came after the round was closed, and was dropped"
            return
        self._server.receive(body, participant.client)
        participant.failed, participant.note = None, ""
        participant.rounds += 1

    def _out_of_sync(self, participant: Participant, rounds: object) -> None:
        """The site holds other rounds than it was thought to."""
        if type(rounds) is not int or rounds < 0:
            raise MessageError(f"Site {participant.name} says that it holds {rounds!r} rounds.")
        self._server.enrol(participant.client, participant.examples, rounds)

    # ---- rounds ------------------------------------------------------------------------------

    def restore(self, rounds: int) -> Iterator[RoundOutcome]:
        """See `RoundRunner`: sites are brought to a round when they are asked for something."""
        for record in self._server.ledger.rounds(rounds):
            yield RoundOutcome(record)

    def run_round(self) -> RoundOutcome:
        """One whole round, from tasks to the ledger.

        Raises:
            QuorumError: in no attempt enough sites reported, or sites differ again.
            Stopped: the run was asked to stop.
        """
        self.participants.byte_count = ByteCount()
        for attempt in range(MAX_ROUND_RETRIES):
            try:
                asked = self._ask_for_reports()
                with errors_of_the_disk(self.directory.path):
                    record = self._close_round(asked)
                break
            except QuorumError as error:
                self._check_tie(error)
                if attempt == MAX_ROUND_RETRIES - 1:
                    raise
            finally:
                self.state.note_reset(self._server.reset)
                self._note_disbelieved()
        return self._outcome(record, len(asked))

    def go_back(self, rounds: int) -> RoundOutcome:
        """See `RoundRunner`: sites that hold a later round are sent the ledger from the base on."""
        with errors_of_the_disk(self.directory.path):
            record = self._server.go_back(rounds)
        self.state.note_reset(self._server.reset)
        return RoundOutcome(record)

    def _check_tie(self, error: QuorumError) -> None:
        """End the run where sites differ that have started again before, with their names."""
        if isinstance(error, TieError) and error.final:
            names = {p.number: p.label for p in self.participants.all()}
            raise QuorumError(
                error.sentence("sites", lambda number: names.get(number, str(number)))
            ) from error

    def _close_round(self, asked: Sequence[Participant]) -> Round:
        return self._server.close_round() if self._sums is None else self._sums.close(asked)

    def _note_disbelieved(self) -> None:
        for participant in self.participants.all():
            if participant.number in self._server.disbelieved:
                participant.note = "its report was left out: numbers far larger than the others'"

    def _outcome(self, record: Round, asked: int) -> RoundOutcome:
        count, late, self._late = self.participants.byte_count, self._late, 0
        sent = max(1, count.sent)
        return RoundOutcome(
            record,
            Traffic(up=count.up / sent, down=count.down / sent),
            Attendance(asked=asked, reported=len(record.results), late=late),
        )

    def _ask_for_reports(self) -> list[Participant]:
        """Open a round and wait until it can be closed; returns the sites that were asked.

        Raises:
            QuorumError: too few sites take part in a secure sum.
        """
        server, sums = self._server, self._sums
        free = self._wait_for_quorum()
        if sums is not None:
            free = sums.gather(free)
        tasks = server.open_round([participant.client for participant in free])
        asked = [participant for participant in free if participant.client in tasks]

        def body(participant: Participant) -> bytes:
            # Who is asked again is sent what it lacks by then.
            task = tasks.pop(participant.client, b"") or server.task(participant.client)
            return task if sums is None else sums.task(participant, task)

        def closed(seconds: float, gone: Sequence[Participant]) -> bool:
            numbers = {participant.client for participant in gone}
            if server.ready(seconds, numbers) or set(server.missing()) <= numbers:
                return True
            # Others than those who were asked may hold the round.
            over = seconds >= server.settings.deadline
            return over and len(self.participants.free()) >= server.settings.quorum

        self.participants.exchange(
            MessageKind.TASK if sums is None else MessageKind.SUM_TASK,
            asked,
            body,
            lambda participant: not server.waits_for(participant.client),
            closed,
            self._poll,
        )
        return asked

    def _wait_for_quorum(self) -> list[Participant]:
        """Wait for enough sites to hold a round; a snapshot is there if one pays."""
        quorum, number = self._server.settings.quorum, self._server.round + 1
        fetched = False
        while True:
            now = self.clock()
            free = [p for p in self.participants.free() if not p.failing(now)]
            uncovered = 0
            if self._blocks is not None and number == 1:
                uncovered = self._blocks.uncovered(self.state.blocks())
            if len(free) < quorum:
                self.what = f"round {number}: waiting for sites, {len(free)} of {quorum} are free"
            elif uncovered:
                self.what = (
                    f"round {number}: waiting for sites that can perturb {uncovered} more blocks "
                    "(limits.active_blocks)"
                )
            elif not fetched and self._fetch_snapshot(free):
                # Time has passed, in which sites may have gone.
                fetched = True
                continue
            else:
                self.what = f"round {number}"
                return free
            self._poll()

    def _allocate(self, participants: Sequence[int]) -> NDArray[np.bool_]:
        assert self._blocks is not None
        return self._blocks.allot(self.state.blocks(), participants, self._server.round)

    def _fetch_snapshot(self, free: Sequence[Participant]) -> bool:
        """Have a site make a snapshot, if that is fewer bytes than what some site lacks.

        Returns:
            Whether one was asked for.
        """
        server = self._server
        numbers = [participant.client for participant in free]
        number = server.snapshot_wanted(numbers)
        if number is None:
            return False
        (source,) = [participant for participant in free if participant.client == number]
        self.what = f"a snapshot from {source.name}"
        self.participants.send(source, MessageKind.SNAPSHOT_REQUEST)
        limit = min(server.settings.deadline, SNAPSHOT_TIMEOUT_S)
        began = self.clock()
        while source.pending and self.clock() - began < limit:
            self._poll()
        if server.snapshot_wanted(numbers) is not None:
            server.snapshots.excluded.add(number)
        return True

    # ---- evaluations -------------------------------------------------------------------------

    def evaluate(self, rounds: int) -> dict[str, Any]:
        """The metrics of all sites there, or of the one named, combined; nothing if none replied.

        Sites hold the last round: of rounds before it there is nothing any more. Should the
        metrics of the base model be lost, those of the last round stand in their place.

        Raises:
            QuorumError: the sites' states differ from the beginning.
        """
        if rounds == 0:
            return self._evaluate_base()
        if rounds < self._server.round:
            return {}
        self.what = f"evaluating after round {rounds}"
        return self._evaluate(MessageKind.EVALUATION, self._evaluators())

    def _evaluate_base(self) -> dict[str, Any]:
        for _ in range(MAX_ROUND_RETRIES):
            self._wait_for_evaluators()
            self.what = "evaluating the base model"
            found = self._evaluate(MessageKind.EVALUATION, self._evaluators())
            if "heldout_loss" in found or "withheld" in found:
                return found
        if self._disagreement:
            raise QuorumError(self._disagreement)
        return {}

    def _wait_for_evaluators(self) -> None:
        """Wait for a site that can evaluate the base model.

        Raises:
            FedForwardError: all that are there told for too long that they have too few examples.
        """
        named = self.config.evaluation.site
        site = f": {named} (evaluation.site)" if named else ""
        since = math.inf
        while not self._evaluators():
            silent = [p for p in self.participants.free() if named in (None, p.name)]
            since = min(since, self.clock()) if silent else math.inf
            if self.clock() - since >= self.config.federation.start_deadline:
                names = ", ".join(participant.label for participant in silent)
                raise FedForwardError(
                    f"No site tells held-out figures: {names} hold out fewer examples than their "
                    "limits.heldout. Raise data.heldout, or have a site lower limits.heldout."
                )
            self._wait("waiting for a site to evaluate the base model" + site)

    def _evaluators(self) -> list[Participant]:
        """The sites that tell held-out figures; with privacy, those that show their state alone."""
        named, withheld = self.config.evaluation.site, self.config.privacy.withholds
        free = [p for p in self.participants.free() if named in (None, p.name)]
        return [p for p in free if p.heldout or withheld]

    def _evaluate(self, kind: MessageKind, evaluators: Sequence[Participant]) -> dict[str, Any]:
        """Have sites evaluate the state after the last round, or keep it (FINALIZE).

        Returns:
            Their metrics combined, and the `state_digest` that they agree on; empty where no site
            replied.
        """
        server = self._server
        limit = server.settings.deadline
        if kind is MessageKind.FINALIZE:
            limit = min(limit, FINALIZE_TIMEOUT_S)

        def closed(seconds: float, gone: Sequence[Participant]) -> bool:
            replied = sum(participant.metrics is not None for participant in evaluators)
            return replied + len(gone) == len(evaluators) or seconds >= limit

        self.participants.exchange(
            kind,
            evaluators,
            lambda participant: server.sync_task(participant.client),
            lambda participant: participant.metrics is not None,
            closed,
            self._poll,
        )
        for participant in evaluators:
            # Who cannot evaluate may still hold rounds.
            participant.tries = 0
        replies = self._agreeing(evaluators)
        if not replies:
            return {}
        if self.config.privacy.withholds:
            return {"withheld": True, "state_digest": replies[0].digest}
        return {**combined(replies), "state_digest": replies[0].digest}

    def _agreeing(self, evaluators: Sequence[Participant]) -> list[SiteMetrics]:
        """The replies of the sites whose state is that of most; the others start again."""
        server = self._server
        replies = {
            participant.client: participant.metrics
            for participant in evaluators
            if participant.metrics is not None and participant.metrics.rounds == server.round
        }
        try:
            wrong = server.agree({n: bytes.fromhex(m.digest) for n, m in replies.items()})
        except QuorumError as error:
            self.state.note_reset(server.reset)
            self._check_tie(error)
            wrong = set(replies)
            self._disagreement = str(error)
        self.state.note_reset(server.reset)
        for participant in evaluators:
            if participant.client in wrong:
                participant.note = "its tuned state is not that of the others; it starts again"
            elif participant.client in replies:
                server.arrived(participant.client)
        return [metrics for number, metrics in replies.items() if number not in wrong]

    def finish(self, lines: Lines) -> DeploymentSummary:
        """Let sites keep what was tuned."""
        self.what = "waiting for sites that are still at work"
        began = self.clock()
        limit = min(self._server.settings.deadline, LAST_REPLIES_TIMEOUT_S)
        while any(p.pending and p.present for p in self.participants.all()):
            if self.clock() - began >= limit:
                break
            self._poll()
        self.what = "letting sites keep what was tuned"
        kept = self._evaluate(MessageKind.FINALIZE, self.participants.free())
        return DeploymentSummary(
            sites={name: site.examples for name, site in self.state.sites.items()},
            clients=len(self.state.sites),
            message_bytes=mean_traffic(lines),
            state_digest=kept.get("state_digest"),
        )

    def _status(self, state: str, *, error: str = "") -> None:
        """Write down what is going on; while the run goes on, at most once a second."""
        now = self.clock()
        if state == "running" and now - self._status_written < STATUS_INTERVAL_S:
            return
        self._status_written = now
        server = self.server
        sites = self.participants.status()
        for site in sites:
            if server is not None and site["number"] is not None:
                site["holds"] = server.held.get(site["number"])
        lines = self.loop.lines if self.loop is not None else []
        losses = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
        content = {
            "state": state,
            "what": self.what,
            "error": error,
            "pid": os.getpid(),
            "run": self.state.run.hex(),
            "round": server.round if server is not None else 0,
            "rounds": self.config.federation.rounds,
            "heldout_loss": losses[-1] if losses else None,
            "sites": sites,
        }
        with self._errors.noted("status.json cannot be written"):
            self.state.write_status(content)
