"""A coordinator, or a site, that was killed goes on without losing anything."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.core.errors import FedForwardError
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import Server
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.report import Report
from fedforward.models.quadratic import Quadratic
from fedforward.training import assembly
from fedforward.training.assembly import build_method
from tests.support.coordinator import (
    MOMENTS,
    KilledError,
    Undisturbed,
    check,
    configured,
    kill_at,
    number,
)


@pytest.mark.parametrize("fresh", [False, True], ids=["same sites", "fresh sites"])
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_killed_coordinator_goes_on(
    world: Any, undisturbed: Undisturbed, moment: str, fresh: bool
) -> None:
    found = world()
    MOMENTS[moment](found)
    found.killed()
    with pytest.raises(FedForwardError, match="holds a run already"):
        found.run()
    if fresh:
        found.restart("a", "b", "c")
    check(found, found.run(resume=True), undisturbed, proofs=not fresh)
    assert [line["round"] for line in found.lines] == list(range(6))
    assert [site.loads for site in found.inside.values()] == [1, 1, 1]


def test_a_coordinator_killed_in_every_round(world: Any, undisturbed: Undisturbed) -> None:
    found = world()
    for last in range(5):
        kill_at(found, MessageKind.TASK, last, "abcab"[last])
        with pytest.raises(KilledError):
            found.run(resume=last > 0)
        found.restart("cabbc"[last])
    found.transport.hook = None
    check(found, found.run(resume=True), undisturbed, proofs=False)


def test_a_finished_run_is_finished_again(world: Any, undisturbed: Undisturbed) -> None:
    found = world()
    first = found.run()
    found.restart("a", "b", "c")
    second = found.run(resume=True)
    check(found, second, undisturbed)
    assert second == first
    assert found.untimed == undisturbed.lines


@pytest.mark.parametrize(
    "moment",
    [
        "in a round",
        "evaluating",
    ],
)
def test_the_lines_are_those_of_an_undisturbed_run(
    world: Any, undisturbed: Undisturbed, moment: str
) -> None:
    """They decide when a run stops for want of patience, and so the ledger."""
    found = world()
    MOMENTS[moment](found)
    found.killed()
    found.run(resume=True)
    assert found.untimed == undisturbed.lines


def test_another_configuration_is_not_resumed(world: Any) -> None:
    found = world()
    MOMENTS["in a round"](found)
    found.killed()
    with pytest.raises(FedForwardError, match=r"method\.mu is 0\.01 there and 0\.02 here"):
        found.run(resume=True, config=configured(method__mu=2e-2))
    (found.out / "federation.json").write_text("{", encoding="utf-8")
    with pytest.raises(FedForwardError, match=r"federation\.json cannot be read"):
        found.run(resume=True)


@pytest.mark.parametrize("how", ["unknown_run", "out_of_sync"])
def test_a_site_that_lost_its_state_in_a_round_is_sent_it_again(
    world: Any, undisturbed: Undisturbed, how: str
) -> None:
    found = world()
    done: list[str] = []

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if message.kind is MessageKind.TASK and number(message) == 3 and name == "b" and not done:
            done.append(name)
            if how == "unknown_run":
                found.restart("b")
            else:
                found.inside["b"].tuning.replica.reset()
        return bytes(answer())

    found.transport.hook = hook
    # In the round after, all prove that they are where the others are.
    check(found, found.run(), undisturbed, proofs=False)
    assert found.transport.kinds("b").count(MessageKind[how.upper()]) == 1
    assert len(found.transport.bodies("b", MessageKind.HELLO)) == 1 + (how == "unknown_run")
    again = [len(task.entries) for task in found.transport.tasks("b") if task.round == 3]
    # The evaluation before the round had brought it there.
    assert again == [1, 3]


def test_sites_that_are_ahead_of_the_ledger_start_again(
    world: Any, undisturbed: Undisturbed
) -> None:
    """The folder was restored from an older copy."""
    found = world()
    copy = found.path / "copy"

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if message.kind is MessageKind.TASK and number(message) == 2 and name == "a":
            shutil.copytree(found.out, copy)
        return bytes(answer())

    found.transport.hook = hook
    check(found, found.run(), undisturbed)
    shutil.rmtree(found.out)
    copy.rename(found.out)
    found.transport.hook = None
    assert {site.tuning.replica.rounds for site in found.inside.values()} == {5}
    check(found, found.run(resume=True), undisturbed, proofs=False)


def test_no_snapshot_is_asked_for_where_all_start_again(tmp_path: Path) -> None:
    config = configured(federation__clients=2)
    layout = Quadratic([1.0], 120, blocks=4).layout
    model = assembly.ModelIdentity(layout, "", (), state_bytes=1)
    settings = assembly.server_settings(config, model, [1, 1])
    server = Server(settings, build_method(config), Ledger.create(tmp_path / "ledger", {}))
    for round_ in range(3):
        server.open_round()
        for client in (0, 1):
            digest = b"" if round_ else bytes(16)
            gradients = np.ones(1, np.float32)
            server.receive(Report(round_, client, 1, 1.0, 0, gradients, digest).encode())
        server.close_round()
    for client in (0, 1):
        server.enrol(client, 1, rounds=9)
    assert server.reset == {0, 1}
    assert server.snapshot_wanted() is None
