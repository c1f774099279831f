"""Sites that come late, go, are slow, or fail."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from fedforward.deployment.participants import MAX_RETRIES
from fedforward.deployment.transport import Reply
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import QuorumError
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.refusal import Refusal, RefusalCode
from tests.support.coordinator import ALL, Undisturbed, check, make_late, number


def test_a_site_joins_after_ten_rounds_and_another_leaves(world: Any) -> None:
    found = world(names="abcd", federation__rounds=14, run__evaluate_every=14)

    def away() -> list[str]:
        return ["d"] * (found.round < 10) + ["b"] * (found.round >= 6)

    found.transport.away = away
    summary = found.run()
    # It is seen in the eleventh round, enrolled in the twelfth, and has a task after that.
    assert found.clients() == [ALL] * 6 + [[0, 2]] * 6 + [[0, 2, 3]] * 2
    assert found.kept("d")["digest"] == found.kept("a")["digest"] == summary["state_digest"]
    assert found.kept("d")["rounds"] == 14
    assert not (found.path / "b" / "state.json").exists()
    assert found.digests()["b"] != summary["state_digest"]
    # What it missed is in the ledger, and leads to the same state.
    tuning = found.inside["b"].tuning
    ledger = Ledger(found.out / "ledger.sqlite")
    tuning.replica.catch_up(list(ledger.entries()))
    ledger.close()
    assert tuning.model.digest().hex() == summary["state_digest"]
    assert [site["present"] for site in found.status["sites"]] == [True, False, True, True]


def test_a_site_that_comes_back_keeps_its_number(world: Any) -> None:
    found = world(federation__rounds=6)
    found.transport.away = lambda: ["b"] if 1 <= found.round < 4 else []
    summary = found.run()
    assert found.clients() == [ALL] + [[0, 2]] * 3 + [ALL] * 2
    assert set(found.digests().values()) == {summary["state_digest"]}
    assert found.inside["b"].loads == 1


def test_a_site_that_is_away_when_the_others_agree_is_asked_later(world: Any) -> None:
    found = world(names="abcd", federation__rounds=4)

    def hook(name: str, message: Envelope, answer: Any) -> bytes | None:
        if message.kind is MessageKind.HELLO and name in "bd":
            found.transport.later(name, answer(), lambda: found.clock.now > 1001)
            return None
        return bytes(answer())

    found.transport.hook = hook
    # It has enrolled when it goes, and three others are there while it is away.
    found.transport.away = lambda: ["a"] if found.clock.now > 1000.3 and found.round < 2 else []
    found.run()
    assert found.of("a")["present"] and found.of("a")["number"] is not None
    assert found.digests()["a"] == found.digests()["b"]


def test_a_quorum_is_waited_for_beyond_the_deadline(world: Any) -> None:
    found = world(federation__quorum=2, federation__deadline=1.0, federation__rounds=2)

    def hook(name: str, message: Envelope, answer: Any) -> bytes | None:
        if message.kind is MessageKind.TASK and number(message) == 1 and name != "a":
            due = found.clock.now + 20
            found.transport.later(name, answer(), lambda: found.clock.now >= due)
            return None
        return bytes(answer())

    found.transport.hook = hook
    found.run()
    assert found.clients() == [ALL] * 2
    assert found.lines[-1]["seconds"] - found.lines[1]["seconds"] >= 19.9


def test_a_late_report_is_counted_and_dropped(world: Any) -> None:
    found = world(federation__deadline=5.0, federation__rounds=7)
    make_late(found, MessageKind.TASK)
    summary = found.run()
    # While it owes an answer it is not asked; only its own round waits for it.
    assert found.clients() == [ALL] * 2 + [[0, 1]] * 2 + [ALL] * 3
    seconds = [line["seconds"] for line in found.lines]
    assert 5.0 <= seconds[3] - seconds[2] < 6.0 and seconds[4] - seconds[3] < 1.0
    assert sum(line.get("clients", {}).get("late", 0) for line in found.lines) == 1
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_a_line_says_how_many_were_asked(world: Any) -> None:
    found = world(federation__deadline=5.0, federation__rounds=4)
    make_late(found, MessageKind.TASK)
    found.run()
    assert found.lines[3]["clients"] == {"asked": 3, "reported": 2, "late": 0}


def test_a_deadline_ends_an_evaluation(world: Any) -> None:
    found = world(federation__deadline=5.0)
    make_late(found, MessageKind.EVALUATION)
    summary = found.run()
    assert found.clients() == [ALL] * 2 + [[0, 1]] * 2 + [ALL]
    assert 5.0 <= found.lines[2]["seconds"] - found.lines[1]["seconds"] < 6.5
    assert math.isfinite(found.lines[2]["heldout_loss"])
    assert set(found.digests().values()) == {summary["state_digest"]}


FAILURES: dict[str, tuple[Callable[[Envelope], Reply | bytes], str]] = {
    "lost": (lambda message: Reply("b", error="the connection was lost"), "connection was lost"),
    "refused": (
        lambda message: Envelope(
            MessageKind.REFUSAL, message.run, Refusal(RefusalCode.MEMORY).encode()
        ).encode(),
        "not enough memory",
    ),
    "refused in words": (
        lambda message: Envelope(MessageKind.REFUSAL, message.run, b"no room").encode(),
        "no code with keys",
    ),
    "wrong kind": (
        lambda message: Envelope(MessageKind.METRICS, message.run, b"{}").encode(),
        "with METRICS",
    ),
    "garbage": (lambda message: b"garbage of some length", "not fedforward's"),
    "wrong run": (lambda message: Envelope(MessageKind.REPORT, bytes(8)).encode(), "another run"),
    "nothing": (
        lambda message: Envelope(MessageKind.REPORT, message.run).encode(),
        "ends where byte",
    ),
}


@pytest.mark.parametrize("how", list(FAILURES))
def test_a_site_that_fails_again_and_again_stops_nobody(world: Any, how: str) -> None:
    found = world(federation__rounds=3, run__evaluate_every=3)
    failure, words = FAILURES[how]
    notes = []

    def hook(name: str, message: Envelope, answer: Any) -> bytes | Reply:
        if message.kind is MessageKind.EVALUATION and number(message):
            notes.append(found.coordinator.participants["b"].note)
        return failure(message) if message.kind is MessageKind.TASK and name == "b" else answer()

    found.transport.hook = hook
    summary = found.run()
    assert found.clients() == [[0, 2]] * 3
    # Then it is left alone for a while.
    assert len(found.transport.tasks("b")) == MAX_RETRIES
    assert words in notes[0]
    # It could still evaluate, for which it was sent what the others have.
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_a_site_that_fails_a_few_times_is_asked_again(world: Any, undisturbed: Undisturbed) -> None:
    found = world()
    asked: list[tuple[Any, ...]] = []

    def hook(name: str, message: Envelope, answer: Any) -> bytes | Reply:
        key = (name, message.kind, number(message))
        asked.append(key)
        if (
            message.kind in (MessageKind.TASK, MessageKind.EVALUATION)
            and asked.count(key) < MAX_RETRIES
        ):
            return Reply(name, error="the connection was lost")
        return bytes(answer())

    found.transport.hook = hook
    check(found, found.run(), undisturbed)


def test_all_failing_is_a_sentence(world: Any) -> None:
    found = world()

    def hook(name: str, message: Envelope, answer: Any) -> bytes | Reply:
        if message.kind is MessageKind.TASK and number(message) == 1:
            return Reply(name, error="the connection was lost")
        return bytes(answer())

    found.transport.hook = hook
    with pytest.raises(QuorumError, match=r"0 of 3 clients have reported"):
        found.run()
    assert found.status["state"] == "failed" and "0 of 3" in found.status["error"]
    found.transport.hook = None
    assert found.run(resume=True)["rounds"] == 5
