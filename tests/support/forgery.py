"""What an attacker with the files does: rounds altered, and the chain over them made anew."""

import hashlib
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

from fedforward.federation.ledger_head import Head, write_head
from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult, decode_results


def rechained(database: sqlite3.Connection) -> tuple[int, bytes]:
    """Make the chain of a ledger fit its rows; returns their number and the last hash."""
    database.execute("DROP TRIGGER IF EXISTS rounds_kept")
    (header,) = database.execute("SELECT content FROM header").fetchone()
    chain = hashlib.sha256(header if isinstance(header, bytes) else header.encode()).digest()
    rows = database.execute("SELECT round, entry, origin FROM rounds ORDER BY round").fetchall()
    for number, entry, origin in rows:
        if isinstance(entry, bytes) and isinstance(origin, bytes):
            lengths = struct.pack("<QQ", len(entry), len(origin))
            chain = hashlib.sha256(chain + lengths + entry + origin).digest()
        database.execute("UPDATE rounds SET chain = ? WHERE round = ?", (chain, number))
    database.commit()
    return len(rows), chain


def altered(
    path: Path,
    number: int,
    results: Callable[[list[ClientResult]], list[ClientResult]] = list,
    entry: Callable[[Entry], Entry] = lambda entry: entry,
) -> bytes:
    """A ledger with another round, and chain and head that fit it; returns the chain's end."""
    database = sqlite3.connect(path)
    database.execute("DROP TRIGGER IF EXISTS rounds_kept")
    row = "SELECT entry, origin FROM rounds WHERE round = ?"
    found, origin = database.execute(row, (number,)).fetchone()
    parts = results(list(decode_results(origin)))
    database.execute(
        "UPDATE rounds SET entry = ?, origin = ? WHERE round = ?",
        (entry(Entry.decode(found)).encode(), b"".join(p.encode() for p in parts), number),
    )
    length, chain = rechained(database)
    database.close()
    write_head(path, Head(length, chain))
    return chain
