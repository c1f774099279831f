"""As many sites say one thing as another: nobody is believed by chance, nothing waits for ever."""

from dataclasses import replace
from typing import Any

import pytest

from fedforward.core.errors import FedForwardError
from fedforward.federation.agreement import QuorumError, TieError, majority
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.report import Report
from tests.support.coordinator import another_model, number


def liar(rounds: Any, name: str = "b") -> Any:
    """A hook with which a site claims another state each time that it is to prove one."""

    def hook(who: str, message: Envelope, answer: Any) -> bytes:
        data: bytes = answer()
        if who != name or message.kind is not MessageKind.TASK or number(message) not in rounds:
            return data
        report = Report.decode(Envelope.decode(data).body)
        if report.digest:
            report = replace(report, digest=bytes(b ^ 0xFF for b in report.digest))
        return Envelope(MessageKind.REPORT, message.run, report.encode()).encode()

    return hook


def test_two_sites_that_differ_start_again_once_and_are_then_named(world: Any) -> None:
    found = world(names="ab", federation__clients=2)
    found.transport.hook = liar(range(9))
    with pytest.raises(QuorumError, match=r"sites hold different .* round 0.*: a \(") as caught:
        found.run()
    sentence = str(caught.value)
    assert "b (" in sentence and "--without" in sentence and "verify" in sentence
    # Not more than one attempt beside the first.
    assert [len(found.transport.tasks(name)) for name in "ab"] == [2, 2]
    assert all(found.transport.tasks(name)[1].reset for name in "ab")
    assert found.status["state"] == "failed" and found.status["error"] == sentence
    assert found.ledger == []
    # Without it, or once it is honest, the run goes on in the same folder.
    found.transport.hook = None
    assert found.run(resume=True)["rounds"] == 5
    assert len(set(found.digests().values())) == 1


def test_two_sites_that_differ_once_go_on(world: Any) -> None:
    found, done = world(names="ab", federation__clients=2), []
    lie = liar([0])

    def hook(who: str, message: Envelope, answer: Any) -> bytes:
        if message.kind is MessageKind.TASK and who == "b" and not done:
            done.append(who)
            return bytes(lie(who, message, answer))
        return bytes(answer())

    found.transport.hook = hook
    summary = found.run()
    assert summary["rounds"] == 5 and found.clients() == [[0, 1]] * 5
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_two_sites_that_differ_when_they_evaluate_end_the_run(world: Any) -> None:
    found = world(names="ab", federation__clients=2)

    def hook(who: str, message: Envelope, answer: Any) -> bytes:
        data: bytes = answer()
        if who != "b" or message.kind is not MessageKind.EVALUATION:
            return data
        content = Envelope.decode(data).body.replace(b'"digest":"', b'"digest":"00')
        return Envelope(MessageKind.METRICS, message.run, content).encode()

    found.transport.hook = hook
    with pytest.raises(QuorumError, match=r"sites hold different .*: a \(.* and b \("):
        found.run()
    assert len(found.transport.bodies("a", MessageKind.EVALUATION)) == 2


def test_a_tie_has_all_sides() -> None:
    one, two, three = (bytes([n]) * 16 for n in range(3))
    with pytest.raises(TieError) as caught:
        majority({4: two, 1: one, 2: one, 3: two, 7: three}, (), 5)
    assert caught.value.sides == {one: (1, 2), two: (3, 4), three: (7,)}
    assert not caught.value.final and "start again" in str(caught.value)
    assert majority({1: one, 2: one, 3: two}, (), 5) == {3}


# Models at the start.


@pytest.fixture
def two_models(world: Any) -> Any:
    found = world(names="ad", federation__clients=2, federation__start_deadline=30.0)
    found.inside["d"] = found.site("d", model__path=another_model(found, "base"))
    return found


def test_a_tie_of_models_waits_for_the_deadline_and_names_both_sides(two_models: Any) -> None:
    found, began, seen = two_models, two_models.clock.now, set()
    found.clock.look = lambda: seen.add(getattr(found.coordinator, "what", ""))
    with pytest.raises(FedForwardError, match=r"do not have the same model, .*: a; d\."):
        found.run()
    assert 30.0 <= found.clock.now - began < 32.0
    assert "waiting for another site: as many have one model as another" in seen
    assert found.status["state"] == "failed" and "a; d" in found.status["error"]
    assert not (found.out / "ledger.sqlite").exists()
    # With the right model it goes on in the same folder.
    found.restart("d")
    assert found.run(resume=True)["rounds"] == 5


@pytest.mark.parametrize("right", ["a", "d"])
def test_a_third_site_tells_which_model_is_the_runs(two_models: Any, right: str) -> None:
    """Whichever it has: the first two are in no order."""
    found, began = two_models, two_models.clock.now
    path = found.inside["d"].settings.model.path
    changes = {} if right == "a" else {"model__path": path}
    found.inside["c"] = found.site("c", **changes)
    found.transport.away = lambda: ["c"] if found.clock.now < began + 10 else []
    summary = found.run()
    wrong = "d" if right == "a" else "a"
    assert summary["rounds"] == 5 and "other weights" in found.of(wrong)["note"]
    assert found.of(wrong)["number"] is None and found.of("c")["rounds"] == 5
    assert 10.0 <= found.clock.now - began < 30.0
