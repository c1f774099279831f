"""Sites that disagree about the state; blocks and snapshots for whoever is there."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedforward.core.steps import Steps, Update
from fedforward.federation.ledger import Ledger
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.report import ClientResult
from fedforward.messages.snapshot import Snapshot
from fedforward.training import replay as artefacts
from tests.conftest import DEMO_MODEL
from tests.support.coordinator import ALL, SNAPSHOTS_PAY, KilledError, Undisturbed, number


def active_of(result: ClientResult) -> list[bool]:
    """Which of three blocks a client was given."""
    return [True] * 3 if result.blocks is None else result.blocks.tolist()


def test_two_that_disagree_start_again(world: Any, undisturbed: Undisturbed) -> None:
    """Of two, none is right by majority; from the base both come to the same."""
    found = world(names="ab", federation__clients=2)
    done: list[str] = []

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if (
            (message.kind, number(message)) == (MessageKind.EVALUATION, 2)
            and name == "b"
            and not done
        ):
            done.append(name)
            found.inside["b"].tuning.model.commit([Update(Steps.of([1], [0.1]), 0)])
        return bytes(answer())

    found.transport.hook = hook
    summary = found.run()
    assert found.clients() == [[0, 1]] * 5
    assert [task.round for task in found.transport.tasks("a") if task.reset] == [2]
    assert set(found.digests().values()) == {summary["state_digest"]}
    assert "heldout_loss" not in found.lines[2]


def test_who_must_start_again_is_remembered_over_a_kill(world: Any) -> None:
    found = world(federation__rounds=5)
    done: list[str] = []

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if (
            (message.kind, number(message)) == (MessageKind.EVALUATION, 2)
            and name == "b"
            and not done
        ):
            done.append(name)
            found.inside["b"].tuning.model.commit([Update(Steps.of([1], [0.1]), 0)])
        if (message.kind, number(message)) == (MessageKind.TASK, 2):
            raise KilledError
        return bytes(answer())

    found.transport.hook = hook
    found.killed()
    summary = found.run(resume=True)
    assert [task.round for task in found.transport.tasks("b") if task.reset] == [2]
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_a_snapshot_does_not_vote(world: Any) -> None:
    """Its maker and two that began with it are not a majority over the one that did not."""
    found = world(
        names="abcd",
        **SNAPSHOTS_PAY,
        federation__clients=2,
        federation__rounds=9,
        run__evaluate_every=9,
    )
    found.transport.away = lambda: ["c", "d"] if found.round < 5 else []

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if message.kind is MessageKind.SNAPSHOT_REQUEST and name == "a":
            # A lie that fits itself: the tuned state is really changed.
            found.inside["a"].tuning.model.commit([Update(Steps.of([1], [0.1]), 0)])
        return bytes(answer())

    found.transport.hook = hook
    summary = found.run()
    first = {name: found.transport.tasks(name)[0] for name in "cd"}
    assert all(task.snapshot for task in first.values()), "both began with the changed state"
    result = artefacts.verify(found.out, str(DEMO_MODEL))
    assert result.state_digest == summary["state_digest"]
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_blocks_in_turn_where_not_all_can_be_perturbed(world: Any) -> None:
    limits = {"a": {"active_blocks": 2}, "b": {"active_blocks": 1}}
    found = world(
        names="ab", method__name="zorba", limits=limits, federation__clients=2, federation__rounds=6
    )
    done: list[str] = []

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if message.kind is MessageKind.TASK and number(message) == 2 and name == "a" and not done:
            done.append(name)
            found.limits["a"] = {"active_blocks": 1}
            found.restart("a")
        return bytes(answer())

    found.transport.hook = hook
    assert found.run()["rounds"] == 6
    ledger = Ledger(found.out / "ledger.sqlite")
    last = [[active_of(r) for r in record.results] for record in ledger.rounds()][3:]
    ledger.close()
    assert all(sum(row) == 1 for rows in last for row in rows)
    assert np.any([row for rows in last for row in rows], axis=0).all()


def test_blocks_are_planned_again_for_whoever_is_there(world: Any) -> None:
    """While a site with few blocks is away, the others have all between them."""
    limits = {"a": {"active_blocks": 1}, "b": {"active_blocks": 2}}
    found = world(method__name="zorba", limits=limits, federation__rounds=6)
    found.transport.away = lambda: ["a"] if 1 <= found.round < 4 else []
    summary = found.run()
    ledger = Ledger(found.out / "ledger.sqlite")
    active = [
        {r.report.client: np.array(active_of(r)) for r in record.results}
        for record in ledger.rounds()
    ]
    ledger.close()
    assert [sorted(part) for part in active] == [ALL] + [[1, 2]] * 3 + [ALL] * 2
    for part in active:
        assert part[1].sum() <= 2 and (0 not in part or part[0].sum() == 1)
        assert np.any(list(part.values()), axis=0).all()
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_blocks_that_nobody_is_there_for_rest(world: Any) -> None:
    limits = {name: {"active_blocks": 1} for name in "abc"}
    found = world(method__name="zorba", limits=limits, federation__rounds=6)
    found.transport.away = lambda: ["a"] if 1 <= found.round < 4 else []
    assert found.run()["rounds"] == 6
    assert found.clients() == [ALL] + [[1, 2]] * 3 + [ALL] * 2


@pytest.mark.parametrize(
    "hangs",
    [
        False,
        True,
    ],
    ids=["comes", "hangs"],
)
def test_a_late_site_is_sent_a_snapshot_where_that_is_less(world: Any, hangs: bool) -> None:
    found = world(
        names="abcd",
        **SNAPSHOTS_PAY,
        federation__deadline=20.0,
        federation__rounds=8,
        run__evaluate_every=8,
    )
    found.transport.away = lambda: ["d"] if found.round < 5 else []

    def hook(name: str, message: Envelope, answer: Any) -> bytes | None:
        return None if hangs and message.kind is MessageKind.SNAPSHOT_REQUEST else bytes(answer())

    found.transport.hook = hook
    summary = found.run()
    assert sum(kind is MessageKind.SNAPSHOT_REQUEST for _, kind, _ in found.transport.sent) >= 1
    task = found.transport.tasks("d")[0]
    assert bool(task.snapshot) is not hangs
    assert found.digests()["d"] == summary["state_digest"]


def test_a_wrong_snapshot_is_not_sent_again(world: Any) -> None:
    found = world(
        names="abcd",
        **SNAPSHOTS_PAY,
        federation__rounds=9,
        run__evaluate_every=9,
    )
    found.transport.away = lambda: ["d"] if found.round < 5 else []

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        data: bytes = answer()
        if message.kind is not MessageKind.SNAPSHOT_REQUEST or name != "a":
            return data
        snapshot = Snapshot.decode(Envelope.decode(data).body)
        wrong = replace(snapshot, data=bytes(len(snapshot.data)))
        return Envelope(MessageKind.SNAPSHOT, message.run, wrong.encode()).encode()

    found.transport.hook = hook
    summary = found.run()
    sources = [who for who, kind, _ in found.transport.sent if kind is MessageKind.SNAPSHOT_REQUEST]
    # It says that it is another's than its bytes are, so whoever is sent it refuses it.
    assert sources[0] == "a" and sources.count("a") == 1
    assert MessageKind.REFUSAL in found.transport.kinds("d")
    assert len([task for task in found.transport.tasks("d") if task.snapshot]) <= 2
    assert found.digests()["d"] == summary["state_digest"]
    assert found.clients()[-1] == [0, 1, 2, 3]
