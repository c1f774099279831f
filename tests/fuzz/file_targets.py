"""Targets that read files: of a run, of a site, configurations, and rows of data."""

import atexit
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

from fedforward.config.loading import load, validate_as
from fedforward.config.site import load_site, load_terms
from fedforward.core.errors import FedForwardError
from fedforward.data import readers
from fedforward.data.values import text_of
from fedforward.deployment.state import CoordinatorState, read_without
from fedforward.federation import ledger_file as ledger_file_module
from fedforward.federation.audit import Audit
from fedforward.federation.ledger import Ledger
from fedforward.federation.ledger_file import SCHEMA
from fedforward.federation.ledger_head import read_head, write_head
from fedforward.federation.releases import Releases
from fedforward.training.run_directory import RunDirectory
from tests.fuzz.worlds import HEADER, method, settings
from tests.support.forgery import rechained


@lru_cache
def _folder() -> Path:
    """A folder in memory where the system has one, removed at the end."""
    memory = Path("/dev/shm")
    found = tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    return Path(found)


def _written(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def _look(ledger: Ledger) -> None:
    """All that `verify` does with rounds, but for the model."""
    audit = Audit(settings(), method(), ledger.remaining_rounds)
    for record in ledger.rounds():
        audit.take(record)
    list(ledger.entries())
    ledger.chain_after(ledger.length)


def ledger_rows(data: bytes) -> None:
    """Rows of a ledger whose chain fits: what it is made of, and what `verify` makes of that.

    A byte before each row has what kind of values it holds; entry and origin have lengths in front.
    """
    database = sqlite3.connect(":memory:")
    database.executescript(SCHEMA)
    database.execute("INSERT INTO header VALUES (0, ?)", (HEADER,))
    place, kinds = 0, []
    while place < len(data) and len(kinds) < 4:
        sizes = [int.from_bytes(data[place + at : place + at + 2], "little") for at in (1, 3)]
        kinds.append(data[place])
        place += 5
        parts = []
        for size in sizes:
            parts.append(data[place : place + size])
            place += size
        row = (len(kinds) - 1, *parts, b"")
        database.execute("INSERT INTO rounds VALUES (?, ?, ?, ?)", row)
    rechained(database)
    for number, kind in enumerate(kinds):
        for bit, change in _CHANGES.items():
            if kind & bit:
                database.execute(f"UPDATE rounds SET {change} WHERE round = ?", (number,))
    database.commit()
    path = _written("rows.sqlite", b"")
    with patch.object(ledger_file_module, "open_to_read", lambda path: database):
        try:
            with suppress(FedForwardError):
                _look(Ledger(path, read_only=True))
        finally:
            database.close()


#: What no server writes in a row, by the bit of its first byte.
_CHANGES = {
    64: "entry = hex(entry)",
    32: "origin = 3.5",
    16: "chain = substr(chain, 2)",
    8: "round = round + 1000",
}


def ledger_file(data: bytes) -> None:
    """A whole file that should be a ledger."""
    path = _written("whole.sqlite", data)
    for read_only in (True, False):
        with suppress(FedForwardError):
            ledger = Ledger(path, read_only=read_only)
            try:
                _look(ledger)
            finally:
                ledger.close()
    for other in _folder().glob("whole.*"):
        other.unlink()


def _metrics(path: Path) -> None:
    directory = RunDirectory(path)
    lines = directory.read_metrics(1000)
    directory.check_length(len(lines))
    directory.compare_summary(3, {"state_digest": "00", "ledger_digest": "00"})


def _head(path: Path) -> None:
    head = read_head(path / "ledger.sqlite")
    if head is not None:
        write_head(path / "ledger.sqlite", head)
        assert read_head(path / "ledger.sqlite") == head


def _state(path: Path) -> None:
    state = CoordinatorState(RunDirectory(path))
    state._read()
    state.examples()
    state.blocks()
    state._save()
    again = CoordinatorState(RunDirectory(path))
    again._read()
    assert (again.run, again.sites, again.reset) == (state.run, state.sites, state.reset)


def _registered(path: Path) -> None:
    from fedforward.deployment.flower.site_keys import SiteKeys

    SiteKeys(None, path / "keys.json", None)  # type: ignore[arg-type]


#: Files of a run and of a site, by the first byte: their name, and what reads them.
FILES: list[tuple[str, Callable[[Path], object]]] = [
    ("plan.json", lambda path: RunDirectory(path).load()),
    ("metrics.jsonl", _metrics),
    ("summary.json", _metrics),
    ("ledger.head", _head),
    ("federation.json", _state),
    ("without.json", read_without),
    ("releases.json", lambda path: Releases(path / "releases.json")),
    ("keys.json", _registered),
]


@lru_cache
def _run_folder() -> Path:
    folder = _folder() / "run"
    folder.mkdir()
    from fedforward.config.loading import validate

    given = {"model": {"path": "m"}, "data": {"source": "d", "prompt": "{a}", "answer": "{b}"}}
    RunDirectory(folder).start(validate(given))
    return folder


def run_files(data: bytes) -> None:
    """JSON of a run or of a site; the first byte says of which file."""
    if not data:
        return
    # A digit, so that JSON with another in front stays JSON for the mutator.
    name, look = FILES[data[0] % len(FILES)]
    folder = _run_folder()
    (folder / name).write_bytes(data[1:])
    try:
        with suppress(FedForwardError):
            look(folder)
    finally:
        (folder / name).unlink(missing_ok=True)


def config(data: bytes) -> None:
    """A run's TOML, as `run` and as `server` read it."""
    path = _written("run.toml", data)
    for read in (load, load_terms):
        with suppress(FedForwardError):
            if read is load:
                load(path)
            else:
                load_terms(path, [])


def site_config(data: bytes) -> None:
    """A site's TOML."""
    from fedforward.config.site import SiteConfig

    with suppress(FedForwardError):
        found = load_site(_written("site.toml", data))
        validate_as(SiteConfig, found.model_dump(), "again")


#: Ends of names of files with rows, by the first byte.
FORMS = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".ndjson")


def rows(data: bytes) -> None:
    """A file with rows of data; the first byte says in which form."""
    if not data:
        return
    path = _written("rows" + FORMS[data[0] % len(FORMS)], data[1:])
    for read in (readers.columns, readers.count):
        with suppress(FedForwardError):
            read(path)
    with suppress(FedForwardError):
        for _, row in readers.read(path):
            for value in row.values():
                with suppress(FedForwardError):
                    text_of(value, "field", "line 1")
    path.unlink()
