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

from fedforward.core.errors import FedForwardError, MessageError, UpdateNotFiniteError
from fedforward.core.files import parse_json
from fedforward.federation import ledger_file
from fedforward.federation.ledger_head import Head, head_file, read_head, write_head
from fedforward.messages.codec import Reader
from fedforward.messages.entry import Entry, remaining
from fedforward.messages.report import ClientResult, decode_results
from fedforward.messages.secure import Total

#: Rounds that are read at once: while a query runs, no other process can add a round.
_AT_ONCE = 256
#: The least and the largest number that a row can have.
_FIRST, _LAST = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Round:
    """One row of the ledger.

    Attributes:
        entry: how the tuned state changed.
        results: what it was made from, sorted by client.
        total: with secure sums, the sum of the reports, which `results` then have not.
    """

    entry: Entry
    results: tuple[ClientResult, ...]
    total: Total | None = None

    def origin(self) -> bytes:
        """What the entry was made from, as a row has it: the sum if there is one, then results."""
        total = b"" if self.total is None else self.total.encode()
        return total + b"".join(part.encode() for part in self.results)


class Ledger:
    """An open ledger file.

    Attributes:
        header: what the run is bound to (run seed, fingerprints, direction version …).
        length: rounds on disk.
        chain: 32 bytes, the chain hash of the last round (of the header, if there is none).
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open an existing ledger; check its chain, and that no round of it is gone.

        Args:
            read_only: neither make nor change anything in its folder; rounds cannot be added.

        Raises:
            FedForwardError: the file is missing, damaged, or was changed afterwards; or rounds
                that its head names are not there.
        """
        if not path.is_file():
            raise FedForwardError(f"{path} does not exist: there is no ledger to read.")
        self.path = path
        # Before the rounds: one may be added in between.
        head = read_head(path)
        opened = ledger_file.open_to_read if read_only else ledger_file.open_to_write
        self._database = opened(path)
        try:
            self._read()
            self._check_head(head)
            if not read_only and head != Head(self.length, self.chain):
                # A kill came between a round and its head.
                write_head(path, Head(self.length, self.chain))
        except BaseException:
            self._database.close()
            raise

    def _read(self) -> None:
        """Read the header, and check the chain of all rounds."""
        rows = self._query("SELECT content FROM header")
        if not rows:
            raise FedForwardError(f"{self.path} has no header: it is not a fedforward ledger.")
        text = rows[0][0]
        try:
            header = parse_json(text) if isinstance(text, str) else None
        except ValueError:
            header = None
        if not isinstance(header, dict):
            raise FedForwardError(
                f"{self.path}: its header is no JSON object: it is not a fedforward ledger. "
                "Restore it from a copy."
            )
        self.header: dict[str, Any] = header
        self.length = 0
        self.chain = self._first = _hash(text.encode("utf-8", "surrogatepass"))
        for number, entry, origin, chain in self._rows("entry, origin, chain", _FIRST):
            whole = all(isinstance(part, bytes) for part in (entry, origin, chain))
            if whole and number == self.length:
                self.chain = _link(self.chain, entry, origin)
            if not whole or number != self.length or chain != self.chain:
                raise FedForwardError(
                    f"{self.path}: round {number} does not follow from the rounds before it. The "
                    "ledger was damaged or changed; restore it from a copy."
                )
            self.length += 1

    def _check_head(self, head: Head | None) -> None:
        """Refuse a ledger that has lost rounds, or has others than its head names."""
        if head is None or (
            head.rounds <= self.length and self.chain_after(head.rounds) == head.chain
        ):
            return
        file = head_file(self.path)
        if head.rounds > self.length:
            raise FedForwardError(
                f"{self.path} has {self.length} rounds, and {file.name} beside it is of "
                f"{head.rounds}: rounds are missing. Copy the whole folder again while no run "
                f"writes to it, or restore {self.path.name} from a copy."
            )
        raise FedForwardError(
            f"{self.path}: its rounds up to {head.rounds} are not those of {file.name}: it is "
            "another run's, or was changed. Restore both files from one copy."
        )

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> "Ledger":
        """A new ledger bound to `header`; the file must not exist yet.

        Raises:
            FedForwardError: there is one, or there was; or it cannot be written.
        """
        if path.exists():
            raise FedForwardError(f"{path} exists already.")
        head = read_head(path)
        if head is not None and head.rounds:
            raise FedForwardError(
                f"{path} is missing, and {head_file(path).name} beside it is of {head.rounds} "
                "rounds. Restore it from a copy, or start again in a new directory."
            )
        content = json.dumps(dict(header), sort_keys=True)
        ledger_file.make(path, content)
        # It may be that of a ledger without rounds that is gone.
        head_file(path).unlink(missing_ok=True)
        return cls(path)

    @property
    def sums(self) -> bool:
        """Whether rounds have the sum of their reports in place of single ones."""
        return self.header.get("secure_sums") is True

    def chain_after(self, rounds: int) -> bytes:
        """The chain hash when the ledger had so many rounds, at most `length`; 32 bytes."""
        if not rounds:
            return self._first
        return bytes(self._query("SELECT chain FROM rounds WHERE round = ?", rounds - 1)[0][0])

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
            OSError: likewise for its head alone; the ledger then ends with this round.
        """
        self.check(record)
        entry = record.entry.encode()
        origin = record.origin()
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
        write_head(self.path, Head(self.length, chain))

    def entries(self, begin: int = 0, end: int | None = None) -> Iterator[Entry]:
        """The entries from round `begin` on and before `end`, oldest first.

        Raises:
            FedForwardError: one cannot be read.
        """
        for number, entry in self._rows("entry", max(0, begin), end):
            yield self._decoded(number, entry, b"").entry

    def rounds(self, begin: int = 0, end: int | None = None) -> Iterator[Round]:
        """Entries with what they were made from; see `entries`."""
        for number, entry, origin in self._rows("entry, origin", max(0, begin), end):
            yield self._decoded(number, entry, origin)

    def remaining_rounds(self, end: int | None = None) -> Iterator[Round]:
        """The rounds before `end` that no later one of them takes back, oldest first."""
        kept = {entry.round for entry in remaining(self.entries(0, end))}
        return (record for record in self.rounds(0, end) if record.entry.round in kept)

    def _decoded(self, number: int, entry: bytes, origin: bytes) -> Round:
        try:
            reader = Reader(origin)
            total = Total.read(reader) if self.sums and origin else None
            results = tuple(decode_results(origin[reader.place :]))
            record = Round(Entry.decode(entry), results, total)
            if record.entry.round != number:
                raise MessageError(f"It says that it is round {record.entry.round}.")
        except MessageError as error:
            raise FedForwardError(
                f"{self.path}: round {number} cannot be read. {error} Restore the ledger from a "
                "copy, or use the release of fedforward that wrote it, which environment.json "
                "beside it names."
            ) from error
        return record

    def _rows(self, columns: str, begin: int, end: int | None = None) -> Iterator[tuple[Any, ...]]:
        """The number of each round and the columns of its row, some rounds at a time."""
        place, last = begin, _LAST if end is None else end - 1
        while True:
            rows = self._query(
                f"SELECT round, {columns} FROM rounds WHERE round >= ? AND round <= ? "
                "ORDER BY round LIMIT ?",
                place,
                last,
                _AT_ONCE,
            )
            yield from rows
            if len(rows) < _AT_ONCE:
                return
            place = rows[-1][0] + 1

    def _query(self, statement: str, *values: int) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(statement, values).fetchall()
        except ledger_file.ERRORS as error:
            raise ledger_file.damaged(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _link(before: bytes, entry: bytes, origin: bytes) -> bytes:
    """SHA-256 over the chain so far and the two parts, each with its length in front."""
    lengths = struct.pack("<QQ", len(entry), len(origin))
    return _hash(before + lengths + entry + origin)
