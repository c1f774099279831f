"""What a coordinator writes down, and what it is asked for from outside."""

import json
from typing import Any

import numpy as np
import pytest

from fedforward.config.site import terms
from fedforward.core.errors import MessageError
from fedforward.demo.text import PROMPT
from fedforward.deployment.coordinator import Stopped
from fedforward.deployment.site import Site
from fedforward.messages.envelope import Envelope, MessageKind, encode_json
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.messages.task import Task
from fedforward.training.metrics import DivergenceError
from tests.support.coordinator import ALL, Undisturbed, check, configured, number, wire


def test_a_stop_file_stops_and_the_run_goes_on_later(world: Any, undisturbed: Undisturbed) -> None:
    found = world()

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if message.kind is MessageKind.TASK and number(message) == 2:
            (found.out / "stop").touch()
        return bytes(answer())

    found.transport.hook = hook
    with pytest.raises(Stopped, match="asked to stop"):
        found.run()
    assert not (found.out / "stop").exists()
    assert found.status["state"] == "stopped" and "asked to stop" in found.status["error"]
    assert len(found.ledger) == 3
    found.transport.hook = None
    # One that was left over from before asks for nothing.
    (found.out / "stop").touch()
    check(found, found.run(resume=True), undisturbed)
    assert found.status["state"] == "finished" and found.status["error"] == ""


def test_a_named_site_evaluates_alone_and_may_disappear(
    world: Any, undisturbed: Undisturbed
) -> None:
    found = world(evaluation__site="b")
    found.transport.away = lambda: ["b"] if found.round >= 3 else []
    summary = found.run()
    assert found.clients() == [ALL] * 3 + [[0, 2]] * 2
    assert found.ledger[:3] == undisturbed.ledger[:3]
    assert {who for who, kind, _ in found.transport.sent if kind is MessageKind.EVALUATION} == {"b"}
    losses = {
        n: line["heldout_loss"] for n, line in enumerate(found.lines) if "heldout_loss" in line
    }
    metrics = [
        json.loads(body) for _, kind, body in found.transport.answers if kind is MessageKind.METRICS
    ]
    assert [losses[0], losses[2]] == [figure["heldout_loss"] for figure in metrics[:2]]
    assert losses[0] != undisturbed.lines[0]["heldout_loss"]
    assert set(losses) <= {0, 2, 5} and losses.get(5) is None
    assert summary["rounds"] == 5 and summary["state_digest"] == found.digests()["a"]


def test_metrics_are_weighted_by_what_they_were_measured_on(world: Any) -> None:
    """Losses by answer tokens, other metrics by examples, perplexity from the whole."""
    metrics = ["perplexity", "f1"]
    found = world(
        evaluation__metrics=metrics,
        data__answer_tokens=4,
        federation__rounds=1,
        data__prompt=PROMPT.lstrip("# "),
    )
    found.inside["b"] = found.site("b", data__heldout=6.0)
    found.run()
    answers = [
        json.loads(body) for _, kind, body in found.transport.answers if kind is MessageKind.METRICS
    ][:3]
    assert [answer["examples"] for answer in answers] == [2, 6, 2]
    tokens = [answer["tokens"] for answer in answers]
    loss = np.dot(tokens, [answer["heldout_loss"] for answer in answers]) / sum(tokens)
    f1 = np.dot([2, 6, 2], [answer["metrics"]["f1"] for answer in answers]) / 10
    line = found.lines[0]
    assert line["heldout_loss"] == pytest.approx(loss, rel=1e-12)
    assert line["metrics"]["perplexity"] == pytest.approx(np.exp(loss))
    assert line["metrics"]["f1"] == pytest.approx(f1)


def test_the_status_is_whole_json_at_every_moment(world: Any) -> None:
    found = world(names="abcd", limits={"d": {"rounds": 4}})
    seen: list[dict[str, Any]] = []

    def hook(name: str, message: Envelope, answer: Any) -> bytes | None:
        if (found.out / "status.json").exists():
            seen.append(found.status)
        if message.kind is MessageKind.TASK and name == "c":
            due = found.clock.now + 3
            found.transport.later(name, answer(), lambda: found.clock.now > due)
            return None
        return bytes(answer())

    found.transport.hook = hook
    summary = found.run()
    seen.append(found.status)
    for status in seen:
        assert status["state"] in ("running", "finished") and status["what"]
        assert status["rounds"] == 5 and 0 <= status["round"] <= 5
        assert status["run"] == found.coordinator.state.run.hex() and status["pid"]
        for site in status["sites"]:
            wanted = {"name", "number", "examples", "ready", "present", "pending", "note"}
            assert wanted <= site.keys()
    waiting = [s for status in seen for s in status["sites"] if s["pending"] == "task"]
    assert {s["name"] for s in waiting} == {"c"} and max(s["waiting"] for s in waiting) >= 1.0
    assert [status["round"] for status in seen] == sorted(status["round"] for status in seen)
    end = seen[-1]
    assert (end["state"], end["round"]) == ("finished", 5)
    assert end["heldout_loss"] == summary["heldout_loss"]["end"]
    assert [site["number"] for site in end["sites"]] == [0, 1, 2, None]
    assert [site["rounds"] for site in end["sites"]] == [5, 5, 5, 0]
    assert [site.get("holds") for site in end["sites"]] == [5, 5, 5, None]
    assert "(federation.rounds)" in end["sites"][3]["note"]


def test_a_run_that_diverges_says_so(world: Any) -> None:
    found = world(method__learning_rate=1e3)
    with pytest.raises(DivergenceError, match=r"Lower method\.learning_rate"):
        found.run()
    assert found.status["state"] == "failed"
    assert json.loads((found.out / "summary.json").read_text())["stopped"].startswith("diverged")


def test_a_site_answers_whatever_it_is_sent(world: Any) -> None:
    """A sentence and no exception, for messages that make no sense to it."""
    site: Site = world().inside["a"]
    run = b"whatever"
    assert Envelope.decode(site.answer(b"noise")).kind is MessageKind.REFUSAL
    for kind in MessageKind:
        answer = Envelope.decode(site.answer(Envelope(kind, run, b"{}").encode()))
        expected = {MessageKind.HELLO: MessageKind.REFUSAL, MessageKind.REJECT: MessageKind.METRICS}
        assert answer.kind is expected.get(kind, MessageKind.UNKNOWN_RUN) and answer.run == run
    hello = encode_json({"terms": wire(terms(configured()))})
    enrollment = site.answer(Envelope(MessageKind.HELLO, run, hello).encode())
    assert Envelope.decode(enrollment).kind is MessageKind.ENROLLMENT
    for kind in (
        MessageKind.TASK,
        MessageKind.EVALUATION,
        MessageKind.FINALIZE,
        MessageKind.REPORT,
        MessageKind.METRICS,
    ):
        answer = Envelope.decode(site.answer(Envelope(kind, run, b"nonsense").encode()))
        assert answer.kind is MessageKind.REFUSAL
        assert Refusal.decode(answer.body) == Refusal(RefusalCode.MESSAGE)
    assert site.tuning is not None and site.tuning.replica.rounds == 0
    with pytest.raises(MessageError):
        Task.decode(b"nonsense")
