"""The sites as the coordinator knows them, and the post between it and them.

What is wrong with an answer becomes a note on the site, and the others go on. What is well-formed
is believed: a site that is let in can report numbers that harm the tuning, or end it as diverged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedforward.core.errors import MessageError
from fedforward.deployment.site_metrics import Figures
from fedforward.deployment.state import Papers
from fedforward.deployment.transport import Arrival, Link
from fedforward.messages.envelope import LONGEST, Kind, Letter, shown

#: Seconds that others wait for a site whose letter was lost to come back.
GRACE = 30.0
#: How often a site is asked the same thing before the others go on without it.
TRIES = 3
#: Seconds after which a site that refused is asked again.
PATIENCE = 60.0

#: What may be answered to what, beside a refusal.
_ANSWERS = {
    Kind.GREETING: {Kind.ENROLMENT},
    Kind.TASK: {Kind.REPORT, Kind.BEHIND, Kind.STRANGER},
    Kind.EVALUATION: {Kind.FIGURES, Kind.BEHIND, Kind.STRANGER},
    Kind.FAREWELL: {Kind.FIGURES, Kind.BEHIND, Kind.STRANGER},
    Kind.SNAPSHOT_WANTED: {Kind.SNAPSHOT, Kind.STRANGER},
    Kind.DISMISSAL: {Kind.FIGURES},
}


@dataclass
class Member:
    """A site as the coordinator knows it.

    Attributes:
        name: the engine's name for it.
        said: what it calls itself, for people alone.
        number: its client number; None before it is enrolled.
        examples: training examples.
        ready: whether it is enrolled in this process's lifetime.
        present: whether it can be reached.
        pending: what was sent last and is not answered.
        asked: when that was sent.
        note: the last thing that went wrong with it.
        refused: when it refused the terms, or was refused; None if neither.
        failed: when its letter was lost; None if it was not.
        tries: how often it was asked the same thing.
        figures: its answer to the last evaluation or farewell.
        rounds: reports of it that were used since this process began.
    """

    name: str
    said: str = ""
    number: int | None = None
    examples: int = 0
    ready: bool = False
    present: bool = False
    pending: Kind | None = None
    asked: float = 0.0
    note: str = ""
    refused: float | None = None
    failed: float | None = None
    tries: int = 0
    figures: Figures | None = None
    rounds: int = 0

    @property
    def client(self) -> int:
        """`number` of a site that has one."""
        assert self.number is not None
        return self.number

    @property
    def label(self) -> str:
        """What people are shown."""
        other = self.said and self.said != self.name
        return f"{self.said} ({self.name})" if other else self.name

    @property
    def free(self) -> bool:
        """Whether it can be asked something now."""
        return self.ready and self.present and self.number is not None and self.pending is None

    def failing(self, now: float) -> bool:
        """Whether it was asked in vain so often that it is left alone for a while."""
        return self.tries >= TRIES and self.failed is not None and now - self.failed < PATIENCE

    def lost(self, now: float) -> bool:
        """Whether the others need not wait for it any longer."""
        return self.tries >= TRIES or (self.failed is not None and now - self.failed > GRACE)


@dataclass
class Traffic:
    """Bytes of sealed letters since a moment, and how many were sent."""

    up: int = 0
    down: int = 0
    sent: int = 0


#: Acts on a site's answer to what it was asked; raises `MessageError` for one that is wrong.
Accept = Callable[[Member, Letter, Kind], None]


class Members:
    """All sites that were seen, and the letters to and from them."""

    def __init__(
        self, link: Link, papers: Papers, greeting: bytes, clock: Callable[[], float]
    ) -> None:
        """`greeting` is the body of the letter to whoever is new."""
        self.link = link
        self.papers = papers
        self.greeting = greeting
        self.clock = clock
        self.traffic = Traffic()
        self._members: dict[str, Member] = {}

    def __getitem__(self, name: str) -> Member:
        return self._members[name]

    def all(self) -> list[Member]:
        """Enrolled sites by number, then the others as they came."""
        enrolled = [member for member in self._members.values() if member.number is not None]
        others = [member for member in self._members.values() if member.number is None]
        return [*sorted(enrolled, key=lambda member: member.client), *others]

    def free(self) -> list[Member]:
        """Enrolled sites that can be asked something now, by number."""
        return [member for member in self.all() if member.free]

    def send(self, member: Member, kind: Kind, body: bytes = b"") -> None:
        """Ask a site something; it is not free until it has answered."""
        data = Letter(kind, self.papers.run, body).seal()
        member.pending, member.asked, member.figures = kind, self.clock(), None
        self.traffic.down += len(data)
        self.traffic.sent += 1
        self.link.send(member.name, data)

    def dismiss(self, member: Member, words: str) -> None:
        """Tell a site why it cannot take part; it is greeted again after a while."""
        member.note, member.ready, member.refused = shown(words)[:LONGEST], False, self.clock()
        self.send(member, Kind.DISMISSAL, words[:LONGEST].encode(errors="replace"))

    def look(self, accept: Accept) -> None:
        """See who is there and what has come, and greet whoever is new."""
        there = set(self.link.present())
        for name in sorted(there - self._members.keys()):
            place = self.papers.places.get(name)
            self._members[name] = Member(name, number=None if place is None else place.number)
        for member in self._members.values():
            if member.present and member.name not in there:
                # It may come back with another configuration.
                member.refused = None
            member.present = member.name in there
        for arrival in self.link.receive():
            self._take(arrival, accept)
        now = self.clock()
        for member in self._members.values():
            patient = member.refused is not None and now - member.refused < PATIENCE
            if member.present and not member.ready and not member.pending and not patient:
                self.send(member, Kind.GREETING, self.greeting)

    def _take(self, arrival: Arrival, accept: Accept) -> None:
        member = self._members.get(arrival.site)
        if member is None:
            return
        asked, member.pending = member.pending, None
        try:
            if arrival.error:
                raise MessageError(arrival.error)
            self.traffic.up += len(arrival.data)
            letter = Letter.open(arrival.data)
            if letter.kind is not Kind.REFUSAL and letter.run != self.papers.run:
                raise MessageError("A letter of another run was refused.")
            if asked is None or letter.kind not in _ANSWERS[asked] | {Kind.REFUSAL}:
                raise MessageError(f"Site {member.name} answered with {letter.kind.name}.")
            if letter.kind is Kind.STRANGER:
                member.ready, member.failed = False, self.clock()
            else:
                accept(member, letter, asked)
        except MessageError as error:
            member.note, member.failed = shown(str(error))[:LONGEST], self.clock()
            if asked is Kind.GREETING:
                member.ready, member.refused = False, self.clock()

    def status(self) -> list[dict[str, Any]]:
        """What there is to show of each site."""
        now = self.clock()
        return [
            {
                "name": member.name,
                "label": member.label,
                "number": member.number,
                "examples": member.examples,
                "ready": member.ready,
                "present": member.present,
                "pending": None if member.pending is None else member.pending.name.lower(),
                "waiting": now - member.asked if member.pending else None,
                "note": member.note,
                "rounds": member.rounds,
            }
            for member in self.all()
        ]
