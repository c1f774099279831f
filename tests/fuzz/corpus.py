"""The corpus: for each target some bytes that it takes, from which a fuzzer goes on.

    python -m tests.fuzz.corpus

writes tests/fuzz/corpus/. The same bytes come each time; a test compares.
"""

import base64
import gzip
import hashlib
import json
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from fedforward.config.site import AT_SITES, example_site, terms
from fedforward.config.template import example
from fedforward.core.identity import ModelIdentity
from fedforward.core.steps import ProbePlan
from fedforward.messages.codec import HEADER as HEAD
from fedforward.messages.codec import Message
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.envelope import Enrollment, MessageKind, encode_json
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.messages.report import ClientResult
from fedforward.messages.secure import MaskedReport, SumStart, Total
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from tests.fuzz import worlds
from tests.fuzz.live_targets import entry, repeated_sum
from tests.fuzz.targets import SUMS, TARGETS

FOLDER = Path(__file__).parent / "corpus"
Seeds = dict[str, bytes]


def body(message: Message) -> bytes:
    """A message without the header that its target puts in front."""
    return message.encode()[HEAD.size if message.KIND else 0 :]


def _tasks() -> Seeds:
    moved = np.array([True, False])
    parts = (Contribution(3, np.array([1, -2], np.float32), moved, 1), *entry(1).contributions)
    late = Entry(1, parts, 0.5, b"payload")
    state = np.arange(16, dtype=np.float32).tobytes()
    snapshot = Snapshot(2, hashlib.sha256(state).digest(), state)
    return {
        "plain": body(Task(2, 0, 1e-3, False, ())),
        "late": body(Task(3, 0, 1e-3, True, (entry(2),), blocks=moved, line_search=2)),
        "again": body(Task(2, 0, 1e-3, True, (entry(0), late), reset=True, payload=b"p")),
        "snapshot": body(Task(2, 0, 1e-3, True, (), reset=True, snapshot=snapshot.encode())),
    }


def _reports() -> Seeds:
    searched = np.array([1, 2, 3, 0.5], np.float32)
    return {
        "plain": body(worlds.report(0)),
        "bare": body(worlds.report(1, digest=b"", loss=float("nan"), skipped=2)),
        "search": body(worlds.report(2, payload=b"votes", line_search=searched)),
    }


def _entries() -> Seeds:
    wide = Contribution(1, np.array([1, 2], np.float32), np.arange(9) % 2 == 0, 2)
    return {
        "plain": body(entry(1)),
        "empty": body(Entry(0, ())),
        "wide": body(Entry(5, (wide, *entry(0).contributions), 0.9, b"payload")),
    }


def _results() -> list[ClientResult]:
    # What the server of these tests writes of two clients of 10 and 20 examples.
    return [
        ClientResult(weight, 1e-2, worlds.report(client))
        for client, weight in enumerate((1 / 3, 2 / 3))
    ]


def _rows() -> Seeds:
    server = worlds.server()
    for number in range(2):
        server.open_round()
        digest = b"" if number else bytes(16)
        for client in range(3):
            server.receive(worlds.report(client, number, digest=digest).encode())
        server.close_round()
    rows = b""
    for record in server.ledger.rounds():
        parts = record.entry.encode(), record.origin()
        rows += b"\0" + b"".join(len(part).to_bytes(2, "little") for part in parts)
        rows += b"".join(parts)
    odd = bytearray(rows)
    odd[0] = 64
    return {"two": rows, "text": bytes(odd)}


def _ledger() -> bytes:
    from fedforward.federation import ledger_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA page_size = 512")
            database.executescript(ledger_file.SCHEMA)
            database.execute("INSERT INTO header VALUES (0, ?)", (worlds.HEADER,))
            chain = hashlib.sha256(worlds.HEADER.encode()).digest()
            made, origin = entry(0).encode(), b"".join(part.encode() for part in _results())
            lengths = len(made).to_bytes(8, "little") + len(origin).to_bytes(8, "little")
            chain = hashlib.sha256(chain + lengths + made + origin).digest()
            database.execute("INSERT INTO rounds VALUES (0, ?, ?, ?)", (made, origin, chain))
            database.commit()
        data = bytearray(path.read_bytes())
    # SQLite writes its own version there.
    data[96:100] = bytes(4)
    return bytes(data)


def _server() -> Seeds:
    def sent(head: int, message: Message) -> bytes:
        data = body(message)
        return bytes([head]) + len(data).to_bytes(2, "little") + data

    reports = b"".join(sent(client, worlds.report(client)) for client in range(3))
    other = sent(2, worlds.report(2, digest=bytes([1] * 16)))
    state = bytes(4 * worlds.LAYOUT.parameters)
    snapshot = sent(16, Snapshot(0, hashlib.sha256(state).digest(), state))
    later = b"".join(sent(client, worlds.report(client, 1, digest=b"")) for client in range(3))
    return {
        "whole": reports + later,
        "other": reports[: len(reports) // 3 * 2] + other,
        "snapshot": snapshot + reports,
    }


def _sums() -> dict[str, Seeds]:
    session: Seeds = {}
    party: Seeds = {}
    with repeated_sum() as made:
        made.begin()
        roster = made.session.roster()[HEAD.size :]
        keys, shares = body(made.session.keys[3]), body(made.session.shares[3])
        task = body(made.task(1))
        summed = made.mask()
        opened = body(made.opened(0, summed))
        opening = made.session.opening(summed)[HEAD.size :]
        masked = body(made.reports[0])
    session = {"keys": b"\0" + keys, "shares": b"\1" + shares, "opened": b"\2" + opened}
    party = {"roster": b"\0" + roster, "task": b"\1" + task, "opening": b"\2" + opening}
    start = body(SumStart(4, 1, bytes(16)))
    plain = body(MaskedReport(0, 1, np.arange(5, dtype=np.uint64), bytes(16)))
    total = body(Total(3, np.arange(5, dtype=np.uint64)))
    bodies = [start, keys, roster, shares, task, masked, opening, opened, total]
    named = {
        kind.__name__: bytes([number]) + data
        for number, (kind, data) in enumerate(zip(SUMS, bodies, strict=True))
    }
    return {
        "sums": {**named, "plain": bytes([SUMS.index(MaskedReport)]) + plain},
        "sum_session": session,
        "sum_party": party,
    }


def _content() -> dict[str, dict[str, Any]]:
    return {
        "model": {"path": AT_SITES},
        "data": {"source": AT_SITES, "prompt": "{question}\n", "answer": " {answer}"},
        "federation": {"rounds": 5},
        "method": {"learning_rate": 1e-3},
    }


def _terms() -> Seeds:
    from fedforward.config.loading import validate

    plain = _content()
    private = {
        **plain,
        "privacy": {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5, "examples": 100},
    }
    words = {**plain, "data": {**plain["data"], "label_words": {"0": " no", "1": " yes"}}}
    words["method"] = {"learning_rate": "auto", "objective": "choice", "name": "decomfl"}
    found = {}
    for name, content in (("plain", plain), ("private", private), ("words", words)):
        try:
            found[name] = encode_json({**terms(validate(content))})
        except Exception:
            if name == "plain":
                raise
    return found


def _envelopes(seeds: dict[str, Seeds]) -> Seeds:
    said = [
        (MessageKind.TASK, seeds["task"]["late"], 1),
        (MessageKind.REPORT, seeds["report"]["plain"], 2),
        (MessageKind.SNAPSHOT, seeds["snapshot"]["plain"], 3),
        (MessageKind.SUM_TASK, seeds["sums"]["SumTask"][1:], 8),
    ]
    found = {
        kind.name: bytes([kind]) + HEAD.pack(b"FF", _version(), number) + data
        for kind, data, number in said
    }
    found["METRICS"] = bytes([MessageKind.METRICS]) + seeds["metrics"]["plain"]
    found["REJECT"] = bytes([MessageKind.REJECT]) + "a sentence é".encode()
    return found


def _version() -> int:
    from fedforward.messages.codec import WIRE_VERSION

    return WIRE_VERSION


def _site(tasks: Seeds) -> Seeds:
    head = HEAD.pack(b"FF", _version(), Task.KIND)
    found = {name: bytes([MessageKind.TASK]) + head + data for name, data in tasks.items()}
    found["evaluation"] = bytes([MessageKind.EVALUATION]) + head + tasks["plain"]
    found["snapshot_request"] = bytes([MessageKind.SNAPSHOT_REQUEST])
    found["reject"] = bytes([MessageKind.REJECT]) + b"no"
    return found


def _files() -> Seeds:
    from dataclasses import asdict

    line = {"round": 0, "example": None, "heldout_loss": 1.0, "seconds": 0.0}
    later = {
        **{"round": 1, "seconds": 1.0, "training_loss": 1.0, "skipped_steps": 0},
        **{"learning_rates": {"0": 1e-3}, "bytes": {"up": 1.0, "down": 2.0}},
        **{"metrics": {"accuracy": 0.5}, "heldout_loss": None},
    }
    sites = {"a": {"number": 0, "examples": 3, "active_blocks": None}}
    contents: list[Any] = [
        asdict(
            ProbePlan(
                probes_per_call=2,
                threads=1,
                device="cpu",
                evaluation_rows=4,
                trajectory="recompute",
            )
        ),
        line,
        {"rounds": 3, "state_digest": "00", "ledger_digest": "00"},
        {"rounds": 2, "chain": "ab" * 32},
        {"run": "00" * 8, "reset": [0], "sites": sites},
        ["a", "b"],
        {"round": 1, "question": "00", "report": worlds.report(0).encode().hex()},
        {"a": {"key": "00", "node": 5}},
    ]
    found = {str(n): bytes([n]) + json.dumps(part).encode() for n, part in enumerate(contents)}
    found["lines"] = b"\1" + "\n".join(json.dumps(part) for part in (line, later)).encode()
    return found


def _heads() -> Seeds:
    key = base64.b64encode(b"key").decode()
    lines = [
        "POST /v1/fleet/pull-messages HTTP/1.1",
        "Host: a",
        f"flwr-public-key: {key}",
        f"flwr-signature: {key}",
        "flwr-timestamp: 2026-01-01T00:00:00+00:00",
        "Content-Length: 4",
        "",
        "body",
    ]
    text = "\r\n".join(lines).encode()
    chunked = text.replace(b"Content-Length: 4", b"Transfer-Encoding: chunked")
    plain = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    return {
        "keyed": b"\1" + text,
        "open": b"\2" + text,
        "chunked": b"\0" + chunked,
        "get": b"\0" + plain,
    }


def _data() -> Seeds:
    rows = [{"q": "é", "n": 1.50, "deep": {"a": [1, None]}}, {"q": "x", "n": -0, "deep": {}}]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    return {
        "lines": b"\0" + lines,
        "array": b"\1" + json.dumps(rows, indent=1).encode(),
        "wrapped": b"\1" + json.dumps({"data": rows}).encode(),
        "columns": b"\1" + json.dumps({"a": [1, 2], "b": [3, 4]}).encode(),
        "csv": b'\2q,n\n"a, ""b""",1\nx,2\n',
        "tsv": b"\3q\tn\nx\t1\n",
        "packed": b"\4" + gzip.compress(lines, mtime=0),
    }


def make() -> dict[str, Seeds]:
    """Names and bytes, by target."""
    layout = worlds.LAYOUT
    identity = ModelIdentity(layout, "ab" * 32, ("no", "yes"), 64, "cd" * 32, "", "", "")
    figures = {"rounds": 1, "digest": "ab" * 32, "examples": 2, "tokens": 9, "heldout_loss": 0.5}
    tasks = _tasks()
    state = np.arange(16, dtype=np.float32).tobytes()
    seeds: dict[str, Seeds] = {
        "task": tasks,
        "report": _reports(),
        "entry": _entries(),
        "snapshot": {
            "plain": body(Snapshot(3, hashlib.sha256(state).digest(), state, b"state")),
            "bare": body(Snapshot(0, b"", b"")),
        },
        "client_result": {"plain": _results()[0].encode(), "other": _results()[1].encode()},
        "results": {"two": b"".join(part.encode() for part in _results())},
        **_sums(),
        "enrollment": {
            "plain": Enrollment("a", identity, 10, 2, 0).encode(),
            "blocks": Enrollment("", identity, 1, 0, 5, 1).encode(),
        },
        "metrics": {
            "plain": encode_json({**figures, "metrics": {"accuracy": 0.5}}),
            "null": encode_json({**figures, "heldout_loss": None}),
            "bare": encode_json({"rounds": 0, "digest": "", "examples": 0, "tokens": 0}),
        },
        "refusal": {
            "limits": Refusal(RefusalCode.LIMITS, ("lora.rank",)).encode(),
            "bare": Refusal(RefusalCode.MEMORY).encode(),
        },
        "hello": _terms(),
        "template": {
            "plain": "Q: {q}\nA: {a[0].b!r} {{}} é".encode(),
            "path": b"messages[0].content",
        },
        "site": _site(tasks),
        "server": _server(),
        "proxy_head": _heads(),
        "ledger_rows": _rows(),
        "ledger_file": {"one": _ledger()},
        "run_files": _files(),
        "config": {
            "example": example().encode(),
            "small": b'model.path = "m"\n[data]\nsource = "d"\nprompt = "{a}"\nanswer = "{b}"\n',
        },
        "site_config": {"example": example_site().encode()},
        "rows": _data(),
    }
    seeds["envelope"] = _envelopes(seeds)
    assert seeds.keys() == TARGETS.keys()
    return seeds


def write(folder: Path = FOLDER) -> None:
    """A folder for each target, a file for each piece."""
    for target, pieces in make().items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for name, data in pieces.items():
            (folder / target / name).write_bytes(data)


if __name__ == "__main__":
    write()
