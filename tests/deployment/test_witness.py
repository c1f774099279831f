"""What a site keeps of the ledger that it was sent: it refuses another, and so does an audit."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedforward.federation.ledger import Ledger
from fedforward.federation.witness import Seen, differences, read_witness
from fedforward.messages.entry import Entry
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.task import Task
from tests.support.command_line import MODEL, command

ASKS = (MessageKind.TASK, MessageKind.EVALUATION, MessageKind.FINALIZE)


def file_of(found: Any, name: str) -> Path:
    (file,) = (found.path / name / "seen").glob("*.json")
    return file


def longer(entry: Entry) -> Entry:
    parts = tuple(replace(part, coefficients=part.coefficients * 2) for part in entry.contributions)
    return replace(entry, contributions=parts)


def lies_to(found: Any, site: str, begin: int = 0) -> None:
    """A site is sent other entries from a round on."""

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if name != site or message.kind not in ASKS:
            return bytes(answer())
        task = Task.decode(message.body)
        entries = tuple(longer(e) if e.round >= begin else e for e in task.entries)
        return bytes(
            answer(replace(message, body=replace(task, entries=entries).encode()).encode())
        )

    found.transport.hook = hook


def test_a_site_keeps_what_it_was_sent(world: Any) -> None:
    found = world()
    found.run()
    with_ledger = Ledger(found.out / "ledger.sqlite")
    for name in "abc":
        witness = read_witness(file_of(found, name))
        assert witness.run == json.loads((found.out / "federation.json").read_text())["run"]
        assert witness.seen == {0: Seen(0, 0).extended(with_ledger.entries())}
        assert differences(with_ledger, witness) == []
    with_ledger.close()


def test_an_audit_finds_the_site_that_was_told_otherwise(world: Any, tmp_path: Path) -> None:
    found = world()
    lies_to(found, "c", begin=2)
    found.run()
    seen = [file_of(found, name) for name in "ac"]
    checked = command("verify", found.out, "--model", MODEL, "--seen", seen[0])
    assert (
        checked.code == 0
        and f"{seen[0].name}: that site was sent this ledger" in checked.out.replace("\n", "")
    )
    told = command("verify", found.out, "--model", MODEL, "--seen", seen[0], "--seen", seen[1])
    told.refused("does not verify", "that the site has seen are others")


def test_a_site_refuses_another_history_after_a_restart(world: Any) -> None:
    found = world(federation__rounds=3)
    found.run()
    site = found.inside["a"]
    tuning, kept = site.tuning, dict(site.tuning.replica.known)
    assert kept[0].rounds == 3
    ledger = Ledger(found.out / "ledger.sqlite")
    entries = tuple(ledger.entries())
    ledger.close()

    def asked(sent: tuple[Entry, ...]) -> Envelope:
        task = Task(3, tuning.clients and next(iter(tuning.clients)), 0.0, True, sent, reset=True)
        return Envelope.decode(
            site.answer(Envelope(MessageKind.EVALUATION, tuning.run, task.encode()).encode())
        )

    assert asked(entries).kind is MessageKind.METRICS
    others = (*entries[:2], longer(entries[2]))
    assert asked(others).kind is MessageKind.REFUSAL
    # Nothing of it is in what the site keeps, and the right history goes on.
    assert read_witness(file_of(found, "a")).seen == kept
    assert asked(entries).kind is MessageKind.METRICS


def test_a_file_that_is_damaged_is_a_sentence(world: Any, tmp_path: Path) -> None:
    found = world(federation__rounds=2)
    found.run()
    file = tmp_path / "seen.json"
    shutil.copy(file_of(found, "a"), file)
    whole = json.loads(file.read_text())
    wrong = [
        {**whole, "run": "no"},
        {**whole, "seen": 3},
        {**whole, "seen": [{"begin": 3, "rounds": 1, "entries": "00" * 32}]},
        {**whole, "seen": [{"begin": 0, "rounds": 1, "entries": "zz" * 32}]},
        {**whole, "seen": ["x"]},
    ]
    for content in wrong:
        file.write_text(json.dumps(content))
        command("verify", found.out, "--seen", file).refused(str(file.name), "damaged")
    file.write_text(json.dumps({**whole, "run": "00" * 8}))
    command("verify", found.out, "--seen", file).refused("is of run 0000000000000000")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen")
def test_the_file_can_be_signed_with_the_sites_key(tmp_path: Path) -> None:
    """As docs/concepts/ledger.md has it."""
    assert command("certs", tmp_path / "certs", "--host", "localhost", "--site", "north").code == 0
    file = tmp_path / "seen.json"
    file.write_text("{}")
    key, public = (tmp_path / "certs/sites" / f"north.{kind}" for kind in ("key", "pub"))
    sign = ["ssh-keygen", "-Y", "sign", "-f", str(key), "-n", "fedforward", str(file)]
    subprocess.run(sign, check=True, capture_output=True)
    signers = tmp_path / "signers"
    signers.write_text(f"north {public.read_text()}")
    check = ["ssh-keygen", "-Y", "verify", "-f", str(signers), "-I", "north", "-n", "fedforward"]
    check += ["-s", f"{file}.sig"]
    assert subprocess.run(check, input=b"{}", capture_output=True, check=False).returncode == 0
    assert subprocess.run(check, input=b"{ }", capture_output=True, check=False).returncode
