"""The source of truth of a run: a hash-chained list of rounds in SQLite, on disk before it counts.

A row holds the entry (what changed), what it was made from (reports, rates, weights), and the
chain hash over both and the row before. Rows are only ever added; the database itself refuses
anything else. Everything else of a run can be rebuilt from here and the base model.
"""

import hashlib
import json
import sqlite3
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedforward.core.errors import FedForwardError, UpdateNotFiniteError
from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult, decode_results

_SCHEMA = """
CREATE TABLE header (only_row INTEGER PRIMARY KEY CHECK (only_row = 0), content TEXT NOT NULL);
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY, entry BLOB NOT NULL, origin BLOB NOT NULL, chain BLOB NOT NULL
);
CREATE TRIGGER header_kept BEFORE UPDATE ON header BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER rounds_kept BEFORE UPDATE ON rounds BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER rounds_new BEFORE INSERT ON rounds
    WHEN EXISTS (SELECT 1 FROM rounds WHERE round = NEW.round)
    BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER header_stays BEFORE DELETE ON header BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER rounds_stay BEFORE DELETE ON rounds BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""


@dataclass(frozen=True)
class Round:
    """One row of the ledger.

    Attributes:
        entry: how the tuned state changed.
        results: what it was made from, sorted by client.
    """

    entry: Entry
    results: tuple[ClientResult, ...]


class Ledger:
    """An open ledger file.

    Attributes:
        header: what the run is bound to (run seed, fingerprints, direction version …).
        length: rounds on disk.
        chain: 32 bytes, the chain hash of the last round (of the header, if there is none).
    """

    def __init__(self, path: Path) -> None:
        """Open an existing ledger and check its chain.

        Raises:
            FedForwardError: the file is missing, damaged, or was changed afterwards.
        """
        if not path.is_file():
            raise FedForwardError(f"{path} does not exist: there is no ledger to read.")
        self.path = path
        self._database = _connect(path)
        try:
            row = self._database.execute("SELECT content FROM header").fetchone()
            if row is None:
                raise FedForwardError(f"{path} has no header: it is not a fedforward ledger.")
            self.header: dict[str, Any] = json.loads(row[0])
            self.length = 0
            self.chain = _hash(row[0].encode())
            for number, entry, origin, chain in self._database.execute(
                "SELECT round, entry, origin, chain FROM rounds ORDER BY round"
            ):
                self.chain = _link(self.chain, entry, origin)
                if number != self.length or chain != self.chain:
                    raise FedForwardError(
                        f"{path}: round {number} does not follow from the rounds before it. The "
                        "ledger was damaged or changed; restore it from a copy."
                    )
                self.length += 1
        except sqlite3.DatabaseError as error:
            raise _damaged(path, error) from error

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> "Ledger":
        """A new ledger bound to `header`; the file must not exist yet."""
        if path.exists():
            raise FedForwardError(f"{path} exists already.")
        # A kill must not leave a ledger without its header.
        partial = path.with_name(path.name + ".partial")
        for ending in ("", "-wal", "-shm"):
            partial.with_name(partial.name + ending).unlink(missing_ok=True)
        database = _connect(partial)
        with database:
            database.executescript("BEGIN;" + _SCHEMA)
            content = json.dumps(dict(header), sort_keys=True)
            database.execute("INSERT INTO header VALUES (0, ?)", (content,))
        database.close()
        partial.replace(path)
        return cls(path)

    def check(self, record: Round) -> None:
        """Whether a round can follow.

        Raises:
            ValueError: it is not the next one.
            UpdateNotFiniteError: its update is not finite.
        """
        if record.entry.round != self.length:
            raise ValueError(f"round {record.entry.round} cannot follow {self.length - 1}")
        parts = record.entry.contributions
        if not all(np.isfinite(part.coefficients).all() for part in parts):
            raise UpdateNotFiniteError(
                f"The update of round {self.length + 1} is not finite and was not written. Lower "
                "method.learning_rate; the rounds before are kept."
            )

    def append(self, record: Round) -> None:
        """Add the next round; it is on disk when this returns.

        Raises:
            FedForwardError: the update is not finite.
            sqlite3.OperationalError: the disk is full or the file cannot be written. Nothing is
                lost: the ledger then ends with the round before.
        """
        self.check(record)
        entry = record.entry.encode()
        origin = b"".join(part.encode() for part in record.results)
        chain = _link(self.chain, entry, origin)
        try:
            with self._database:
                self._database.execute(
                    "INSERT INTO rounds VALUES (?, ?, ?, ?)", (self.length, entry, origin, chain)
                )
        except sqlite3.IntegrityError as error:
            raise FedForwardError(
                f"{self.path}: round {self.length} was written by another process. Only one may "
                "carry out a run at a time; stop the other, then --resume."
            ) from error
        self.length += 1
        self.chain = chain

    def entries(self, begin: int = 0) -> Iterator[Entry]:
        """The entries from round `begin` on, oldest first."""
        for (entry,) in self._database.execute(
            "SELECT entry FROM rounds WHERE round >= ? ORDER BY round", (begin,)
        ):
            yield Entry.decode(entry)

    def rounds(self, begin: int = 0) -> Iterator[Round]:
        """Entries with what they were made from, from round `begin` on, oldest first."""
        for entry, origin in self._database.execute(
            "SELECT entry, origin FROM rounds WHERE round >= ? ORDER BY round", (max(0, begin),)
        ):
            yield Round(Entry.decode(entry), tuple(decode_results(origin)))

    def close(self) -> None:
        """Fold the write-ahead log into the file and close it."""
        self._database.close()


def _connect(path: Path) -> sqlite3.Connection:
    # The read-only look at a finished run must not need write access to it.
    database = sqlite3.connect(path, timeout=10.0)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
    except sqlite3.DatabaseError as error:
        database.close()
        raise _damaged(path, error) from error
    return database


def _damaged(path: Path, error: Exception) -> FedForwardError:
    reason = str(error).split(" with text ")[0]
    return FedForwardError(
        f"{path} cannot be read as a ledger: {reason}. Restore it from a copy, or start again in a "
        "new directory."
    )


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _link(before: bytes, entry: bytes, origin: bytes) -> bytes:
    """SHA-256 over the chain so far and the two parts, each with its length in front."""
    lengths = struct.pack("<QQ", len(entry), len(origin))
    return _hash(before + lengths + entry + origin)
