"""The listing of a letter has every byte of it, and says what is in it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedforward.cli import main as cli
from fedforward.cli.message_dump import listing
from fedforward.core.errors import MessageError
from fedforward.messages.codec import Listed
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.messages.report import Report
from fedforward.messages.secure import (
    MaskedReport,
    OpenShare,
    SealedShare,
    SumKeys,
    SumOpened,
    SumOpening,
    SumRoster,
    SumShares,
    SumStart,
    SumTask,
)
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from tests.deployment.test_coordinator import party
from tests.messages.test_envelope import ENROLLMENT, RUN

ODD = np.array([True, False, True])
ENTRIES = (
    Entry(0, (Contribution(1, np.array([0.5, -2.0], np.float32), ODD),)),
    Entry(1, (), 0.5, b"payload"),
)
TASK = Task(
    2,
    4,
    1e-3,
    True,
    ENTRIES,
    True,
    ODD,
    b"sampling weights",
    3,
    Snapshot(1, b"d" * 32, b"tensors").encode(),
)
REPORT = Report(2, 4, 30, 1.25, 1, np.array([3.0, 0.0], np.float32), b"p" * 16)
SEARCHED = replace(REPORT, line_search=np.array([1.0, 0.5, 0.75, 0.125], np.float32))
SESSION = b"an attempt's name"[:16]
WORDS = np.array([1, 2**64 - 1], np.uint64)
SUM_KEYS = SumKeys(2, 4, SESSION, b"k" * 32, b"m" * 32, b"c" * 32, WORDS)
SEALED = SealedShare(4, 5, b"e" * 48)
BODIES: dict[MessageKind, bytes] = {
    MessageKind.HELLO: b'{"terms":{}}',
    MessageKind.TASK: TASK.encode(),
    MessageKind.FINALIZE: TASK.encode(),
    MessageKind.ENROLLMENT: ENROLLMENT.encode(),
    MessageKind.REPORT: REPORT.encode(),
    MessageKind.SNAPSHOT: Snapshot(1, b"", b"").encode(),
    MessageKind.REFUSAL: Refusal(RefusalCode.LIMITS, ("lora.rank",)).encode(),
    MessageKind.UNKNOWN_RUN: b"",
    MessageKind.SUM_START: SumStart(2, 4, SESSION).encode(),
    MessageKind.SUM_KEYS: SUM_KEYS.encode(),
    MessageKind.SUM_ROSTER: SumRoster(2, SESSION, (SUM_KEYS, SUM_KEYS)).encode(),
    MessageKind.SUM_SHARES: SumShares(2, 4, SESSION, (SEALED,)).encode(),
    MessageKind.SUM_TASK: SumTask(SESSION, TASK.encode(), (SEALED, SEALED)).encode(),
    MessageKind.MASKED_REPORT: MaskedReport(2, 4, WORDS, b"p" * 16, SESSION).encode(),
    MessageKind.SUM_OPENING: SumOpening(2, SESSION, WORDS).encode(),
    MessageKind.SUM_OPENED: SumOpened(2, 4, SESSION, (OpenShare(5, 1, b"s" * 16),)).encode(),
}


def values(fields: list[Listed]) -> dict[str, str]:
    return {field.name: field.value for field in fields}


@pytest.mark.parametrize("kind", list(BODIES))
def test_every_byte_is_listed_once(kind: MessageKind) -> None:
    sealed = Envelope(kind, RUN, BODIES[kind]).encode()
    fields = listing(sealed)
    assert b"".join(field.data for field in fields) == sealed
    place = 0
    for field in fields:
        assert field.place == place and field.data
        place += len(field.data)
    assert values(fields)[f"envelope: kind ({kind.name})"] == str(int(kind))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(list(MessageKind)),
    begin=st.sampled_from(list(BODIES.values())),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 400),
)
def test_a_message_of_any_content_is_listed_or_a_sentence(
    kind: MessageKind, begin: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    body = bytearray(begin[cut:] if cut % 2 else begin)
    for place, value in changes:
        if body:
            body[place % len(body)] = value
    data = Envelope(kind, RUN, bytes(body)).encode()
    try:
        found = listing(data)
    except MessageError:
        return
    assert b"".join(field.data for field in found) == data


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":1e999}',
        b'{"a":"\\ud800"}',
        b'{"a":NaN}',
        b"\xff\xfe",
    ],
)
def test_json_of_any_kind_is_listed_or_a_sentence(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "message"
    path.write_bytes(Envelope(MessageKind.METRICS, RUN, body).encode())
    for more in ([], ["--json"]):
        result = CliRunner().invoke(cli.app, ["inspect-message", str(path), *more])
        assert result.exit_code in (0, 2), result.exception


def test_values_are_what_was_written() -> None:
    found = values(listing(Envelope(MessageKind.REPORT, RUN, REPORT.encode()).encode()))
    assert found["client"] == "4" and found["examples"] == "30"
    assert found["loss"] == "1.25"
    assert found["gradients, 2 × float32"] == "3, 0"
    found = values(listing(Envelope(MessageKind.REPORT, RUN, SEARCHED.encode()).encode()))
    assert found["line search, 4 × float32"] == "1, 0.5, 0.75, 0.125"
    found = values(listing(Envelope(MessageKind.TASK, RUN, TASK.encode()).encode()))
    assert found["learning rate"] == "0.001" and found["entries: decay"] == "0.5"
    assert found["entries: contributions: coefficients, 2 × float32"] == "0.5, -2"
    assert found["line search"] == "3"
    assert found["entries: contributions: blocks, a bit each"] == "10100000"
    sealed = Envelope(MessageKind.REFUSAL, RUN, BODIES[MessageKind.REFUSAL]).encode()
    assert json.loads(values(listing(sealed))["JSON"]) == {"code": "limits", "keys": ["lora.rank"]}
    with pytest.raises(MessageError):
        listing(sealed[:-1])


def test_letters_on_the_command_line(tmp_path: Path) -> None:
    path, runner = tmp_path / "000001-out-report", CliRunner()
    path.write_bytes(Envelope(MessageKind.REPORT, RUN, REPORT.encode()).encode())
    shown = runner.invoke(cli.app, ["inspect-message", str(path), "--json"])
    fields: list[dict[str, Any]] = json.loads(shown.stdout)[str(path)]
    assert bytes.fromhex("".join(field["bytes"] for field in fields)) == path.read_bytes()
    assert "3, 0" in runner.invoke(cli.app, ["inspect-message", str(path)]).stdout
    path.write_bytes(b"nonsense of some length")
    for wrong, words in ((path, "not fedforward's"), (tmp_path / "none", "cannot be read")):
        result = runner.invoke(cli.app, ["inspect-message", str(wrong)])
        assert result.exit_code == 2 and words in result.stderr.replace("\n", " ")


def test_a_site_keeps_what_came_and_what_went(tmp_path: Path) -> None:
    site = party(tmp_path, "a", site__keep_messages=True)
    answers = [site.answer(b"nonsense"), site.answer(Envelope(MessageKind.TASK, RUN, b"").encode())]
    folder = tmp_path / "a" / "messages"
    names = ["000001-in", "000001-out-refusal", "000002-in", "000002-out-unknown_run"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [(folder / name).read_bytes() for name in names[1::2]] == answers
    assert (folder / "000001-in").read_bytes() == b"nonsense"
    party(tmp_path, "b").answer(b"nonsense")
    assert not (tmp_path / "b").exists()
