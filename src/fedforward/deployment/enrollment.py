"""Which sites take part in a run: those whose model is the one that most sites have.

A site enrolls with what it must have in common with the others, is a candidate, and is admitted
with a number of its own. The first sites settle the model; the ledger's header keeps it. Imports
no PyTorch.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.identity import ModelIdentity
from fedforward.deployment.participants import Participant, Participants
from fedforward.deployment.state import CoordinatorState
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import Server
from fedforward.messages.envelope import Enrollment, deviation, difference
from fedforward.training import assembly
from fedforward.training.run_directory import RunDirectory, errors_of_the_disk


class Admission:
    """Admits sites to one run.

    Attributes:
        identity: the model that the run is of; None until the first sites have settled it.
        candidates: sites that have enrolled and are not admitted yet, by name.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        state: CoordinatorState,
        participants: Participants,
    ) -> None:
        self.config = config
        self.directory = directory
        self.state = state
        self.participants = participants
        self.identity: ModelIdentity | None = None
        self.candidates: dict[str, Enrollment] = {}

    def consider(self, participant: Participant, enrollment: Enrollment) -> None:
        """Keep a site as a candidate, unless it has another model than the sites agreed on."""
        participant.note, participant.refused = "", None
        participant.examples, participant.display_name = enrollment.examples, enrollment.name
        participant.heldout = enrollment.heldout
        if self.identity is not None:
            words = difference(enrollment.model, self.identity)
            if words:
                self.participants.reject(participant, words)
                return
        self.candidates[participant.name] = enrollment
        participant.ready = True

    def admit(self, server: Server) -> None:
        """Give the candidates their numbers; these are on disk before the sites hear of them."""
        candidates, self.candidates = self.candidates, {}
        self.state.admit(candidates)
        for name in sorted(candidates, key=lambda name: self.state.sites[name].number):
            participant, enrollment = self.participants[name], candidates[name]
            participant.number, participant.failed = self.state.sites[name].number, None
            server.enrol(participant.number, enrollment.examples, enrollment.rounds)

    def gather(self, wait: Callable[[str], None]) -> ModelIdentity:
        """Wait for the first sites, and settle what all must have in common.

        Args:
            wait: takes what has come and waits a moment; told, in words, what is waited for.

        Raises:
            FedForwardError: no model is that of most sites, and `federation.start_deadline`
                has brought none that tells.
        """
        quorum, pinned = assembly.quorum_of(self.config), self._pinned()
        # A run that goes on needs only its quorum; a new one waits for all that it counts on.
        wanted = quorum if pinned else max(self.config.federation.clients, quorum)
        identity = None
        here: dict[str, Enrollment] = {}
        since: dict[str, float] = {}
        tied = math.inf
        what = ""
        while identity is None or len(here) < quorum:
            identity = None
            wait(what or f"waiting for sites: {len(here)} of {wanted} are ready")
            what = ""
            late = self._late(since)
            here = {
                name: enrollment
                for name, enrollment in self.candidates.items()
                if self.participants[name].ready and self.participants[name].present
            }
            for name in list(here):
                if words := deviation(self.header(here[name].model), pinned):
                    self._reject(name, here, words)
            # However many are late: a run begins with most of the sites that it counts on.
            if len(here) < max(quorum, wanted - late, wanted // 2 + 1):
                continue
            try:
                identity = agreed(here)
            except FedForwardError:
                # Another site may tell; which of these is wrong is not known.
                tied = min(tied, self.participants.clock())
                if self.participants.clock() - tied >= self.config.federation.start_deadline:
                    raise
                what = "waiting for another site: as many have one model as another"
                continue
            tied = math.inf
            for name in list(here):
                if here[name].model != identity:
                    self._reject(name, here, difference(here[name].model, identity))
        for name in self.candidates.keys() - here.keys():
            # It left while the others were waited for; it is asked again when it is back.
            self.participants[name].ready = False
        self.identity, self.candidates = identity, here
        return identity

    def _late(self, since: dict[str, float]) -> int:
        """Sites that were seen and have not enrolled for so long that nobody waits for them.

        Args:
            since: when each was first seen like that, whether it left meanwhile or not.
        """
        now = self.participants.clock()
        waiting = {p.name for p in self.participants.all() if not p.ready}
        for name in waiting - since.keys():
            since[name] = now
        deadline = self.config.federation.start_deadline
        return sum(now - since[name] >= deadline for name in waiting)

    def _reject(self, name: str, here: dict[str, Enrollment], words: str) -> None:
        del here[name], self.candidates[name]
        self.participants.reject(self.participants[name], words)

    def _pinned(self) -> dict[str, Any] | None:
        """The header of the ledger, if there is one."""
        if not self.directory.ledger.is_file():
            self.directory.check_length(0)
            return None
        with closing(Ledger(self.directory.ledger, read_only=True)) as ledger:
            self.directory.check_length(ledger.length)
            return ledger.header

    def header(self, model: ModelIdentity) -> dict[str, Any]:
        """What the ledger of this run is bound to with a model."""
        return {
            **assembly.ledger_header(self.config, model),
            "tokenizer": model.tokenizer,
            "state_bytes": model.state_bytes,
            "run": self.state.run.hex(),
        }

    def open_ledger(self, identity: ModelIdentity) -> Ledger:
        """The run's ledger; a new one is bound to the model."""
        path = self.directory.ledger
        with errors_of_the_disk(self.directory.path):
            return Ledger(path) if path.is_file() else Ledger.create(path, self.header(identity))


def agreed(enrollments: Mapping[str, Enrollment]) -> ModelIdentity:
    """The model that most sites have.

    Raises:
        FedForwardError: there is no majority.
    """
    models = [enrollment.model for enrollment in enrollments.values()]
    (most, count), *others = Counter(models).most_common(2)
    if others and others[0][1] == count:
        groups = [[n for n, e in enrollments.items() if e.model == model] for model in set(models)]
        raise FedForwardError(
            "The sites do not have the same model, and none has most: "
            f"{'; '.join(sorted(', '.join(group) for group in groups))}. Give all the same base "
            "model, dtype and tokenizer."
        )
    return most
