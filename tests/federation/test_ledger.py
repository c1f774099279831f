"""The ledger's file: whole after every round, and refused where rounds of it are gone."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.core.errors import FedForwardError
from fedforward.federation import ledger_file
from fedforward.federation.ledger import Ledger, Round
from fedforward.federation.ledger_head import Head, head_file, read_head, write_head
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.report import ClientResult, Report
from tests.support.forgery import rechained


def record(number: int, size: int = 3) -> Round:
    values = np.full(size, 0.5 + number, np.float32)
    report = Report(number, 0, 10, loss=1.0, skipped=0, gradients=values)
    return Round(Entry(number, (Contribution(0, -values),)), (ClientResult(1.0, 1.0, report),))


def made(path: Path, rounds: int = 3) -> Path:
    ledger = Ledger.create(path, {"run_seed": 3})
    for number in range(rounds):
        ledger.append(record(number))
    ledger.close()
    return path


def listing(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return made(tmp_path / "run/ledger.sqlite")


def test_the_main_file_alone_is_whole_after_each_round(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.sqlite", {})
    for number in range(5):
        ledger.append(record(number))
        assert {file.name for file in tmp_path.iterdir()} == {"ledger.sqlite", "ledger.head"}
        (tmp_path / "alone").mkdir()
        alone = Ledger(Path(shutil.copy(ledger.path, tmp_path / "alone")), read_only=True)
        assert alone.length == number + 1 and alone.chain == ledger.chain
        assert read_head(ledger.path) == Head(number + 1, ledger.chain)
        shutil.rmtree(tmp_path / "alone")
        alone.close()
    ledger.close()


APPEND = (
    "import sys; from pathlib import Path\n"
    "from fedforward.federation.ledger import Ledger\n"
    "from tests.federation.test_ledger import record\n"
    "ledger = Ledger.create(Path(sys.argv[1]), {})\n"
    "for number in range(100_000):\n"
    "    ledger.append(record(number, 3000))\n"
    "    print(number + 1, flush=True)\n"
)


def test_a_kill_loses_no_round(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    line = [sys.executable, "-c", APPEND, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(12)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.readlines()
    done = int(told[-1])
    head = read_head(path)
    # What reads alone takes nothing back, and nothing away.
    before = sorted(file.name for file in tmp_path.iterdir())
    reader = Ledger(path, read_only=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    assert head is not None and done <= head.rounds <= reader.length <= head.rounds + 1
    writer = Ledger(path)
    assert writer.chain == reader.chain
    writer.append(record(writer.length))
    assert read_head(path) == Head(writer.length, writer.chain)


def test_a_ledger_that_lost_rounds_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    shorter = made(path.parent.parent / "shorter.sqlite", 2).read_bytes()
    path.write_bytes(shorter)
    for read_only in (False, True):
        with pytest.raises(FedForwardError) as caught:
            Ledger(path, read_only=read_only)
        assert "has 2 rounds, and ledger.head beside it is of 3: rounds are missing" in str(
            caught.value
        )
        assert "Copy the whole folder again while no run writes to it" in str(caught.value)
    path.unlink()
    with pytest.raises(FedForwardError, match=r"ledger\.head beside it is of 3 rounds"):
        Ledger.create(path, {"run_seed": 3})
    path.write_bytes(whole)
    assert Ledger(path).length == 3


def test_another_ledger_of_that_length_is_refused(path: Path) -> None:
    other = Ledger.create(path.parent.parent / "other.sqlite", {"run_seed": 4})
    for number in range(4):
        other.append(record(number))
    other.close()
    shutil.copy(other.path, path)
    with pytest.raises(FedForwardError, match=r"rounds up to 3 are not those of ledger\.head"):
        Ledger(path)


def test_a_kill_between_a_round_and_its_head_is_mended(path: Path) -> None:
    ledger = Ledger(path)
    before = read_head(path)
    ledger.append(record(3))
    ledger.close()
    assert before is not None
    write_head(path, before)
    assert Ledger(path, read_only=True).length == 4
    assert read_head(path) == before
    again = Ledger(path)
    assert read_head(path) == Head(4, again.chain)
    head_file(path).unlink()
    assert Ledger(path).length == 4 and read_head(path) == Head(4, again.chain)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{}", "[" * 100_000, '{"rounds": -1, "chain": "00"}', "\0\xff",
        '{"rounds": "3", "chain": ""}', '{"rounds": true, "chain": "%s"}' % ("0" * 64),
        '{"rounds": 3, "chain": "%s"}' % ("x" * 64), '{"rounds": 3}', '{"rounds": 1e400}',
    ],
    ids=range(12),
)  # fmt: skip
def test_an_absurd_head_is_a_sentence(path: Path, text: str) -> None:
    head_file(path).write_text(text, encoding="latin-1")
    with pytest.raises(FedForwardError, match=r"ledger\.head .*Restore it from a copy, or remove"):
        Ledger(path)


# Reading alone.


def wal_mode(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode = WAL")
    database.close()


def rounds_in_the_log(path: Path) -> None:
    """The last round lies in a write-ahead log, as after a kill of a process that has one."""
    wal_mode(path)
    copy = path.with_name("copy")
    head_file(path).unlink()
    database = sqlite3.connect(path)
    last = database.execute("SELECT * FROM rounds WHERE round = 2").fetchone()
    database.executescript("DROP TRIGGER rounds_stay; DELETE FROM rounds WHERE round = 2")
    database.close()
    database = sqlite3.connect(path)
    with database:
        database.execute("INSERT INTO rounds VALUES (?, ?, ?, ?)", last)
    for ending in ("", "-wal"):
        shutil.copy(f"{path}{ending}", f"{copy}{ending}")
    database.close()
    for ending in ("", "-wal"):
        shutil.move(f"{copy}{ending}", f"{path}{ending}")


@pytest.mark.parametrize("change", [lambda path: None, wal_mode, rounds_in_the_log])
def test_reading_alone_changes_nothing(
    path: Path, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(path)
    before, opened, connect = listing(path.parent), [], sqlite3.connect

    def watched(where: Any, **options: Any) -> sqlite3.Connection:
        opened.append(str(where))
        return connect(where, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", watched)
        ledger = Ledger(path, read_only=True)
    assert ledger.length == 3 and len(list(ledger.rounds())) == 3
    assert not [where for where in opened if str(path) in where and "?mode=ro" not in where]
    ledger.close()
    assert listing(path.parent) == before


def test_readers_do_not_hold_up_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_file, "TIMEOUT_S", 0.0)
    writer, reader = Ledger(path), Ledger(path, read_only=True)
    reading = reader.rounds()
    next(reading)
    writer.append(record(3))
    assert len(list(reading)) >= 2
    assert [entry.round for entry in reader.entries(1, 3)] == [1, 2]


# Full disks.


def limited(size: int, code: str, path: Path) -> str:
    """Run code in a process whose files may not be larger; returns what it printed."""
    start = (
        "import resource, sqlite3, sys; from pathlib import Path\n"
        "from fedforward.core.errors import FedForwardError\n"
        "from fedforward.federation.ledger import Ledger\n"
        "from tests.federation.test_ledger import record\n"
        "path = Path(sys.argv[1])\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, "-c", start + code, str(path)]
    return subprocess.run(
        line, capture_output=True, text=True, env=environment, check=True
    ).stdout.strip()


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the size of files")
@pytest.mark.parametrize("size", [0, 100, 4096, 8192])
def test_a_full_disk_leaves_no_part_of_a_new_ledger(tmp_path: Path, size: int) -> None:
    code = "try:\n    Ledger.create(path, {})\nexcept FedForwardError as error:\n    print(error)\n"
    path = tmp_path / "ledger.sqlite"
    assert "cannot be made" in limited(size, code, path)
    assert list(tmp_path.iterdir()) == []
    assert Ledger.create(path, {}).length == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the size of files")
@pytest.mark.parametrize("size", [24_000, 40_000, 40_960, 57_000])
def test_a_full_disk_keeps_all_rounds(tmp_path: Path, size: int) -> None:
    code = (
        "ledger = Ledger.create(path, {})\n"
        "try:\n"
        "    for number in range(1000):\n"
        "        ledger.append(record(number, 300))\n"
        "except (OSError, sqlite3.OperationalError):\n"
        "    print(ledger.length, ledger.chain.hex())\n"
    )
    path = tmp_path / "ledger.sqlite"
    length, chain = limited(size, code, path).split()
    reader = Ledger(path, read_only=True)
    assert (reader.length, reader.chain.hex()) == (int(length), chain) and reader.length > 1
    again = Ledger(path)
    again.append(record(again.length))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ledger.head", "ledger.sqlite"]


# Rows that nobody has written so.


def rewritten(path: Path, **changes: Any) -> None:
    """The ledger with other values in round 1, or in its header, and a chain that fits."""
    database = sqlite3.connect(path)
    database.executescript("DROP TRIGGER rounds_kept; DROP TRIGGER header_kept")
    for column, value in changes.items():
        table = "header" if column == "content" else "rounds WHERE round = 1"
        name, _, where = table.partition(" ")
        database.execute(f"UPDATE {name} SET {column} = ? {where}", (value,))
    rechained(database)
    database.close()
    head_file(path).unlink()


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"entry": b""}, "round 1 cannot be read"),
        ({"origin": b"\x00" * 7}, "round 1 cannot be read"),
        ({"entry": record(2).entry.encode()}, "round 1 cannot be read"),
        ({"entry": "text"}, "round 1 does not follow"),
        ({"origin": 7}, "round 1 does not follow"),
        ({"content": "[]"}, "header is no JSON object"),
        ({"content": "{"}, "header is no JSON object"),
        ({"content": "[" * 100_000}, "header is no JSON object"),
        ({"content": b"{}"}, "header is no JSON object"),
    ],
)
def test_absurd_rows_are_sentences(
    path: Path, changes: dict[str, Any], words: str, read_only: bool
) -> None:
    rewritten(path, **changes)
    with pytest.raises(FedForwardError) as caught:
        list(Ledger(path, read_only=read_only).rounds())
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_the_head_is_json(path: Path) -> None:
    content = json.loads(head_file(path).read_text(encoding="utf-8"))
    assert content == {"rounds": 3, "chain": Ledger(path).chain.hex()}
