"""Rounds of a ledger put into a model one after another, and compared with all that names them."""

from collections.abc import Callable

from fedforward.federation.audit import Audit
from fedforward.federation.client import Replica
from fedforward.federation.ledger import Ledger, Round
from fedforward.federation.state_file import read_state
from fedforward.messages.entry import Entry, takes_back
from fedforward.messages.snapshot import Snapshot
from fedforward.training.metrics import RoundOutcome, round_line
from fedforward.training.run_directory import strict
from fedforward.training.summary import Lines

#: Rounds that are committed at once: a model may join them.
_AT_ONCE = 64

#: Called with the rounds that are rebuilt and all there are.
RoundCallback = Callable[[int, int], None]


class RoundReplay:
    """Brings a replica to a round of a ledger, and compares on the way.

    Attributes:
        proofs: state digests in clients' reports that were compared.
        differences: a sentence on the first round that does not agree with its reports, with its
            metrics, and with the state that clients had.
    """

    def __init__(self, ledger: Ledger, count: int, replica: Replica, audit: Audit) -> None:
        self.ledger = ledger
        self.count = count
        self.replica = replica
        self.audit = audit
        self.proofs = 0
        self._agreed = 0
        self._wrong_state = self._wrong_line = ""

    @property
    def differences(self) -> list[str]:
        """See the class."""
        found = (self.audit.difference, self._wrong_line, self._wrong_state)
        return [words for words in found if words]

    def run(self, lines: Lines, on_round: RoundCallback) -> None:
        """Come to `count` rounds.

        Args:
            lines: of metrics, as far as there are any.
            on_round: called after each round.
        """
        replayable = self.replica.method.capabilities.replayable
        due: list[Entry] = []
        # The reports of the round after prove the state that is wanted.
        for record in self.ledger.rounds(0, self.count + 1):
            claimed = {r.report.digest for r in record.results if r.report.digest}
            if replayable and (claimed or len(due) == _AT_ONCE):
                self._catch_up(due)
                due = []
                self._compare(record.entry.round, claimed)
            if record.entry.round == self.count:
                break
            self.audit.take(record)
            self._compare_line(record, lines)
            if replayable:
                due.append(record.entry)
            on_round(record.entry.round + 1, self.count)
        if replayable:
            self._catch_up(due)
            return
        self._restore()

    def _catch_up(self, due: list[Entry]) -> None:
        """Commit the next entries; from the base on where they take back what is committed."""
        if takes_back(due, self.replica.rounds):
            due = list(self.ledger.entries(0, due[-1].round + 1))
        self.replica.catch_up(due)

    def _compare_line(self, record: Round, lines: Lines) -> None:
        """Compare a round with its line of metrics, if there is one."""
        after = record.entry.round + 1
        if self._wrong_line or after >= len(lines):
            return
        wanted = strict(round_line(RoundOutcome(record), 0.0))
        # JSON has no numbers for names.
        wanted["learning_rates"] = {str(n): rate for n, rate in wanted["learning_rates"].items()}
        for name in ("training_loss", "skipped_steps", "learning_rates", "taken_back"):
            if lines[after].get(name) != wanted.get(name):
                self._wrong_line = (
                    f"metrics.jsonl has {name} {lines[after].get(name)} after {after} rounds, the "
                    f"ledger {wanted.get(name)}"
                )

    def _compare(self, round_number: int, claimed: set[bytes]) -> None:
        """Compare the replica with what clients had at the beginning of a round."""
        if not claimed:
            return
        self.proofs += len(claimed)
        own = self.replica.digest()
        if claimed == {own}:
            self._agreed = round_number
        elif not self._wrong_state:
            self._wrong_state = (
                f"round {round_number}: the clients' state was "
                f"{' and '.join(sorted(d.hex() for d in claimed))}, the rebuilt one is {own.hex()}"
                f" (they agreed up to round {self._agreed})"
            )

    def _restore(self) -> None:
        """Take over the state of a method whose entries are no list of steps."""
        replica = self.replica
        read_state(self.ledger, replica.state, self.count)
        if self.count:
            replica.restore(Snapshot(self.count, b"", b"", replica.state.encode()))
