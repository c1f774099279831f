"""SQLite's side of a ledger: how its file is made, opened to write, and opened to be read alone.

With a rollback journal the main file has every round once it is committed, and nothing beside it
is needed. A write-ahead log would be four times as fast, and keep the rounds in a second file.
"""

import shutil
import sqlite3
import tempfile
from pathlib import Path

from fedforward.core.errors import FedForwardError
from fedforward.core.files import keep_names

SCHEMA = """
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
#: What a damaged file raises: sqlite3 reads names in a damaged schema as text.
ERRORS = (sqlite3.Error, UnicodeError)
#: Seconds that a commit waits for readers, each of which reads some rounds at a time.
TIMEOUT_S = 60.0
#: What SQLite keeps beside a database whose last commit was cut short, or that has a log.
_BESIDE = ("-journal", "-wal")
#: Where a database file says whether it has a write-ahead log, and that it does.
_VERSION_PLACE, _WITH_LOG = 18, 2


def make(path: Path, header: str) -> None:
    """A ledger without rounds, as a whole or not at all.

    Raises:
        FedForwardError: the disk is full or the folder cannot be written; nothing is left there.
    """
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    try:
        database = sqlite3.connect(partial)
        try:
            database.execute("PRAGMA synchronous = FULL")
            with database:
                database.executescript("BEGIN;" + SCHEMA)
                database.execute("INSERT INTO header VALUES (0, ?)", (header,))
        finally:
            database.close()
        partial.replace(path)
    except (sqlite3.Error, OSError) as error:
        _remove(partial)
        raise FedForwardError(
            f"{path} cannot be made: {error}. No round was lost; make room, or look at the rights "
            "of the folder, and start again."
        ) from error
    keep_names(path.parent)


def _remove(partial: Path) -> None:
    for ending in ("", *_BESIDE, "-shm"):
        partial.with_name(partial.name + ending).unlink(missing_ok=True)


def open_to_write(path: Path) -> sqlite3.Connection:
    """A ledger to which rounds are added; what a kill has cut short is taken back first.

    Raises:
        FedForwardError: it is no database, is in use, or cannot be written.
    """
    database = sqlite3.connect(path, timeout=TIMEOUT_S)
    try:
        (mode,) = database.execute("PRAGMA journal_mode = DELETE").fetchone()
        if mode != "delete":
            raise sqlite3.OperationalError(f"its journal is {mode!r}; another process has it open")
        # FULL would not wait until the folder has forgotten the journal, so that a power failure
        # could take back a round that others have been told of.
        database.execute("PRAGMA synchronous = EXTRA")
    except ERRORS as error:
        database.close()
        raise damaged(path, error) from error
    return database


def open_to_read(path: Path) -> sqlite3.Connection:
    """A ledger that is read alone: nothing is made or changed in its folder.

    Raises:
        FedForwardError: it is no database, or cannot be read.
    """
    try:
        if _has_log(path):
            # Without its log, SQLite would make a new one. With it, rounds may be in there.
            if _beside(path):
                return _copy(path)
            return _read_only(path, "&immutable=1")
        try:
            return _read_only(path)
        except sqlite3.OperationalError as error:
            # A commit was cut short; taking it back needs a place to write.
            if error.sqlite_errorname == "SQLITE_READONLY_ROLLBACK":
                return _copy(path)
            raise
    except (*ERRORS, OSError) as error:
        raise damaged(path, error) from error


def _read_only(path: Path, more: str = "") -> sqlite3.Connection:
    database = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro{more}", uri=True, timeout=TIMEOUT_S
    )
    try:
        database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    except ERRORS:
        database.close()
        raise
    return database


def _copy(path: Path) -> sqlite3.Connection:
    """The database with what is beside it, in memory; as whole as SQLite makes it."""
    copy = sqlite3.connect(":memory:")
    with tempfile.TemporaryDirectory() as folder:
        for file in (path, *_beside(path)):
            shutil.copyfile(file, Path(folder) / file.name)
        whole = sqlite3.connect(Path(folder) / path.name)
        try:
            whole.backup(copy)
        except ERRORS:
            copy.close()
            raise
        finally:
            whole.close()
    return copy


def _beside(path: Path) -> list[Path]:
    files = [path.with_name(path.name + ending) for ending in _BESIDE]
    return [file for file in files if file.is_file() and file.stat().st_size]


def _has_log(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(_VERSION_PLACE)
        return file.read(1) == bytes([_WITH_LOG])


def damaged(path: Path, error: Exception) -> FedForwardError:
    """The sentence for a file that SQLite cannot use."""
    if getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
        return FedForwardError(
            f"{path} is in use by another process. Wait until that one has ended, or stop it."
        )
    reason = str(error).split(" with text ")[0]
    return FedForwardError(
        f"{path} cannot be read as a ledger: {reason}. Restore it from a copy, or start again in a "
        "new directory."
    )
