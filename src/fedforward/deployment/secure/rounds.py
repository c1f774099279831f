"""The steps of a secure sum between the coordinator and its sites: keys, shares, reports, opening.

A site that is away in a step is left out of those that follow. In the last step its masks are
taken off with the others' shares.
"""

from collections.abc import Callable, Mapping, Sequence

from fedforward.core.errors import MessageError
from fedforward.deployment.participants import Participant, Participants
from fedforward.deployment.secure.session import SumSession
from fedforward.federation.agreement import QuorumError
from fedforward.federation.ledger import Round
from fedforward.federation.secure_sums import EXTRA
from fedforward.federation.server import Server
from fedforward.messages.envelope import Envelope, MessageKind


class SumRounds:
    """Carries the steps of one round's sum.

    Attributes:
        session: the attempt that is under way; None before the first.
    """

    def __init__(
        self, participants: Participants, server: Server, least: int, poll: Callable[[], None]
    ) -> None:
        """`least` is `federation.secure_threshold`; `poll` takes what has come, and waits."""
        self.participants = participants
        self.server = server
        self.least = least
        self.poll = poll
        self.session: SumSession | None = None

    @property
    def _open(self) -> SumSession:
        if self.session is None:
            raise MessageError("A part of a sum was refused: none is under way.")
        return self.session

    def accept(self, participant: Participant, reply: Envelope) -> None:
        """Act on a reply to a step; raises `MessageError` for what is wrong with it."""
        takes = {
            MessageKind.SUM_KEYS: self._open.take_keys,
            MessageKind.SUM_SHARES: self._open.take_shares,
            MessageKind.SUM_OPENED: self._open.take_opened,
        }
        takes[reply.kind](reply.body, participant.client)
        participant.failed, participant.note = None, ""

    def gather(self, sites: Sequence[Participant]) -> list[Participant]:
        """Have sites send keys and shares; returns those that have sent both, by number.

        Raises:
            QuorumError: they are too few.
        """
        session = self.session = SumSession(
            self.participants.state.run, self.server.round, self.least
        )
        self._step(MessageKind.SUM_START, sites, lambda p: session.start(p.client), session.keys)
        session.make_roster()
        members = [p for p in sites if p.client in session.keys]
        self._step(MessageKind.SUM_ROSTER, members, lambda p: session.roster(), session.shares)
        session.check_enough(len(session.shares), "shares")
        return [p for p in members if p.client in session.shares]

    def task(self, participant: Participant, task: bytes) -> bytes:
        """A task as it is sent, with the shares for a site."""
        return self._open.task(participant.client, task)

    def close(self, sites: Sequence[Participant]) -> Round:
        """Open the sum of the reports that have come, and close the round with it.

        Args:
            sites: that were asked for reports.

        Raises:
            QuorumError: too few sites have reported, or help to open the sum.
        """
        session = self._open
        summed = self.server.agree_on_sum(session.threshold)
        if required := session.required():
            if missing := sorted(set(required) - set(summed)):
                raise QuorumError(
                    f"Round {session.round} cannot be closed: some sites have opened its sum with "
                    f"client {missing[0]} before, and open no other one. Wait for that site, or "
                    "start the sites again."
                )
            self.server.keep_reports(required)
            summed = list(required)
        body = session.opening(summed)
        here = [p for p in sites if p.free and p.client in summed]
        self._step(MessageKind.SUM_OPENING, here, lambda p: body, session.opened)
        numbers = self.server.method.local_steps * self.server.method.directions
        return self.server.close_sum(session.masks(numbers + EXTRA))

    def _step(
        self,
        kind: MessageKind,
        sites: Sequence[Participant],
        body: Callable[[Participant], bytes],
        came: Mapping[int, object],
    ) -> None:
        """Ask sites, until all have answered, or enough and the others are gone or late."""
        session, deadline = self._open, self.server.settings.deadline

        def closed(seconds: float, gone: Sequence[Participant]) -> bool:
            missing = {p.client for p in sites} - came.keys()
            enough = len(came) >= max(session.threshold, self.least)
            if missing <= {p.client for p in gone}:
                return True
            # Others than those who were asked may hold the round.
            others = len(self.participants.free()) >= self.server.settings.quorum
            return seconds >= deadline and (enough or others)

        self.participants.exchange(kind, sites, body, lambda p: p.client in came, closed, self.poll)
