"""The tuned state of a method whose ledger cannot rebuild it: a file beside the ledger.

The file of a round is on disk before the round is; its SHA-256 is the payload of the ledger entry.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.federation.ledger import Ledger


def _file(folder: Path, rounds: int) -> Path:
    return folder / f"state-{rounds}.bin"


def write_state(folder: Path, rounds: int, data: bytes) -> None:
    """Keep the state after so many rounds, and the one before; older ones are removed."""
    path = _file(folder, rounds)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    for old in folder.glob("state-*.bin"):
        if old not in (path, _file(folder, rounds - 1)):
            old.unlink()


def read_state(ledger: Ledger, state: Any) -> None:
    """Bring what a method remembers to the end of its ledger.

    Raises:
        FedForwardError: the file is missing, or is not the state that the ledger names.
    """
    if not ledger.length:
        return
    path = _file(ledger.path.parent, ledger.length)
    last = next(ledger.entries(ledger.length - 1))
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).digest() != last.payload:
        raise FedForwardError(
            f"{path} is missing or is not the state that the ledger names. A run whose clients "
            "send tensors cannot be rebuilt from its ledger; start it again in a new directory."
        )
    state.restore(data)
