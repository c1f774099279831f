"""What a party has seen of a ledger: a hash over the entries that it was sent.

A site keeps it in a file. It then refuses another history of the same run, and whoever has the
ledger can say whether it is the one that the site was sent. Imports no PyTorch.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedforward.core.errors import FedForwardError
from fedforward.core.files import read_object
from fedforward.federation.ledger import Ledger
from fedforward.messages.entry import Entry

#: Hexadecimal digits of a run's name and of a hash.
_RUN_DIGITS, _HASH_DIGITS = 16, 64


@dataclass(frozen=True)
class Seen:
    """The entries from one round to another.

    Attributes:
        begin: the first round; more than 0 where a snapshot stood in place of those before.
        rounds: ledger rounds that are known after it.
        entries: SHA-256 over the hash before and the next encoded entry, 32 bytes; zeros of none.

    Example:
        >>> Seen(0, 0).extended([Entry(0, ())]).rounds
        1
    """

    begin: int
    rounds: int
    entries: bytes = bytes(32)

    def extended(self, entries: Iterable[Entry]) -> "Seen":
        """With the next entries."""
        return [self, *self.each(entries)][-1]

    def each(self, entries: Iterable[Entry]) -> Iterator["Seen"]:
        """What was seen after each of the next entries."""
        rounds, known = self.rounds, self.entries
        for entry in entries:
            known = hashlib.sha256(known + entry.encode()).digest()
            rounds += 1
            yield Seen(self.begin, rounds, known)

    def to_json(self) -> dict[str, int | str]:
        """As a file has it."""
        return {"begin": self.begin, "rounds": self.rounds, "entries": self.entries.hex()}


@dataclass(frozen=True)
class Witness:
    """What a site has seen of a run.

    Attributes:
        run: the run's name, hexadecimal.
        seen: by the round where it begins.
    """

    run: str
    seen: dict[int, Seen]

    def to_json(self) -> dict[str, object]:
        """As a file has it."""
        return {"run": self.run, "seen": [self.seen[n].to_json() for n in sorted(self.seen)]}


def read_witness(path: Path) -> Witness:
    """What a file says that a site has seen.

    Raises:
        FedForwardError: it cannot be read.
    """
    advice = "It is seen/RUN.json of a site's folder: restore it from a copy."
    content = read_object(path, advice)
    run, parts = content.get("run"), content.get("seen")
    try:
        if not isinstance(run, str) or len(bytes.fromhex(run)) * 2 != _RUN_DIGITS:
            raise ValueError
        if not isinstance(parts, list):
            raise ValueError
        found = [_decoded(part) for part in parts]
    except ValueError as error:
        raise FedForwardError(
            f"{path} is damaged: it does not say what a site has seen of a run. {advice}"
        ) from error
    return Witness(run, {part.begin: part for part in found})


def _decoded(part: object) -> Seen:
    if not isinstance(part, dict):
        raise ValueError
    begin, rounds, entries = (part.get(name) for name in ("begin", "rounds", "entries"))
    if type(begin) is not int or type(rounds) is not int or not 0 <= begin <= rounds:
        raise ValueError
    if not isinstance(entries, str) or len(entries) != _HASH_DIGITS:
        raise ValueError
    return Seen(begin, rounds, bytes.fromhex(entries))


def differences(ledger: Ledger, witness: Witness) -> list[str]:
    """A sentence for each part of what a site has seen that is not the ledger's.

    Args:
        witness: of the ledger's run.
    """
    found = []
    for begin, seen in sorted(witness.seen.items()):
        if seen.rounds > ledger.length:
            found.append(f"the site has seen {seen.rounds} rounds, and {ledger.length} are here")
        elif Seen(begin, begin).extended(ledger.entries(begin, seen.rounds)) != seen:
            found.append(f"rounds {begin} to {seen.rounds - 1} that the site has seen are others")
    return found
