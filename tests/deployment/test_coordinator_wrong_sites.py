"""Sites with another state, another model or other limits than the rest."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedforward.core.steps import Steps, Update
from fedforward.deployment.participants import MAX_RETRIES, RETRY_REFUSED_S
from fedforward.deployment.site import Site
from fedforward.directions import Layout
from fedforward.federation.ledger import Ledger
from fedforward.messages.envelope import Enrollment, Envelope, MessageKind, encode_json
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.messages.report import Report
from tests.support.coordinator import ALL, MOMENTS, Undisturbed, another_model, check, number


@pytest.mark.parametrize(
    "when", [(MessageKind.TASK, 0), (MessageKind.EVALUATION, 2)], ids=["task", "evaluation"]
)
def test_a_site_with_another_state_starts_again(world: Any, when: Any) -> None:
    found = world()
    done: list[str] = []

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if (message.kind, number(message)) == when and name == "b" and not done:
            done.append(name)
            found.inside["b"].tuning.model.commit([Update(Steps.of([1], [0.1]), 0)])
        return bytes(answer())

    found.transport.hook = hook
    summary = found.run()
    first = when[0] is MessageKind.TASK
    assert found.clients() == [[0, 2] if first else ALL] + [ALL] * 4
    assert [task.round for task in found.transport.tasks("b") if task.reset] == [1 if first else 2]
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_a_site_that_lies_about_its_digest_comes_back(world: Any) -> None:
    found = world()

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        data: bytes = answer()
        if message.kind is MessageKind.TASK and number(message) == 0 and name == "b":
            report = replace(Report.decode(Envelope.decode(data).body), digest=bytes(16))
            return Envelope(MessageKind.REPORT, message.run, report.encode()).encode()
        return data

    found.transport.hook = hook
    summary = found.run()
    assert found.clients() == [[0, 2]] + [ALL] * 4
    assert set(found.digests().values()) == {summary["state_digest"]}


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place % len(data)] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.parametrize("way", ["up", "down"])
def test_messages_altered_on_their_way_change_nothing(
    world: Any, undisturbed: Undisturbed, way: str
) -> None:
    """The first message of every kind in every round arrives with a wrong bit."""
    found = world()
    seen: set[tuple[Any, ...]] = set()

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        key = (name, message.kind, number(message))
        if key in seen:
            return bytes(answer())
        seen.add(key)
        place = 37 * len(seen) + 11
        if way == "up":
            return flipped(answer(), place)
        return bytes(answer(flipped(message.encode(), place)))

    found.transport.hook = hook
    check(found, found.run(), undisturbed)
    # A site whose enrollment was altered is asked again after a while.
    assert found.clock.now - 1000 > RETRY_REFUSED_S
    assert len(seen) == 3 * (1 + 5 + 4 + 1)
    assert [site.loads for site in found.inside.values()] == [1, 1, 1]


def other_layout(name: str, message: Envelope, answer: Any) -> bytes:
    """Site d enrols with one tensor more than the others."""
    data: bytes = answer()
    if name != "d" or message.kind is not MessageKind.HELLO:
        return data
    mine = Enrollment.decode(Envelope.decode(data).json())
    old = mine.model.layout
    layout = Layout((*old.names, "~"), (*old.shapes, (2, 2)), old.blocks, (*old.owners, 0))
    other = replace(mine, model=replace(mine.model, layout=layout))
    return Envelope(MessageKind.ENROLLMENT, message.run, other.encode()).encode()


@pytest.mark.parametrize(
    ("what", "early"),
    [("base", True), ("base", False), ("tokenizer", True), ("layout", True), ("layout", False)],
)
def test_a_site_with_another_model_is_dismissed(
    world: Any, undisturbed: Undisturbed, caplog: Any, what: str, early: bool
) -> None:
    found = world(names="abcd")
    caplog.set_level("INFO", "fedforward")
    changes = {} if what == "layout" else {"model__path": another_model(found, what)}
    found.inside["d"] = Site(found.settings("d", **changes))
    if what == "layout":
        found.transport.hook = other_layout
    if not early:
        found.transport.away = lambda: ["d"] if found.round < 2 else []
    summary = found.run()
    assert found.ledger == undisturbed.ledger and summary["state_digest"] == undisturbed.digest
    words = {"base": "other weights", "tokenizer": "tokenizer splits", "layout": "other names"}
    (told,) = [text for text in caplog.messages if "will not have this site" in text]
    assert words[what] in told and words[what] in found.of("d")["note"]
    # It is not asked again at once.
    assert len(found.transport.bodies("d", MessageKind.HELLO)) == 1 and not found.of("d")["ready"]


def test_a_site_of_another_release_is_told(
    world: Any, undisturbed: Undisturbed, caplog: Any
) -> None:
    found = world(names="abcd")
    caplog.set_level("INFO", "fedforward")
    found.inside["d"] = Site(found.settings("d"))

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        data: bytes = answer()
        if name != "d" or message.kind is not MessageKind.HELLO:
            return data
        content = Envelope.decode(data).json() | {"direction_version": "0"}
        return Envelope(MessageKind.ENROLLMENT, message.run, encode_json(content)).encode()

    found.transport.hook = hook
    summary = found.run()
    assert found.ledger == undisturbed.ledger and summary["state_digest"] == undisturbed.digest
    (told,) = [text for text in caplog.messages if "will not have this site" in text]
    assert "direction version '0'" in told and "same release" in found.of("d")["note"]


def test_a_wrong_site_that_is_first_does_not_end_a_run_that_goes_on(world: Any) -> None:
    found = world(names="abcd")
    found.transport.away = lambda: ["d"]
    MOMENTS["in a round"](found)
    found.killed()
    found.inside["d"] = found.site("d", model__path=another_model(found, "base"))
    began = found.clock.now
    found.transport.away = lambda: ["a", "b", "c"] if found.clock.now < began + 3 else []
    assert found.run(resume=True)["rounds"] == 5
    assert "other weights" in found.of("d")["note"]


def test_a_site_that_refuses_the_terms_is_left_alone(world: Any, undisturbed: Undisturbed) -> None:
    found = world(names="abcd", limits={"d": {"rounds": 4}})
    summary = found.run()
    assert found.ledger == undisturbed.ledger and summary["state_digest"] == undisturbed.digest
    assert found.of("d")["note"] == Refusal(RefusalCode.LIMITS, ("federation.rounds",)).sentence
    assert found.inside["d"].loads == 0
    assert len(found.transport.bodies("d", MessageKind.HELLO)) == 1


def test_a_site_that_refuses_is_asked_again_after_a_while(world: Any) -> None:
    found = world(limits={"c": {"rounds": 4}})

    def mended() -> None:
        if found.clock.now > 1000 + 2.5 * RETRY_REFUSED_S and found.limits:
            found.limits = {}
            found.restart("c")

    found.clock.look = mended
    assert found.run()["rounds"] == 5
    assert len(found.transport.bodies("c", MessageKind.HELLO)) == 4
    assert found.clock.now - 1000 == pytest.approx(3 * RETRY_REFUSED_S, abs=6)


@pytest.mark.parametrize(
    "victim",
    [
        "a",
        "c",
    ],
)
def test_a_report_under_another_sites_number_is_not_used(world: Any, victim: str) -> None:
    """Before the other has reported, or after."""
    found = world(federation__rounds=3)
    forged = np.array([7.0], np.float32)

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        data: bytes = answer()
        if message.kind is MessageKind.TASK and number(message) == 1 and name == "b":
            report = Report.decode(Envelope.decode(data).body)
            report = replace(report, client="abc".index(victim), gradients=forged)
            return Envelope(MessageKind.REPORT, message.run, report.encode()).encode()
        return data

    found.transport.hook = hook
    found.run()
    assert found.clients() == [ALL, [0, 2], ALL]
    ledger = Ledger(found.out / "ledger.sqlite")
    used = [origin.report for origin in list(ledger.rounds())[1].results]
    ledger.close()
    assert not any((report.gradients == forged).all() for report in used)
    assert len(found.transport.tasks("b")) == 2 + MAX_RETRIES
