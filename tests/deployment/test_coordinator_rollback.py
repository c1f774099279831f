"""Sites follow a run that goes back, those that were away among them."""

from collections.abc import Sequence
from typing import Any

import pytest

from fedforward.config.schema import Config
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.training import metrics
from tests.support.coordinator import KilledError, number

#: After so many rounds a run has diverged.
DIVERGED = 4
SETTINGS = {"federation__rounds": 8, "run__on_divergence": "rollback", "run__evaluate_every": 1}


@pytest.fixture(autouse=True)
def diverging(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(config: Config, lines: Sequence[dict[str, Any]]) -> str:
        return "diverged: it is a test" if lines[-1]["round"] == DIVERGED else ""

    monkeypatch.setattr(metrics, "_heldout_diverged", found)
    monkeypatch.setattr(metrics, "_training_diverged", lambda config, lines: "")
    # With "auto" a run has to diverge for some rounds.
    monkeypatch.setattr(
        metrics, "_persists", lambda diverged, config, lines: diverged(config, lines)
    )


def check(found: Any, summary: dict[str, Any]) -> None:
    returned = found.lines[DIVERGED + 1]
    good = DIVERGED - returned["taken_back"]
    assert returned["state_digest"] == found.lines[good]["state_digest"]
    assert set(found.digests().values()) == {summary["state_digest"]}
    assert {found.kept(name)["rounds"] for name in found.inside} == {8}


@pytest.mark.parametrize(
    "changes",
    [
        {"method__learning_rate": 3e-3},
        {"method__name": "decomfl", "server__momentum": 0.5},
        {
            "method__name": "decomfl",
            "federation__secure_sums": True,
            "federation__weights": "equal",
        },
        {"method__name": "fedkseed-pro", "method__candidates": 9},
        {"method__learning_rate": "auto"},
    ],
)
def test_sites_go_back(changes: dict[str, Any], world: Any) -> None:
    found = world(**SETTINGS, **changes)
    check(found, found.run())
    assert found.clients()[DIVERGED] == []
    returned = found.lines[DIVERGED + 1]
    good = DIVERGED - returned["taken_back"]
    assert returned["heldout_loss"] == found.lines[good]["heldout_loss"]


def test_a_site_that_was_away_holds_what_was_taken_back(world: Any) -> None:
    found = world(names="abcd", **SETTINGS)
    found.transport.away = lambda: ["d"] if DIVERGED <= found.round < 6 else []
    check(found, found.run())
    assert 3 in found.clients()[7]


def test_a_server_that_was_killed_goes_back(world: Any) -> None:
    found = world(**SETTINGS)

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if message.kind is MessageKind.TASK and number(message) == DIVERGED + 1:
            raise KilledError
        return bytes(answer())

    found.transport.hook = hook
    with pytest.raises(KilledError):
        found.run()
    found.transport.hook = lambda name, message, answer: bytes(answer())
    check(found, found.run(resume=True))


def test_a_run_goes_back_after_its_last_round(world: Any) -> None:
    found = world(**{**SETTINGS, "federation__rounds": DIVERGED})
    summary = found.run()
    assert [len(clients) for clients in found.clients()] == [3] * DIVERGED + [0]
    assert set(found.digests().values()) == {summary["state_digest"]}
    assert found.lines[-1]["state_digest"] == summary["state_digest"]
