"""What a site answers to the steps of a secure sum."""

from collections.abc import Callable
from typing import Any

from fedforward.config.method_sections import FederationSection
from fedforward.core.errors import MessageError
from fedforward.deployment.secure.party import SumParty
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.secure import MaskedReport, SumOpening, SumRoster, SumStart, SumTask

#: Messages of a kind that a run may have: so many a round, and some more.
RETRIES, SPARE = 10, 50
#: From what is built for a run, a kind and a body, to the reply.
Answer = Callable[[Any, MessageKind, bytes], tuple[MessageKind, bytes]]


class SumSite:
    """A site's steps of all sums of one run.

    Attributes:
        kinds: of messages that it answers.
    """

    kinds = (
        MessageKind.SUM_START,
        MessageKind.SUM_ROSTER,
        MessageKind.SUM_TASK,
        MessageKind.SUM_OPENING,
    )

    def __init__(self, run: bytes, federation: FederationSection) -> None:
        self.run = run
        self.federation = federation
        self._party: SumParty | None = None

    def answer(self, tuning: Any, envelope: Envelope, task: Answer) -> tuple[MessageKind, bytes]:
        """The reply to a step.

        Args:
            tuning: what the site has built for the run.
            task: carries out a task, and replies with the report without masks.

        Raises:
            MessageError: the step is not one of the sum that is under way.
        """
        kind, body = envelope.kind, envelope.body
        rounds = self.federation.rounds
        most = RETRIES * rounds + SPARE
        if (count := tuning.asked.note(kind, most)) > most:
            raise MessageError(
                f"The {count}th {kind.name} was refused: the terms have {rounds} rounds, and this "
                f"site answers {most}."
            )
        if kind is MessageKind.SUM_START:
            return MessageKind.SUM_KEYS, self._start(tuning, SumStart.decode(body)).encode()
        if self._party is None:
            raise MessageError("A message of a sum was refused: this site has no keys in it.")
        if kind is MessageKind.SUM_ROSTER:
            shares = self._party.share(SumRoster.decode(body))
            return MessageKind.SUM_SHARES, shares.encode()
        if kind is MessageKind.SUM_OPENING:
            opened = self._party.open(SumOpening.decode(body))
            return MessageKind.SUM_OPENED, opened.encode()
        return self._masked(tuning, SumTask.decode(body), task)

    def _start(self, tuning: Any, request: SumStart) -> Any:
        if request.round >= self.federation.rounds:
            raise MessageError(
                f"A sum of round {request.round + 1} was refused: the terms have "
                f"{self.federation.rounds}."
            )
        # It refuses another number than this site has.
        tuning.client(request.client)
        if self._party is None:
            least = self.federation.secure_threshold
            self._party = SumParty(self.run, request.client, least)
        return self._party.start(request)

    def _masked(self, tuning: Any, request: SumTask, task: Answer) -> tuple[MessageKind, bytes]:
        assert self._party is not None
        report = self._party.masked(request)
        if report is None:
            kind, body = task(tuning, MessageKind.TASK, request.task)
            if kind is not MessageKind.REPORT:
                return kind, body
            report = self._party.mask(request, MaskedReport.decode(body))
        return MessageKind.MASKED_REPORT, report.encode()
