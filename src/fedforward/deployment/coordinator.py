"""The server across machines: who takes part, rounds, evaluations, and how each ends well or not.

It carries letters between one `Server` and any number of sites through a `Link`, which an engine
provides; what the engine does not know is all here: enrolment and agreement, deadlines, sites that
vanish and come back, and what is written down. All that it must not lose is in the ledger and in
`federation.json`, so a coordinator that was killed goes on where the last round ended. Imports no
PyTorch.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.config.schema import Config
from fedforward.config.site import terms
from fedforward.core.errors import FedForwardError, MessageError, UpdateNotFiniteError
from fedforward.core.identity import ModelIdentity
from fedforward.deployment.participants import TRIES, Member, Members, Traffic
from fedforward.deployment.site_metrics import Figures, combined
from fedforward.deployment.state import Papers
from fedforward.deployment.transport import Link
from fedforward.federation.agreement import QuorumError
from fedforward.federation.ledger import Ledger, Round
from fedforward.federation.server import Server
from fedforward.messages.envelope import Enrolment, Kind, Letter, deviation, difference, packed
from fedforward.planning.allocator import Allocator, counted
from fedforward.training import assembly, run_directory
from fedforward.training import metrics as progress
from fedforward.training.run_directory import RunDirectory

#: Seconds between looks at who is there and what has come.
PAUSE = 0.2
#: Rounds that may end without a quorum, because states differed, before the run is given up.
ATTEMPTS = 5
#: Seconds that all wait for a snapshot, unless the deadline of a round is sooner.
SNAPSHOT_PATIENCE = 120.0
#: Seconds for sites to keep what was tuned, and that those still at work are waited for before.
FAREWELL_PATIENCE, LAST_PATIENCE = 600.0, 60.0


class Stopped(FedForwardError):  # noqa: N818 - the run goes on later; it is no error
    """The run was asked to stop; everything up to here is kept."""


class Coordinator:
    """Carries out a run over a link; `run` is the whole story."""

    def __init__(
        self,
        config: Config,
        path: Path,
        link: Link,
        *,
        resume: bool = False,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """`path` is the run directory; `clock` and `pause` are replaced in tests."""
        self.config = config
        self.clock = clock
        self.pause = pause
        self.directory = RunDirectory(path)
        self.papers = Papers(self.directory)
        self.papers.open(config, resume)
        self.members = Members(link, self.papers, packed({"terms": terms(config)}), clock)
        self.method = assembly.build_method(config)
        self.server: Server | None = None
        self.identity: ModelIdentity | None = None
        self.candidates: dict[str, Enrolment] = {}
        self.late = self.asked = 0
        objective = config.method.objective
        optimised = () if objective in ("loss", *config.evaluation.metrics) else (objective,)
        self.wanted = (*optimised, *config.evaluation.metrics)
        self.lines: list[dict[str, Any]] = []
        self.what = "waiting for sites"
        self.disagreement = ""
        self._allocator: tuple[Any, Allocator] | None = None
        self._status_written = -math.inf

    # ---- the whole story ---------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Carry the run to its end; returns the summary.

        Raises:
            Stopped: it was asked to stop.
            DivergenceError: after the results so far have been written.
        """
        try:
            self._gather()
            self._restore()
            reason = progress.reason_to_stop(self.config, self.lines)
            while self._server.round < self.config.federation.rounds and not reason:
                began = self.clock()
                self.members.traffic = Traffic()
                try:
                    record = self._round()
                except UpdateNotFiniteError:
                    reason = "diverged: the update of the next round was not finite"
                    break
                self._write_line(record, self.clock() - began)
                reason = progress.reason_to_stop(self.config, self.lines)
            return self._finish(reason)
        except FedForwardError as error:
            self._status("stopped" if isinstance(error, Stopped) else "failed", error=str(error))
            raise

    @property
    def _server(self) -> Server:
        assert self.server is not None
        return self.server

    def _look(self) -> None:
        """Take what has come, unless the run is to stop; then wait a moment."""
        if self.papers.stop_file.exists():
            self.papers.stop_file.unlink(missing_ok=True)
            raise Stopped("The run was asked to stop. Everything up to here is kept.")
        self.members.look(self._accept)
        if self.server is not None and self.candidates:
            self._admit()
        self._status("running")
        self.pause(PAUSE)

    # ---- what sites answer -------------------------------------------------------------------

    def _accept(self, member: Member, letter: Letter, asked: Kind) -> None:
        """Act on an answer; raises `MessageError` for what is wrong with it."""
        if letter.kind is Kind.REFUSAL:
            if self.server is not None and member.number is not None:
                self._server.snapshots.invalidate(member.number)
            raise MessageError(letter.text())
        if letter.kind is Kind.ENROLMENT:
            try:
                enrolment = Enrolment.decode(letter.json())
            except MessageError as error:
                # Of another release, perhaps: both ends are told.
                self.members.dismiss(member, str(error))
            else:
                self._enrol(member, enrolment)
        elif letter.kind is Kind.REPORT:
            self._report(member, letter.body)
        elif letter.kind is Kind.BEHIND:
            self._behind(member, letter.json().get("rounds"))
        elif letter.kind is Kind.SNAPSHOT:
            self._server.receive_snapshot(letter.body, member.client)
        elif asked is not Kind.DISMISSAL:
            figures = Figures.decode(letter.json())
            if asked is Kind.EVALUATION and not figures.complete(self.wanted):
                raise MessageError(
                    f"Figures of {', '.join(figures.metrics) or 'nothing'} were refused where "
                    f"{', '.join(('loss', *self.wanted))} were asked for."
                )
            member.figures = figures

    def _report(self, member: Member, body: bytes) -> None:
        if not self._server.waits_for(member.client):
            self.late += 1
            member.note = "its report came after the round was closed, and was dropped"
            return
        self._server.receive(body, member.client)
        member.failed, member.note = None, ""
        member.rounds += 1

    def _behind(self, member: Member, rounds: object) -> None:
        """The site holds other rounds than it was thought to."""
        if type(rounds) is not int or rounds < 0:
            raise MessageError(f"Site {member.name} says that it holds {rounds!r} rounds.")
        self._server.enrol(member.client, member.examples, rounds)

    # ---- enrolment ---------------------------------------------------------------------------

    def _enrol(self, member: Member, enrolment: Enrolment) -> None:
        """Keep a site as a candidate, unless it has another model than the sites agreed on."""
        member.note, member.refused = "", None
        member.examples, member.said = enrolment.examples, enrolment.name
        if self.identity is not None and (words := difference(enrolment.model, self.identity)):
            self.members.dismiss(member, words)
            return
        self.candidates[member.name] = enrolment
        member.ready = True

    def _admit(self) -> None:
        """Give the candidates their numbers; these are on disk before the sites hear of them."""
        candidates, self.candidates = self.candidates, {}
        self.papers.settle(candidates)
        by_number = sorted(candidates, key=lambda name: self.papers.places[name].number)
        for name in by_number:
            member, enrolment = self.members[name], candidates[name]
            member.number, member.failed = self.papers.places[name].number, None
            self._server.enrol(member.number, enrolment.examples, enrolment.rounds)

    def _gather(self) -> None:
        """Wait for the first sites, and settle what all must have in common."""
        config = self.config.federation
        pinned = self._pinned()
        # A run that goes on needs only its quorum; a new one waits for all that it counts on.
        wanted = config.quorum if pinned else max(config.clients, config.quorum)
        identity = None
        here: dict[str, Enrolment] = {}
        while identity is None or len(here) < config.quorum:
            identity = None
            self.what = f"waiting for sites: {len(here)} of {wanted} are ready"
            self._look()
            here = {
                name: enrolment
                for name, enrolment in self.candidates.items()
                if self.members[name].ready and self.members[name].present
            }
            for name in list(here):
                if words := deviation(self._header(here[name].model), pinned):
                    self._send_away(name, here, words)
            if len(here) < wanted:
                continue
            identity = _agreed(here)
            for name in list(here):
                if here[name].model != identity:
                    self._send_away(name, here, difference(here[name].model, identity))
        self.identity = identity
        self._open(identity)
        for name in self.candidates.keys() - here.keys():
            # It left while the others were waited for; it is asked again when it is back.
            self.members[name].ready = False
        self.candidates = here
        self._admit()

    def _send_away(self, name: str, here: dict[str, Enrolment], words: str) -> None:
        del here[name], self.candidates[name]
        self.members.dismiss(self.members[name], words)

    def _pinned(self) -> dict[str, Any] | None:
        """The header of the ledger, if there is one."""
        if not self.directory.ledger.is_file():
            return None
        ledger = Ledger(self.directory.ledger)
        header = ledger.header
        ledger.close()
        return header

    def _header(self, model: ModelIdentity) -> dict[str, Any]:
        return {
            **assembly.ledger_header(self.config, model),
            "tokenizer": model.tokenizer,
            "state_bytes": model.state_bytes,
            "run": self.papers.run.hex(),
        }

    def _open(self, identity: ModelIdentity) -> None:
        """The ledger and the server on it."""
        path = self.directory.ledger
        ledger = Ledger(path) if path.is_file() else Ledger.create(path, self._header(identity))
        allocate = self._allocate if self.method.capabilities.blocks else None
        settings = assembly.server_settings(self.config, identity, self.papers.examples(), allocate)
        self.server = Server(settings, self.method, ledger)
        self.server.reset |= self.papers.reset

    # ---- blocks ------------------------------------------------------------------------------

    def _active(self) -> list[int]:
        """How many blocks each site that was ever taken in can perturb, by number."""
        assert self.identity is not None
        blocks = len(self.identity.layout.blocks)
        places = self.papers.by_number()
        return [min(place.active_blocks or blocks, blocks) for _, place in places]

    def _resting(self) -> int:
        """Blocks that all sites together cannot perturb, for a method that allots blocks."""
        assert self.identity is not None
        blocks = len(self.identity.layout.blocks)
        return max(0, blocks - sum(self._active())) if self.method.capabilities.blocks else 0

    def _allocate(self, participants: Sequence[int]) -> NDArray[np.bool_]:
        """The blocks of each participant, from what each site says that it can perturb."""
        assert self.identity is not None
        active, examples = self._active(), self.papers.examples()
        blocks = len(self.identity.layout.blocks)
        if sum(active) < blocks:
            return _in_turn(self._server.round, [active[client] for client in participants], blocks)
        if self.config.federation.weights == "equal":
            examples = [1] * len(examples)
        key = (tuple(active), tuple(examples))
        if self._allocator is None or self._allocator[0] != key:
            names = [name for name, _ in self.papers.by_number()]
            planner = counted(
                self.config.planning,
                self.identity.layout,
                [float(count) for count in examples],
                active,
                names,
                f"limits.active_blocks of {', '.join(names)}",
            )
            self._allocator = (key, planner)
        return self._allocator[1](participants)

    # ---- rounds ------------------------------------------------------------------------------

    def _round(self) -> Round:
        """One whole round, from tasks to the ledger."""
        server = self._server
        attempts = 0
        while True:
            free = self._quorum()
            tasks = server.open_round([member.client for member in free])
            asked = [member for member in free if member.client in tasks]
            self.asked = len(asked)

            def body(member: Member, tasks: dict[int, bytes] = tasks) -> bytes:
                # Who is asked again is sent what it lacks by then.
                return tasks.pop(member.client, b"") or server.task(member.client)

            def closed(seconds: float, gone: Sequence[Member]) -> bool:
                numbers = {member.client for member in gone}
                if server.ready(seconds, numbers) or set(server.missing()) <= numbers:
                    return True
                # Others than those who were asked may hold the round.
                over = seconds >= server.settings.deadline
                return over and len(self.members.free()) >= self.config.federation.quorum

            self._exchange(
                Kind.TASK, asked, body, lambda member: not server.waits_for(member.client), closed
            )
            try:
                return server.close_round()
            except QuorumError:
                attempts += 1
                if attempts == ATTEMPTS:
                    raise
            finally:
                self.papers.note_reset(server.reset)

    def _quorum(self) -> list[Member]:
        """Wait for enough sites to hold a round; a snapshot is there if one pays."""
        quorum, number = self.config.federation.quorum, self._server.round + 1
        fetched = False
        while True:
            now = self.clock()
            free = [member for member in self.members.free() if not member.failing(now)]
            resting = self._resting() if number == 1 else 0
            if len(free) < quorum:
                self.what = f"round {number}: waiting for sites, {len(free)} of {quorum} are free"
            elif resting:
                self.what = (
                    f"round {number}: waiting for sites that can perturb {resting} more blocks "
                    "(limits.active_blocks)"
                )
            elif not fetched and self._fetch_snapshot(free):
                # Time has passed, in which sites may have gone.
                fetched = True
                continue
            else:
                self.what = f"round {number}"
                return free
            self._look()

    def _fetch_snapshot(self, free: Sequence[Member]) -> bool:
        """Have a site make a snapshot, if that is fewer bytes than what some site lacks.

        Returns:
            Whether one was asked for.
        """
        server = self._server
        numbers = [member.client for member in free]
        number = server.snapshot_wanted(numbers)
        if number is None:
            return False
        (giver,) = [member for member in free if member.client == number]
        self.what = f"a snapshot from {giver.name}"
        self.members.send(giver, Kind.SNAPSHOT_WANTED)
        limit = min(server.settings.deadline, SNAPSHOT_PATIENCE)
        began = self.clock()
        while giver.pending and self.clock() - began < limit:
            self._look()
        if server.snapshot_wanted(numbers) is not None:
            server.snapshots.excluded.add(number)
        return True

    def _exchange(
        self,
        kind: Kind,
        members: Sequence[Member],
        body: Callable[[Member], bytes],
        done: Callable[[Member], bool],
        closed: Callable[[float, Sequence[Member]], bool],
    ) -> None:
        """Ask sites something, and again those that were lost and came back, until it is enough.

        Args:
            body: of the letter to a site, at the time when it is sent.
            done: whether a site has answered.
            closed: from the seconds since the beginning, and the sites that are no longer waited
                for, whether to go on.
        """
        began = self.clock()
        for member in members:
            member.tries, member.failed, member.figures = 0, None, None
        while True:
            for member in members:
                if member.free and not done(member) and member.tries < TRIES:
                    member.tries += 1
                    self.members.send(member, kind, body(member))
            now = self.clock()
            gone = [m for m in members if not done(m) and m.pending is not kind and m.lost(now)]
            if closed(now - began, gone):
                return
            self._look()

    # ---- evaluations -------------------------------------------------------------------------

    def _evaluate(self, kind: Kind = Kind.EVALUATION) -> dict[str, Any]:
        """The held-out figures after the last round, of all sites there or of the one named.

        Empty where no site answered.
        """
        server = self._server
        judges = self.members.free() if kind is Kind.FAREWELL else self._judges()
        limit = server.settings.deadline
        if kind is Kind.FAREWELL:
            limit = min(limit, FAREWELL_PATIENCE)

        def closed(seconds: float, gone: Sequence[Member]) -> bool:
            answered = sum(member.figures is not None for member in judges)
            return answered + len(gone) == len(judges) or seconds >= limit

        self._exchange(
            kind,
            judges,
            lambda member: server.sync_task(member.client),
            lambda member: member.figures is not None,
            closed,
        )
        for member in judges:
            # Who cannot evaluate may still hold rounds.
            member.tries = 0
        answers = {
            member.client: member.figures
            for member in judges
            if member.figures is not None and member.figures.rounds == server.round
        }
        try:
            wrong = server.agree({n: bytes.fromhex(f.digest) for n, f in answers.items()})
        except QuorumError as error:
            wrong = set(answers)
            self.disagreement = str(error)
        self.papers.note_reset(server.reset)
        for member in judges:
            if member.client in wrong:
                member.note = "its tuned state is not that of the others; it starts again"
                del answers[member.client]
            elif member.client in answers:
                server.arrived(member.client)
        digest = next((figures.digest for figures in answers.values()), None)
        figures = combined(list(answers.values()))
        return {**figures, "state_digest": digest} if answers else {}

    def _judges(self) -> list[Member]:
        named = self.config.evaluation.site
        return [member for member in self.members.free() if named in (None, member.name)]

    def _due(self, done: int) -> bool:
        """Whether there is an evaluation after so many rounds."""
        return done % self.config.run.evaluate_every == 0 or done == self.config.federation.rounds

    def _restore(self) -> None:
        """Make the metrics agree with the ledger, and begin them if there are none."""
        server = self._server
        self.lines = self.directory.read_metrics(server.round)
        attempts = 0
        while not self.lines:
            named = self.config.evaluation.site
            self.what = "waiting for a site to evaluate the base model" + (
                f": {named} (evaluation.site)" if named else ""
            )
            while not self._judges():
                self._look()
            self.what = "evaluating the base model"
            figures = self._evaluate()
            attempts += 1
            if "heldout_loss" in figures:
                self.lines = [{"round": 0, **figures, "example": None, "seconds": 0.0}]
            elif attempts >= ATTEMPTS and self.disagreement:
                raise QuorumError(self.disagreement)
        # A kill between a round and its line loses the line, never the round.
        for record in server.ledger.rounds(self.lines[-1]["round"]):
            line = progress.round_line(record)
            self.lines.append({**line, "seconds": self.lines[-1]["seconds"]})
        last = self.lines[-1]
        if self._due(last["round"]) and "heldout_loss" not in last:
            self._evaluate_into(last)
        self.directory.rewrite_metrics(self.lines)

    def _evaluate_into(self, line: dict[str, Any]) -> None:
        self.what = f"evaluating after round {line['round']}"
        began = self.clock()
        line |= self._evaluate()
        line["seconds"] += self.clock() - began

    def _write_line(self, record: Round, seconds: float) -> None:
        line = progress.round_line(record)
        traffic = self.members.traffic
        sent = max(1, traffic.sent)
        line["bytes"] = {"up": traffic.up / sent, "down": traffic.down / sent}
        line["seconds"] = self.lines[-1]["seconds"] + seconds
        if len(record.results) < self.asked or self.late:
            reported = len(record.results)
            line["clients"] = {"asked": self.asked, "reported": reported, "late": self.late}
        self.late = 0
        if self._due(line["round"]):
            self._evaluate_into(line)
        self.lines.append(line)
        self.directory.append_metrics(line)

    # ---- the end -----------------------------------------------------------------------------

    def _finish(self, reason: str) -> dict[str, Any]:
        self.what = "waiting for sites that are still at work"
        began = self.clock()
        limit = min(self._server.settings.deadline, LAST_PATIENCE)
        while any(m.pending and m.present for m in self.members.all()):
            if self.clock() - began >= limit:
                break
            self._look()
        self.what = "letting sites keep what was tuned"
        figures = self._evaluate(Kind.FAREWELL)
        if "heldout_loss" not in self.lines[-1]:
            self._evaluate_into(self.lines[-1])
            self.directory.rewrite_metrics(self.lines)
        summary = self._summary(reason, figures.get("state_digest"))
        run_directory.write_json(self.directory.summary, summary)
        self._server.ledger.close()
        self._status("failed" if reason.startswith("diverged") else "finished", force=True)
        if reason.startswith("diverged"):
            rate = self.config.method.learning_rate
            raise progress.DivergenceError(
                f"The run {reason} after round {self._server.round}. Lower method.learning_rate "
                f"(it is {rate:g}; try {rate / 3:g}) or method.local_steps. Everything up to here "
                f"is in {self.directory.path}."
            )
        return summary

    def _summary(self, reason: str, digest: str | None) -> dict[str, Any]:
        config, lines, server = self.config, self.lines, self._server
        traffic = [line["bytes"] for line in lines if "bytes" in line]
        losses = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
        return {
            "method": config.method.name,
            "objective": config.method.objective,
            "tune": config.model.tune,
            "sites": {name: place.examples for name, place in self.papers.places.items()},
            "clients": len(self.papers.places),
            "rounds": server.round,
            "local_steps": config.method.local_steps,
            "stopped": reason or None,
            "heldout_loss": {"start": losses[0], "end": losses[-1], "lowest": min(losses)},
            "metrics": {
                name: {"start": value, "end": lines[-1]["metrics"][name]}
                for name, value in lines[0].get("metrics", {}).items()
                if name in lines[-1].get("metrics", {})
            },
            "letter_bytes": {
                way: sum(t[way] for t in traffic) / len(traffic) if traffic else None
                for way in ("up", "down")
            },
            "seconds": lines[-1]["seconds"],
            "ledger_digest": server.ledger.chain.hex(),
            "state_digest": digest,
        }

    def _status(self, state: str, *, error: str = "", force: bool = False) -> None:
        """Write down what is going on, at most once a second."""
        now = self.clock()
        if state == "running" and not force and now - self._status_written < 1.0:
            return
        self._status_written = now
        server = self.server
        sites = self.members.status()
        for site in sites:
            if server is not None and site["number"] is not None:
                site["holds"] = server.held.get(site["number"])
        losses = [line["heldout_loss"] for line in self.lines if "heldout_loss" in line]
        self.papers.write_status(
            {
                "state": state,
                "what": self.what,
                "error": error,
                "pid": os.getpid(),
                "run": self.papers.run.hex(),
                "round": server.round if server is not None else 0,
                "rounds": self.config.federation.rounds,
                "heldout_loss": losses[-1] if losses else None,
                "sites": sites,
            }
        )


def _in_turn(round_: int, active: Sequence[int], blocks: int) -> NDArray[np.bool_]:
    """As many blocks for each as it can perturb, from where the last one's end, bool [n, blocks].

    For sites that together cannot cover all: each round begins with another block.
    """
    matrix = np.zeros((len(active), blocks), np.bool_)
    place = round_ * sum(active)
    for row, count in zip(matrix, active, strict=True):
        row[np.arange(place, place + count) % blocks] = True
        place += count
    return matrix


def _agreed(here: dict[str, Enrolment]) -> ModelIdentity:
    """The model that most sites have.

    Raises:
        FedForwardError: there is no majority.
    """
    models = [enrolment.model for enrolment in here.values()]
    (most, count), *others = Counter(models).most_common(2)
    if others and others[0][1] == count:
        groups = [[n for n, e in here.items() if e.model == model] for model in set(models)]
        raise FedForwardError(
            "The sites do not have the same model, and none has most: "
            f"{'; '.join(sorted(', '.join(group) for group in groups))}. Give all the same base "
            "model, dtype and tokenizer."
        )
    return most
