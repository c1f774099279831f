"""The server across machines: who is there, rounds, evaluations, and how each ends well or not.

It carries letters between one `Server` and any number of sites through a `Link`, which an engine
provides; what the engine does not know is all here: enrolment and agreement, deadlines, sites that
vanish and come back, and what is written down. All that it must not lose is in the ledger and in
`federation.json`, so a coordinator that was killed goes on where the last round ended. Imports no
PyTorch.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedforward import assembly, progress, run_directory
from fedforward.assembly import ModelIdentity
from fedforward.config import Config
from fedforward.errors import FedForwardError, UpdateNotFiniteError
from fedforward.federation.ledger import Ledger, Round
from fedforward.federation.letters import (
    RUN_BYTES,
    Enrolment,
    Kind,
    Letter,
    difference,
    packed,
    weighted_mean,
)
from fedforward.federation.server import QuorumError, Server
from fedforward.messages import MessageError
from fedforward.methods import Method
from fedforward.planning.allocation import Allocator, counted
from fedforward.run_directory import RunDirectory
from fedforward.sites import terms

#: Seconds between looks at who is there and what has come.
PAUSE = 0.2
#: Seconds that others wait for a site whose letter was lost to come back.
GRACE = 30.0
#: How often a site is asked the same thing before the others go on without it.
TRIES = 3
#: Seconds after which a site that refused is asked again.
PATIENCE = 60.0
#: Rounds that may end without a quorum, because states differed, before the run is given up.
ATTEMPTS = 5


@dataclass(frozen=True)
class Arrival:
    """What came back from a site: its sealed answer, or why there is none."""

    site: str
    data: bytes = b""
    error: str = ""


class Link(Protocol):
    """What an engine must offer: identified sites, and letters to and from them."""

    def present(self) -> Sequence[str]:
        """The sites that can be reached now, by the names that the engine vouches for."""
        ...

    def send(self, site: str, data: bytes) -> None:
        """Hand over a letter; it is answered once or fails, each as one `Arrival`."""
        ...

    def receive(self) -> Sequence[Arrival]:
        """What has come since the last call; does not wait."""
        ...


@dataclass
class Member:
    """A site as the coordinator knows it.

    Attributes:
        name: the engine's name for it.
        number: its client number; None before it is enrolled.
        examples: training examples.
        active_blocks: blocks that it can perturb; None is all.
        ready: whether it is enrolled in this process's lifetime.
        present: whether it can be reached.
        pending: what was sent last and is not answered.
        asked: when that was sent.
        note: the last thing that went wrong with it.
        refused: when it refused the terms, or was refused; None if neither.
        failed: when its letter was lost; None if it was not.
        tries: how often it was asked the same thing.
        answer: to the last evaluation or farewell.
        rounds: reports of it that were used since this process began.
    """

    name: str
    number: int | None = None
    examples: int = 0
    active_blocks: int | None = None
    ready: bool = False
    present: bool = False
    pending: Kind | None = None
    asked: float = 0.0
    note: str = ""
    refused: float | None = None
    failed: float | None = None
    tries: int = 0
    answer: dict[str, Any] | None = None
    rounds: int = 0

    @property
    def client(self) -> int:
        """`number` of a site that has one."""
        assert self.number is not None
        return self.number

    @property
    def free(self) -> bool:
        """Whether it can be asked something now."""
        return self.ready and self.present and self.pending is None

    def lost(self, now: float) -> bool:
        """Whether the others need not wait for it any longer."""
        return self.tries >= TRIES or (self.failed is not None and now - self.failed > GRACE)


@dataclass
class Traffic:
    """Bytes of letters since a moment, as they are sealed."""

    up: int = 0
    down: int = 0
    sent: int = 0


class Stopped(FedForwardError):  # noqa: N818 - the run goes on later; it is no error
    """The run was asked to stop; everything up to here is kept."""


@dataclass
class Papers:
    """The files of a run across machines, beside those of any run.

    federation.json  the run's random name and the sites' numbers: read again after a kill
    status.json      what is going on, for `fedforward status`; never read by the coordinator
    stop             its being there asks the coordinator to stop
    """

    directory: RunDirectory
    run: bytes = b""
    numbers: dict[str, int] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)

    @property
    def _federation(self) -> Path:
        return self.directory.path / "federation.json"

    @property
    def stop_file(self) -> Path:
        """See the class."""
        return self.directory.path / "stop"

    def open(self, config: Config, resume: bool) -> None:
        """Begin a run's folder, or read what a killed coordinator left.

        Raises:
            FedForwardError: the folder holds another run, or none that can be continued.
        """
        directory = self.directory
        if directory.started:
            if not resume:
                raise FedForwardError(
                    f"{directory.path} holds a run already. Continue it with --resume, or choose "
                    "another --out."
                )
            directory.check_same(config)
            try:
                content = json.loads(self._federation.read_text(encoding="utf-8"))
                self.run = bytes.fromhex(content["run"])
                self.numbers = {str(k): int(v["number"]) for k, v in content["sites"].items()}
                self.examples = {str(k): int(v["examples"]) for k, v in content["sites"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise FedForwardError(
                    f"{self._federation} cannot be read: {error}. It has the numbers of the "
                    "sites; restore it from a copy."
                ) from error
        else:
            directory.claim()
            self.run = os.urandom(RUN_BYTES)
            self.save()
            directory.start(config)
        self.stop_file.unlink(missing_ok=True)

    def save(self) -> None:
        """Write the sites' numbers; they are on disk when this returns."""
        sites = {
            name: {"number": number, "examples": self.examples.get(name, 0)}
            for name, number in self.numbers.items()
        }
        run_directory.write_json(self._federation, {"run": self.run.hex(), "sites": sites})

    def write_status(self, content: dict[str, Any]) -> None:
        """Replace `status.json`."""
        run_directory.write_json(self.directory.path / "status.json", content)


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
        self.link = link
        self.clock = clock
        self.pause = pause
        self.directory = RunDirectory(path)
        self.papers = Papers(self.directory)
        self.papers.open(config, resume)
        method = assembly.build_method(config)
        assert isinstance(method, Method)
        self.method = method
        self.members: dict[str, Member] = {}
        self.server: Server | None = None
        self.identity: ModelIdentity | None = None
        self.candidates: dict[str, Enrolment] = {}
        self.snapshot: bytes | None = None
        self.traffic = Traffic()
        self.late = 0
        self.lines: list[dict[str, Any]] = []
        self.what = "waiting for sites"
        self.greeting = packed({"terms": terms(config)})
        self.allocator: tuple[tuple[str, ...], Allocator] | None = None
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
                self.traffic = Traffic()
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

    # ---- letters -----------------------------------------------------------------------------

    def _send(self, member: Member, kind: Kind, body: bytes = b"") -> None:
        data = Letter(kind, self.papers.run, body).seal()
        member.pending, member.asked, member.answer = kind, self.clock(), None
        self.traffic.down += len(data)
        self.traffic.sent += 1
        self.link.send(member.name, data)

    def _look(self) -> None:
        """See who is there and what has come; greet whoever is new; then wait a moment."""
        if self.papers.stop_file.exists():
            self.papers.stop_file.unlink(missing_ok=True)
            raise Stopped("The run was asked to stop. Everything up to here is kept.")
        there = set(self.link.present())
        for name in sorted(there - self.members.keys()):
            self.members[name] = Member(name, self.papers.numbers.get(name))
        for member in self.members.values():
            if member.present and member.name not in there:
                # It may come back with another configuration.
                member.refused = None
            member.present = member.name in there
        for arrival in self.link.receive():
            self._take(arrival)
        for member in self.members.values():
            patient = member.refused is not None and self.clock() - member.refused < PATIENCE
            if member.present and not member.ready and not member.pending and not patient:
                self._send(member, Kind.GREETING, self.greeting)
        self._status("running")
        self.pause(PAUSE)

    def _take(self, arrival: Arrival) -> None:
        """Act on one arrival; nothing that a site sends can do more than end its own part."""
        member = self.members.get(arrival.site)
        if member is None:
            return
        asked, member.pending = member.pending, None
        try:
            if arrival.error:
                raise MessageError(arrival.error)
            self.traffic.up += len(arrival.data)
            letter = Letter.open(arrival.data)
            if letter.kind is Kind.REFUSAL:
                raise MessageError(letter.text())
            if letter.run != self.papers.run:
                raise MessageError("A letter of another run was refused.")
            if letter.kind is Kind.STRANGER:
                member.ready, member.failed = False, self.clock()
            elif letter.kind is Kind.BEHIND:
                self._behind(member, letter.json().get("rounds"))
            else:
                self._accept(member, letter, asked)
        except MessageError as error:
            member.note, member.failed = str(error), self.clock()
            if asked is Kind.GREETING:
                member.ready, member.refused = False, self.clock()

    def _behind(self, member: Member, rounds: object) -> None:
        """The site holds other rounds than it was thought to."""
        if type(rounds) is not int or rounds < 0 or member.number is None:
            raise MessageError(f"Site {member.name} says that it holds {rounds!r} rounds.")
        self._server.enrol(member.number, member.examples, rounds)

    def _accept(self, member: Member, letter: Letter, asked: Kind | None) -> None:
        wanted = {
            Kind.GREETING: Kind.ENROLMENT,
            Kind.TASK: Kind.REPORT,
            Kind.EVALUATION: Kind.FIGURES,
            Kind.FAREWELL: Kind.FIGURES,
            Kind.DISMISSAL: Kind.FIGURES,
            Kind.SNAPSHOT_WANTED: Kind.SNAPSHOT,
        }
        if asked is None or letter.kind is not wanted[asked]:
            raise MessageError(f"Site {member.name} answered with {letter.kind.name}.")
        if letter.kind is Kind.ENROLMENT:
            self._enrol(member, Enrolment.decode(letter.json()))
        elif letter.kind is Kind.REPORT:
            self._report(member, letter.body)
        elif letter.kind is Kind.SNAPSHOT:
            self.snapshot = letter.body
        elif asked is not Kind.DISMISSAL:
            member.answer = letter.json()

    def _report(self, member: Member, body: bytes) -> None:
        server, before = self._server, self._server.missing()
        if member.number not in before:
            self.late += 1
            member.note = "its report came after the round was closed, and was dropped"
            return
        server.receive(body)
        if member.number in server.missing():
            # It reported under another site's number.
            raise MessageError(f"Site {member.name} sent a report that is not its own.")
        member.failed = None
        member.note = ""
        member.rounds += 1

    # ---- enrolment ---------------------------------------------------------------------------

    def _enrol(self, member: Member, enrolment: Enrolment) -> None:
        """Take a site in, or keep it as a candidate while the sites have not agreed yet."""
        member.note, member.refused = "", None
        if self.identity is None:
            self.candidates[member.name] = enrolment
            member.ready = True
            member.examples = enrolment.examples
            return
        words = difference(enrolment.model, self.identity)
        if words:
            self._dismiss(member, words)
            return
        self._number(member, enrolment)

    def _dismiss(self, member: Member, words: str) -> None:
        member.note, member.ready, member.refused = words, False, self.clock()
        self._send(member, Kind.DISMISSAL, words.encode())

    def _number(self, member: Member, enrolment: Enrolment) -> None:
        """Give a site its number; it is on disk before the site hears of it."""
        papers = self.papers
        member.examples, member.active_blocks = enrolment.examples, enrolment.active_blocks
        if member.number is None:
            member.number = max(papers.numbers.values(), default=-1) + 1
        papers.numbers[member.name] = member.number
        papers.examples[member.name] = enrolment.examples
        papers.save()
        self._server.enrol(member.number, enrolment.examples, enrolment.rounds)
        member.ready, member.failed = True, None

    def _gather(self) -> None:
        """Wait for the first sites, and settle what all must have in common."""
        config = self.config.federation
        known = self._pinned()
        # A run that goes on needs only its quorum; a new one waits for all that it counts on.
        wanted = config.quorum if known else max(config.clients, config.quorum)
        while True:
            self._look()
            here = {
                name: enrolment
                for name, enrolment in self.candidates.items()
                if self.members[name].ready and self.members[name].present
            }
            if len(here) < wanted:
                continue
            identity = self._agreed(here, known)
            for name in [name for name in here if difference(here[name].model, identity)]:
                del self.candidates[name]
                self._dismiss(self.members[name], difference(here.pop(name).model, identity))
            if len(here) >= config.quorum:
                break
        self.identity = identity
        self._open(identity)
        for name, enrolment in here.items():
            self._number(self.members[name], enrolment)
        self.candidates = {}

    def _pinned(self) -> dict[str, Any] | None:
        """The header of the ledger, if there is one."""
        if not self.directory.ledger.is_file():
            return None
        ledger = Ledger(self.directory.ledger)
        header = ledger.header
        ledger.close()
        return header

    def _agreed(self, here: dict[str, Enrolment], header: dict[str, Any] | None) -> ModelIdentity:
        """The model that the run is about: the ledger's, or that of most sites.

        Raises:
            FedForwardError: no site has the ledger's model, or there is no majority.
        """
        models = [enrolment.model for enrolment in here.values()]
        if header is not None:
            for model in models:
                if all(header.get(k) == v for k, v in self._header(model).items()):
                    return model
            raise FedForwardError(
                f"{self.directory.ledger}: none of the sites {', '.join(here)} has the model and "
                "the settings that the run was started with."
            )
        (most, count), *others = Counter(models).most_common(2)
        if others and others[0][1] == count:
            groups = [[n for n, e in here.items() if e.model == model] for model in set(models)]
            raise FedForwardError(
                "The sites do not have the same model, and none has most: "
                f"{'; '.join(sorted(', '.join(group) for group in groups))}. Give all the same "
                "base model, dtype and tokenizer."
            )
        return most

    def _header(self, model: ModelIdentity) -> dict[str, Any]:
        return {
            **assembly.ledger_header(self.config, model),
            "tokenizer": model.tokenizer,
            "run": self.papers.run.hex(),
        }

    def _open(self, identity: ModelIdentity) -> None:
        """The ledger and the server on it."""
        path = self.directory.ledger
        ledger = Ledger(path) if path.is_file() else Ledger.create(path, self._header(identity))
        examples = [0] * (max(self.papers.numbers.values(), default=-1) + 1)
        for name, number in self.papers.numbers.items():
            examples[number] = self.papers.examples[name]
        settings = assembly.server_settings(self.config, identity, examples, self._allocate())
        self.server = Server(settings, self.method, ledger)

    def _allocate(self) -> Callable[[Sequence[int]], NDArray[np.bool_]] | None:
        if not self.method.by_block:
            return None

        def allocate(participants: Sequence[int]) -> NDArray[np.bool_]:
            """Plan for whoever takes part, from what each says that it can perturb."""
            assert self.identity is not None
            members = [m for m in self._by_number() if m.number in set(participants)]
            blocks = len(self.identity.layout.blocks)
            active = [min(m.active_blocks or blocks, blocks) for m in members]
            equal = self.config.federation.weights == "equal"
            shares = [1.0 if equal else float(m.examples) for m in members]
            key = tuple(f"{m.number} {m.active_blocks}" for m in members)
            if self.allocator is None or self.allocator[0] != key:
                names = [m.name for m in members]
                planner = counted(
                    self.config.planning,
                    self.identity.layout,
                    shares,
                    active,
                    names,
                    f"limits.active_blocks of {', '.join(names)}",
                )
                self.allocator = (key, planner)
            return self.allocator[1].plan(range(len(members))).matrix

        return allocate

    def _by_number(self) -> list[Member]:
        enrolled = [member for member in self.members.values() if member.number is not None]
        return sorted(enrolled, key=lambda member: member.number or 0)

    def _free(self) -> list[Member]:
        """Enrolled sites that can be asked something now, by number."""
        return [member for member in self._by_number() if member.free]

    # ---- rounds ------------------------------------------------------------------------------

    def _round(self) -> Round:
        """One whole round, from tasks to the ledger."""
        server, quorum = self._server, self.config.federation.quorum
        for attempt in range(ATTEMPTS):
            self.what = f"round {server.round + 1}: waiting for {quorum} sites"
            while len(self._free()) < quorum:
                self._look()
            self._fetch_snapshot()
            self.what = f"round {server.round + 1}"
            free = self._free()
            if len(free) < quorum:
                continue
            tasks = server.open_round([member.client for member in free])
            asked = [member for member in free if member.client in tasks]

            def body(member: Member, tasks: dict[int, bytes] = tasks) -> bytes:
                # Who is asked again is sent what it lacks by then.
                return tasks.pop(member.client, b"") or server.task(member.client)

            def closed(seconds: float, gone: Sequence[Member]) -> bool:
                numbers = {member.client for member in gone}
                return server.ready(seconds, numbers) or set(server.missing()) <= numbers

            self._exchange(
                Kind.TASK, asked, body, lambda m: m.client not in server.missing(), closed
            )
            try:
                return server.close_round()
            except QuorumError:
                if attempt == ATTEMPTS - 1:
                    raise
        raise QuorumError(
            f"Round {server.round + 1} could not be held: in {ATTEMPTS} attempts fewer than "
            f"{quorum} sites stayed."
        )

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
            member.tries, member.failed, member.answer = 0, None, None
        while True:
            for member in members:
                if member.free and not done(member) and member.tries < TRIES:
                    member.tries += 1
                    self._send(member, kind, body(member))
            now = self.clock()
            gone = [m for m in members if not done(m) and not m.pending and m.lost(now)]
            if closed(now - began, gone):
                return
            self._look()

    def _fetch_snapshot(self) -> None:
        """Have a site make a snapshot, if that is fewer bytes than what some site lacks."""
        server = self._server
        free = {m.client: m for m in self._free()}
        giver = server.snapshot_wanted(list(free)) if free else None
        if giver is None:
            return
        self.what = f"a snapshot from {free[giver].name}"
        self.snapshot = None
        self._send(free[giver], Kind.SNAPSHOT_WANTED)
        while free[giver].pending:
            self._look()
        if self.snapshot is not None:
            try:
                server.receive_snapshot(self.snapshot)
            except MessageError as error:
                free[giver].note = str(error)

    # ---- evaluations -------------------------------------------------------------------------

    def _evaluate(self, kind: Kind = Kind.EVALUATION) -> dict[str, Any]:
        """The held-out figures after the last round, of all sites there or of the one named.

        Empty where no site answered.
        """
        server = self._server
        judges = self._free() if kind is Kind.FAREWELL else self._judges()
        limit = server.settings.deadline

        def closed(seconds: float, gone: Sequence[Member]) -> bool:
            waiting = [m for m in judges if m.answer is None and m not in gone]
            return not waiting or seconds >= limit

        self._exchange(
            kind,
            judges,
            lambda m: server.visit(m.client),
            lambda m: m.answer is not None,
            closed,
        )
        answers = {}
        for member in judges:
            if member.answer is not None and member.answer.get("rounds") == server.round:
                answers[member.name] = member.answer
        digests = Counter(str(answer.get("digest")) for answer in answers.values())
        right = digests.most_common(1)[0][0] if digests else ""
        for name, answer in list(answers.items()):
            member = self.members[name]
            if answer.get("digest") == right:
                server.arrived(member.client)
            else:
                member.note = "its tuned state is not that of the others; it starts again"
                server.reset.add(member.client)
                del answers[name]
        return _combined(list(answers.values()), right)

    def _restore(self) -> None:
        """Make the metrics agree with the ledger, and begin them if there are none."""
        server = self._server
        self.lines = self.directory.read_metrics(server.round)
        while not self.lines:
            self.what = "evaluating the base model"
            while not self._judges():
                self._look()
            figures = self._evaluate()
            if "heldout_loss" in figures:
                self.lines = [{"round": 0, **figures, "example": None, "seconds": 0.0}]
        # A kill between a round and its line loses the line, never the round.
        for record in server.ledger.rounds(self.lines[-1]["round"]):
            line = progress.round_line(record)
            self.lines.append({**line, "seconds": self.lines[-1]["seconds"]})
        self.directory.rewrite_metrics(self.lines)

    def _judges(self) -> list[Member]:
        named = self.config.evaluation.site
        return [m for m in self._free() if named in (None, m.name)]

    def _write_line(self, record: Round, seconds: float) -> None:
        line = progress.round_line(record)
        sent = max(1, self.traffic.sent)
        line["bytes"] = {"up": self.traffic.up / sent, "down": self.traffic.down / sent}
        line["seconds"] = self.lines[-1]["seconds"] + seconds
        numbers = {origin.report.client for origin in record.origins}
        asked = len(numbers | set(self._server.missing()))
        if len(numbers) < asked or self.late:
            line["clients"] = {"asked": asked, "reported": len(numbers), "late": self.late}
        self.late = 0
        done, last = line["round"], self.config.federation.rounds
        if done % self.config.run.evaluate_every == 0 or done == last:
            self.what = f"evaluating after round {done}"
            began = self.clock()
            line |= self._evaluate()
            line["seconds"] += self.clock() - began
        self.lines.append(line)
        self.directory.append_metrics(line)

    # ---- the end -----------------------------------------------------------------------------

    def _finish(self, reason: str) -> dict[str, Any]:
        self.what = "letting sites keep what was tuned"
        figures = self._evaluate(Kind.FAREWELL)
        if "heldout_loss" not in self.lines[-1]:
            self.lines[-1] |= self._evaluate() or {"heldout_loss": math.nan}
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
            "sites": {m.name: m.examples for m in self._by_number()},
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
        sites = []
        for member in sorted(self.members.values(), key=lambda m: (m.number is None, m.number)):
            record = asdict(member)
            for key in ("answer", "asked", "failed", "refused", "tries"):
                del record[key]
            record["pending"] = None if member.pending is None else member.pending.name.lower()
            record["waiting"] = now - member.asked if member.pending else None
            if server is not None and member.number is not None:
                record["holds"] = server.held.get(member.number)
            sites.append(record)
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


def _combined(answers: list[dict[str, Any]], digest: str) -> dict[str, Any]:
    """One set of figures from several sites': losses by answer tokens, the rest by examples."""
    measured = [answer for answer in answers if "heldout_loss" in answer]
    if not measured:
        return {"state_digest": digest} if answers else {}
    losses = [_number_of(answer["heldout_loss"]) for answer in measured]
    tokens = [int(_number_of(answer.get("tokens", 0))) for answer in measured]
    examples = [int(_number_of(answer.get("examples", 0))) for answer in measured]
    figures: dict[str, Any] = {"heldout_loss": weighted_mean(losses, tokens)}
    names = [n for n in measured[0].get("metrics") or {} if n != "perplexity"]
    metrics = {
        name: weighted_mean([_number_of(a["metrics"].get(name)) for a in measured], examples)
        for name in names
    }
    if "perplexity" in (measured[0].get("metrics") or {}):
        with np.errstate(over="ignore"):
            metrics["perplexity"] = float(np.exp(figures["heldout_loss"]))
    if metrics:
        figures["metrics"] = metrics
    return {**figures, "state_digest": digest}


def _number_of(value: object) -> float:
    """A number of a site's figures; NaN for what is none."""
    return float(value) if isinstance(value, int | float) else math.nan
