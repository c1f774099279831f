"""The sites as the coordinator knows them, and the messages between it and them.

What is wrong with a reply becomes a note on the site, and the others go on. What is well-formed
is believed, unless `federation.plausibility` says that the others' numbers speak against it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedforward.core.errors import MessageError
from fedforward.deployment.site_metrics import SiteMetrics
from fedforward.deployment.state import CoordinatorState
from fedforward.deployment.transport import Reply, Transport
from fedforward.messages.envelope import (
    MAX_SENTENCE_BYTES,
    Envelope,
    MessageKind,
    printable,
)

#: Seconds that others wait for a site whose message was lost to come back.
RECONNECT_TIMEOUT_S = 30.0
#: How often a site is asked the same thing before the others go on without it.
MAX_RETRIES = 3
#: Seconds after which a site that refused is asked again.
RETRY_REFUSED_S = 60.0

#: What may be replied to what, beside a refusal.
_REPLIES = {
    MessageKind.HELLO: {MessageKind.ENROLLMENT},
    MessageKind.TASK: {MessageKind.REPORT, MessageKind.OUT_OF_SYNC, MessageKind.UNKNOWN_RUN},
    MessageKind.EVALUATION: {MessageKind.METRICS, MessageKind.OUT_OF_SYNC, MessageKind.UNKNOWN_RUN},
    MessageKind.FINALIZE: {MessageKind.METRICS, MessageKind.OUT_OF_SYNC, MessageKind.UNKNOWN_RUN},
    MessageKind.SNAPSHOT_REQUEST: {MessageKind.SNAPSHOT, MessageKind.UNKNOWN_RUN},
    MessageKind.REJECT: {MessageKind.METRICS},
    MessageKind.SUM_START: {MessageKind.SUM_KEYS, MessageKind.UNKNOWN_RUN},
    MessageKind.SUM_ROSTER: {MessageKind.SUM_SHARES, MessageKind.UNKNOWN_RUN},
    MessageKind.SUM_TASK: {
        MessageKind.MASKED_REPORT,
        MessageKind.OUT_OF_SYNC,
        MessageKind.UNKNOWN_RUN,
    },
    MessageKind.SUM_OPENING: {MessageKind.SUM_OPENED, MessageKind.UNKNOWN_RUN},
}


@dataclass
class Participant:
    """A site as the coordinator knows it.

    Attributes:
        name: the engine's name for it.
        display_name: what it calls itself, for people alone.
        number: its client number; None before it is admitted.
        examples: training examples.
        heldout: held-out examples that it tells figures of.
        ready: whether it has enrolled in this process's lifetime.
        present: whether it can be reached.
        pending: what was sent last and is not answered.
        asked: when that was sent.
        note: the last thing that went wrong with it.
        refused: when it refused the terms, or was refused; None if neither.
        failed: when its message was lost; None if it was not.
        tries: how often it was asked the same thing.
        metrics: its reply to the last EVALUATION or FINALIZE.
        rounds: reports of it that were used since this process began.
    """

    name: str
    display_name: str = ""
    number: int | None = None
    examples: int = 0
    heldout: int = 0
    ready: bool = False
    present: bool = False
    pending: MessageKind | None = None
    asked: float = 0.0
    note: str = ""
    refused: float | None = None
    failed: float | None = None
    tries: int = 0
    metrics: SiteMetrics | None = None
    rounds: int = 0

    @property
    def client(self) -> int:
        """`number` of a site that has one."""
        assert self.number is not None
        return self.number

    @property
    def label(self) -> str:
        """What people are shown."""
        other = self.display_name and self.display_name != self.name
        return f"{self.display_name} ({self.name})" if other else self.name

    @property
    def free(self) -> bool:
        """Whether it can be asked something now."""
        return self.ready and self.present and self.number is not None and self.pending is None

    def failing(self, now: float) -> bool:
        """Whether it was asked in vain so often that it is left alone for a while."""
        return (
            self.tries >= MAX_RETRIES
            and self.failed is not None
            and now - self.failed < RETRY_REFUSED_S
        )

    def lost(self, now: float) -> bool:
        """Whether the others need not wait for it any longer."""
        return self.tries >= MAX_RETRIES or (
            self.failed is not None and now - self.failed > RECONNECT_TIMEOUT_S
        )


@dataclass
class ByteCount:
    """Bytes of envelopes since a moment, and how many were sent."""

    up: int = 0
    down: int = 0
    sent: int = 0


#: Acts on a site's reply to what it was asked; raises `MessageError` for one that is wrong.
Accept = Callable[[Participant, Envelope, MessageKind], None]


class Participants:
    """All sites that were seen, and the messages to and from them."""

    def __init__(
        self,
        transport: Transport,
        state: CoordinatorState,
        hello: bytes,
        clock: Callable[[], float],
    ) -> None:
        """`hello` is the body of the message to whoever is new; `clock` gives seconds."""
        self.transport = transport
        self.state = state
        self.hello = hello
        self.clock = clock
        self.byte_count = ByteCount()
        self._members: dict[str, Participant] = {}

    def __getitem__(self, name: str) -> Participant:
        return self._members[name]

    def all(self) -> list[Participant]:
        """Admitted sites by number, then the others as they came."""
        admitted = [
            participant for participant in self._members.values() if participant.number is not None
        ]
        others = [
            participant for participant in self._members.values() if participant.number is None
        ]
        return [*sorted(admitted, key=lambda participant: participant.client), *others]

    def free(self) -> list[Participant]:
        """Admitted sites that can be asked something now, by number."""
        return [participant for participant in self.all() if participant.free]

    def send(self, participant: Participant, kind: MessageKind, body: bytes = b"") -> None:
        """Ask a site something; it is not free until it has answered."""
        data = Envelope(kind, self.state.run, body).encode()
        participant.pending, participant.asked, participant.metrics = kind, self.clock(), None
        self.byte_count.down += len(data)
        self.byte_count.sent += 1
        self.transport.send(participant.name, data)

    def reject(self, participant: Participant, words: str) -> None:
        """Tell a site why it cannot take part; it is sent a HELLO again after a while."""
        participant.note, participant.ready, participant.refused = (
            printable(words)[:MAX_SENTENCE_BYTES],
            False,
            self.clock(),
        )
        self.send(
            participant, MessageKind.REJECT, words[:MAX_SENTENCE_BYTES].encode(errors="replace")
        )

    def exchange(
        self,
        kind: MessageKind,
        participants: Sequence[Participant],
        body: Callable[[Participant], bytes],
        done: Callable[[Participant], bool],
        closed: Callable[[float, Sequence[Participant]], bool],
        poll: Callable[[], None],
    ) -> None:
        """Ask sites something, and again those that were lost and came back, until it is enough.

        Args:
            body: of the message to a site, at the time when it is sent.
            done: whether a site has replied.
            closed: from the seconds since the beginning, and the sites that are no longer waited
                for, whether to go on.
            poll: takes what has come (`look`), and waits a moment.
        """
        began = self.clock()
        for participant in participants:
            participant.tries, participant.failed, participant.metrics = 0, None, None
        while True:
            for participant in participants:
                if participant.free and not done(participant) and participant.tries < MAX_RETRIES:
                    participant.tries += 1
                    self.send(participant, kind, body(participant))
            now = self.clock()
            gone = [
                p for p in participants if not done(p) and p.pending is not kind and p.lost(now)
            ]
            if closed(now - began, gone):
                return
            poll()

    def look(self, accept: Accept) -> None:
        """See who is there and what has come, and send a HELLO to whoever is new."""
        there = set(self.transport.present())
        for name in sorted(there - self._members.keys()):
            record = self.state.sites.get(name)
            self._members[name] = Participant(
                name, number=None if record is None else record.number
            )
        for participant in self._members.values():
            if participant.present and participant.name not in there:
                # It may come back with another configuration.
                participant.refused = None
            participant.present = participant.name in there
        for reply in self.transport.receive():
            self._take(reply, accept)
        now = self.clock()
        for participant in self._members.values():
            if participant.name in self.state.without:
                participant.ready, participant.note = False, "left out by --without"
                continue
            rejected = (
                participant.refused is not None and now - participant.refused < RETRY_REFUSED_S
            )
            if (
                participant.present
                and not participant.ready
                and not participant.pending
                and not rejected
            ):
                self.send(participant, MessageKind.HELLO, self.hello)

    def _take(self, reply: Reply, accept: Accept) -> None:
        participant = self._members.get(reply.site)
        if participant is None:
            return
        asked, participant.pending = participant.pending, None
        try:
            if reply.error:
                raise MessageError(reply.error)
            self.byte_count.up += len(reply.data)
            envelope = Envelope.decode(reply.data)
            if envelope.kind is not MessageKind.REFUSAL and envelope.run != self.state.run:
                raise MessageError("A message of another run was refused.")
            if asked is None or envelope.kind not in _REPLIES[asked] | {MessageKind.REFUSAL}:
                raise MessageError(f"Site {participant.name} answered with {envelope.kind.name}.")
            if envelope.kind is MessageKind.UNKNOWN_RUN:
                participant.ready, participant.failed = False, self.clock()
            else:
                accept(participant, envelope, asked)
        except MessageError as error:
            participant.note, participant.failed = (
                printable(str(error))[:MAX_SENTENCE_BYTES],
                self.clock(),
            )
            if asked is MessageKind.HELLO:
                participant.ready, participant.refused = False, self.clock()

    def status(self) -> list[dict[str, Any]]:
        """What there is to show of each site."""
        now = self.clock()
        return [
            {
                "name": participant.name,
                "label": participant.label,
                "number": participant.number,
                "examples": participant.examples,
                "ready": participant.ready,
                "present": participant.present,
                "pending": None
                if participant.pending is None
                else participant.pending.name.lower(),
                "waiting": now - participant.asked if participant.pending else None,
                "note": participant.note,
                "rounds": participant.rounds,
            }
            for participant in self.all()
        ]
