"""The tuned state of a method whose ledger cannot rebuild it: a file beside the ledger.

The file of a round is on disk before the round is; its SHA-256 is the payload of the ledger entry.
"""

import hashlib
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.core.files import keep_names, write_bytes
from fedforward.federation.ledger import Ledger


def _file(folder: Path, rounds: int) -> Path:
    return folder / f"state-{rounds}.bin"


def write_state(folder: Path, rounds: int, data: bytes) -> None:
    """Keep the state after so many rounds, and the one before; older ones are removed."""
    path = _file(folder, rounds)
    write_bytes(path, data)
    keep_names(folder)
    for old in folder.glob("state-*.bin"):
        if old not in (path, _file(folder, rounds - 1)):
            old.unlink()


def read_state(ledger: Ledger, state: Any, rounds: int | None = None) -> None:
    """Bring what a method remembers to the end of its ledger.

    Args:
        rounds: after which the state is wanted; None is all. The last two are kept.

    Raises:
        FedForwardError: the file is missing, or is not the state that the ledger names.
    """
    rounds = ledger.length if rounds is None else rounds
    if not rounds:
        return
    path = _file(ledger.path.parent, rounds)
    last = next(ledger.entries(rounds - 1))
    try:
        data = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise FedForwardError(f"{path} cannot be read: {error.strerror}.") from error
    if hashlib.sha256(data).digest() != last.payload:
        raise FedForwardError(
            f"{path} is missing or is not the state that the ledger names. A run whose clients "
            "send tensors cannot be rebuilt from its ledger; start it again in a new directory."
            if rounds == ledger.length
            else f"{path} is missing or is not the state that the ledger names. A run whose "
            f"clients send tensors keeps its last two states alone: give round {ledger.length}."
        )
    state.restore(data)
