"""A server that tells one site other things than the rest: who finds it out, and by what."""

from dataclasses import fields, replace
from typing import Any

from fedforward.messages.envelope import Envelope, MessageKind, encode_json
from fedforward.messages.report import DIGEST_BYTES, Report
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task

ASKS = (MessageKind.TASK, MessageKind.EVALUATION, MessageKind.FINALIZE)


def poisoned(body: bytes) -> bytes:
    """A task whose entries have steps ten times as long."""
    task = Task.decode(body)
    entries = tuple(
        replace(
            entry,
            contributions=tuple(
                replace(part, coefficients=part.coefficients * 10) for part in entry.contributions
            ),
        )
        for entry in task.entries
    )
    return replace(task, entries=entries).encode()


def tells_otherwise(found: Any, *, hides: bool) -> None:
    """Whatever comes to site c was changed; its proofs are changed back where that is hidden."""

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if name != "c" or message.kind not in ASKS:
            return bytes(answer())
        changed = replace(message, body=poisoned(message.body)).encode()
        data = Envelope.decode(answer(changed))
        digest = found.inside["a"].tuning.model.digest()
        if hides and data.kind is MessageKind.METRICS:
            data = replace(data, body=encode_json({**data.json(), "digest": digest.hex()}))
        if hides and data.kind is MessageKind.REPORT:
            report = Report.decode(data.body)
            if report.digest:
                report = replace(report, digest=digest[:DIGEST_BYTES])
            data = replace(data, body=report.encode())
        return data.encode()

    found.transport.hook = hook


def test_other_entries_to_one_site_are_found_out_by_its_digest(world: Any) -> None:
    """Somebody on the way, and an honest server."""
    found = world()
    tells_otherwise(found, hides=False)
    found.run()
    assert "its tuned state is not that of the others" in found.of("c")["note"]


def test_a_server_that_hides_it_is_found_out_by_the_sites_own_file(world: Any) -> None:
    """The run ends as if all were well; what site c has kept says that it was told otherwise."""
    found = world()
    tells_otherwise(found, hides=True)
    summary = found.run()
    assert found.of("c")["note"] == ""
    digests = {name: found.kept(name)["digest"] for name in "abc"}
    assert digests["a"] == digests["b"] == summary["state_digest"]
    assert digests["c"] != summary["state_digest"]
    assert {found.kept(name)["rounds"] for name in "abc"} == {5}


def test_a_snapshot_that_no_entry_leads_to_is_found_out_in_the_same_way(world: Any) -> None:
    found = world(federation__rounds=1)

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if name != "c" or message.kind is not MessageKind.FINALIZE:
            return bytes(answer())
        model, task = found.inside["c"].tuning.model, Task.decode(message.body)
        before = model.digest()
        # Weights of the server's choice, with a digest that fits them.
        model.reset()
        other = Snapshot(1, model.digest(), model.export_bytes(), b"")
        assert other.digest != before
        changed = replace(task, entries=(), snapshot=other.encode(), reset=True).encode()
        data = Envelope.decode(answer(replace(message, body=changed).encode()))
        digest = found.inside["a"].tuning.model.digest().hex()
        return replace(data, body=encode_json({**data.json(), "digest": digest})).encode()

    found.transport.hook = hook
    summary = found.run()
    assert found.kept("a")["digest"] == summary["state_digest"] != found.kept("c")["digest"]


def test_a_message_cannot_bring_a_base_or_seeds() -> None:
    """A task has rounds, rates, blocks, entries and a snapshot of what is tuned; nothing else."""
    assert {each.name for each in fields(Task)} == {
        "round",
        "client",
        "learning_rate",
        "digest_wanted",
        "entries",
        "snapshot",
        "reset",
        "blocks",
        "payload",
        "line_search",
    }
