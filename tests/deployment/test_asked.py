"""What a site was asked outlasts its process, and is on disk before an answer leaves."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedforward.config import site as sites
from fedforward.core.errors import FedForwardError
from fedforward.deployment.asked import Asked, SeenTerms
from fedforward.deployment.site import RETRIES, SPARE, Site
from fedforward.federation.releases import Releases
from fedforward.messages.envelope import Envelope, MessageKind, encode_json
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.messages.task import Task
from tests.support.sites import party, run_toml

RUN = b"one run."


def enrolled(folder: Path, **changes: Any) -> Site:
    """A site's process that has begun with a run."""
    site = party(folder, "a", **changes)
    terms = sites.terms(run_toml(folder, "federation.rounds=1"))
    hello = Envelope(MessageKind.HELLO, RUN, encode_json({"terms": terms}))
    assert Envelope.decode(site.answer(hello.encode())).kind is MessageKind.ENROLLMENT
    return site


def ask(site: Site) -> Envelope:
    task = Task(0, 0, 0.0, True, (), reset=True)
    return Envelope.decode(
        site.answer(Envelope(MessageKind.EVALUATION, RUN, task.encode()).encode())
    )


def file_of(folder: Path) -> Path:
    return folder / "a" / "asked" / f"{RUN.hex()}.json"


def test_a_restart_does_not_begin_anew(tmp_path: Path) -> None:
    most = RETRIES + SPARE
    site = enrolled(tmp_path)
    assert ask(site).kind is MessageKind.METRICS
    path = file_of(tmp_path)
    assert json.loads(path.read_text()) == {"EVALUATION": 1}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(json.dumps({"EVALUATION": most - 1}))
    site = enrolled(tmp_path)
    assert [ask(site).kind for _ in range(3)] == [
        MessageKind.METRICS,
        MessageKind.REFUSAL,
        MessageKind.REFUSAL,
    ]
    assert ask(enrolled(tmp_path)).kind is MessageKind.REFUSAL
    # Nothing else was asked, and other kinds have counts of their own.
    assert json.loads(path.read_text()) == {"EVALUATION": most}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"EVALUATION": -1}', '{"EVALUATION": 1.5}',
                                  '{"OTHER": 1}', '{"TASK": "1"}', "[" * 100_000])  # fmt: skip
def test_a_damaged_file_is_a_sentence_and_a_refusal(tmp_path: Path, text: str, caplog: Any) -> None:
    enrolled(tmp_path)
    path = file_of(tmp_path)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(FedForwardError, match=r"asked.*\.json .*(restore it from a copy)"):
        Asked(path)
    site = party(tmp_path, "a")
    terms = sites.terms(run_toml(tmp_path, "federation.rounds=1"))
    hello = Envelope(MessageKind.HELLO, RUN, encode_json({"terms": terms}))
    answer = Envelope.decode(site.answer(hello.encode()))
    assert Refusal.decode(answer.body) == Refusal(RefusalCode.TERMS)
    assert str(path) in caplog.text and str(path).encode() not in answer.body
    assert path.read_text() == text


def test_what_cannot_be_written_down_is_not_answered(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    site = enrolled(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedforward.deployment.asked.write_bytes", full)
    assert ask(site).kind is MessageKind.REFUSAL
    assert "No space left on device" in caplog.text and "Traceback" not in caplog.text
    monkeypatch.undo()
    assert ask(site).kind is MessageKind.METRICS
    assert json.loads(file_of(tmp_path).read_text()) == {"EVALUATION": 1}


def test_terms_are_counted_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "terms.json"
    first = SeenTerms(path)
    assert first.note(RUN, {"a": 1}, 2) and first.note(RUN, {"a": 1}, 2)
    again = SeenTerms(path)
    assert again.note(b"other run", {"a": 1}, 2)
    assert not SeenTerms(path).note(RUN, {"a": 2}, 2)
    assert SeenTerms(path).note(RUN, {"a": 1}, 2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text('{"terms": ["x"]}')
    with pytest.raises(FedForwardError, match=r"terms\.json is damaged"):
        SeenTerms(path)


def test_a_site_that_is_started_again_has_no_new_terms(tmp_path: Path) -> None:
    enrolled(tmp_path, limits__terms=1)
    site = enrolled(tmp_path, limits__terms=1)
    terms = sites.terms(run_toml(tmp_path, "federation.rounds=1", "run.seed=7"))
    hello = Envelope(MessageKind.HELLO, RUN, encode_json({"terms": terms}))
    answer = Envelope.decode(site.answer(hello.encode()))
    assert Refusal.decode(answer.body) == Refusal(RefusalCode.LIMITS, ("limits.terms",))
    assert site.tuning is not None


KILLED = """
import os, sys
from pathlib import Path
from fedforward.deployment import asked
from fedforward.messages.envelope import MessageKind

counts = asked.Asked(Path(sys.argv[1]))
while True:
    # Told only once it is on disk.
    os.write(1, b"%d\\n" % counts.note(MessageKind.TASK, 10**9))
"""


def test_no_count_that_was_told_is_lost_by_a_kill(tmp_path: Path) -> None:
    path, told = tmp_path / "asked" / "run.json", 0
    for number in range(6):
        command = [sys.executable, "-c", KILLED, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(3 + 7 * number):
                line = process.stdout.readline()
            process.kill()
            rest = process.stdout.read().split()
        last = int(rest[-1] if rest else line)
        # One more may be on disk, and untold.
        assert told < last <= json.loads(path.read_text())["TASK"] <= last + 1
        told = last


def test_releases_are_their_users_alone(tmp_path: Path) -> None:
    from tests.fuzz.worlds import report

    path = tmp_path / "privacy" / "run.json"
    before = os.umask(0)
    try:
        Releases(path).note(Task(0, 0, 0.0, False, ()), b"", report(0))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Releases(path).round == 0
