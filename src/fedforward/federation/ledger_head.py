"""The head of a ledger, in a small file beside it: how many rounds it has had, and its chain then.

SQLite opens a database whose last pages are gone, or an older copy, as if it were whole. The head
is written after each round, so a ledger that is shorter than its head has lost rounds.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from fedforward.core.errors import FedForwardError
from fedforward.core.files import read_object, write_bytes


@dataclass(frozen=True)
class Head:
    """What a ledger had when its last round was written.

    Attributes:
        rounds: in it.
        chain: 32 bytes, its chain hash.
    """

    rounds: int
    chain: bytes


def head_file(ledger: Path) -> Path:
    """Where the head of a ledger lies: `ledger.head` beside `ledger.sqlite`."""
    return ledger.with_suffix(".head")


def read_head(ledger: Path) -> Head | None:
    """The head of the ledger in a file; None where there is none.

    Raises:
        FedForwardError: it cannot be read.
    """
    path = head_file(ledger)
    if not path.exists():
        return None
    advice = f"Restore it from a copy, or remove it if {ledger.name} is whole."
    content = read_object(path, advice)
    rounds, chain = content.get("rounds"), content.get("chain")
    try:
        if type(rounds) is not int or rounds < 0 or not isinstance(chain, str) or len(chain) != 64:
            raise ValueError
        return Head(rounds, bytes.fromhex(chain))
    except ValueError as error:
        raise FedForwardError(
            f'{path} is damaged: it must be {{"rounds": N, "chain": 64 hexadecimal digits}}. '
            + advice
        ) from error


def write_head(ledger: Path, head: Head) -> None:
    """Replace the head of a ledger as a whole.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    content = {"rounds": head.rounds, "chain": head.chain.hex()}
    write_bytes(head_file(ledger), json.dumps(content).encode() + b"\n")
