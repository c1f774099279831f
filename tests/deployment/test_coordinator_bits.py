"""The federation across machines has the bits of the simulation, in any order of reports."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedforward.config.schema import Config
from fedforward.config.site import SiteConfig, terms
from fedforward.data.sampler import Batches
from fedforward.deployment.transport import Reply
from fedforward.deployment.tuning import build
from fedforward.federation.client import Client
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import Server
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.planning.allocator import counted
from fedforward.training import assembly
from fedforward.training.assembly import build_method
from fedforward.training.simulation import LocalRuntime
from tests.support.coordinator import Undisturbed, World, check, configured, number, rounds, wire


def simulated(
    config: Config, all_settings: Sequence[SiteConfig], path: Path, together: int
) -> tuple[list[tuple[bytes, ...]], str]:
    """The same federation on one machine, with one shared model: its ledger and its last state."""
    parts = [build(b"simulate", wire(terms(config)), settings) for settings in all_settings]
    shared, first = parts[0].replica, parts[0]
    base = first.model.digest()
    assert {part.model.digest() for part in parts} == {base}
    examples = [len(part.corpus.clients[0]) for part in parts]
    clients = [
        Client(
            place,
            Batches(
                part.corpus.clients[0],
                batch_size=config.method.batch_size,
                run_seed=config.run.seed,
                client=place,
                collate=part.collate,
            ),
            shared,
            sums=config.federation.secure_sums,
        )
        for place, part in enumerate(parts)
    ]
    allocate = None
    if config.method.name == "zorba":
        layout = first.identity.layout
        active = [settings.limits.active_blocks or len(layout.blocks) for settings in all_settings]
        shares = [float(count) for count in examples]
        names = [settings.site.name for settings in all_settings]
        allocate = counted(config.planning, layout, shares, active, names, "test")
        assert not allocate.plan(range(len(names))).matrix.all(), "some block is inactive somewhere"
    settings = assembly.server_settings(config, first.identity, examples, allocate)
    header = assembly.ledger_header(config, first.identity)
    ledger = Ledger.create(path, header if config.federation.secure_sums else {})
    server = Server(settings, build_method(config), ledger)
    runtime = LocalRuntime(server, clients, first.model, together)
    while server.round < config.federation.rounds:
        runtime.run_round()
    shared.catch_up(list(ledger.entries(shared.rounds)))
    ledger.close()
    assert first.model.digest() != base, "the rounds did something"
    return rounds(path), first.model.digest().hex()


METHODS: dict[str, dict[str, Any]] = {
    "fedmezo": {"method__client_rates": "loss", "server__momentum": 0.5},
    "zorba": {},
    "decomfl": {"method__directions": 2},
    "fedkseed": {"method__candidates": 16},
    "feedsign": {"method__directions": 5},
}
#: With a rate that is found.
SEARCHED: dict[str, dict[str, Any]] = {
    "fedmezo": {"method__client_rates": "loss", "method__mu": 1e-4},
    "zorba": {"method__mu": 1e-3},
    "fedkseed": {"method__candidates": 4, "federation__participation": 0.5},
}


@pytest.mark.parametrize(
    ("name", "found"),
    [*((name, {}) for name in METHODS), *((name, SEARCHED[name]) for name in SEARCHED)],
    ids=[*METHODS, *(f"{name} searched" for name in SEARCHED)],
)
def test_sites_and_simulation_have_the_same_bits(
    tmp_path: Path, name: str, found: dict[str, Any]
) -> None:
    """Entries, reports with their proofs, rates, weights and blocks; and the state at the end."""
    limits = {"a": {"active_blocks": 1}, "b": {"active_blocks": 2}} if name == "zorba" else {}
    changes: dict[str, Any] = {
        "method__local_steps": 2,
        "method__batch_size": 2,
        "federation__rounds": 4,
    }
    changes |= (found | {"method__learning_rate": "auto"}) if found else METHODS[name]
    config = configured(method__name=name, **changes)
    federation = World(tmp_path / "sites", config, limits=limits)
    summary = federation.run()
    assert [site.loads for site in federation.inside.values()] == [1, 1, 1]
    settings = [site.settings for site in federation.inside.values()]
    # Clients in lockstep are the same as each for itself.
    together = 3 if name == "zorba" and not found else 1
    ledger, digest = simulated(config, settings, tmp_path / "ledger", together)
    if "federation__participation" in found:
        # Sites that an evaluation has brought forward are not asked for a proof.
        ledger = rounds(tmp_path / "ledger", proofs=False)
        assert rounds(federation.out / "ledger.sqlite", proofs=False) == ledger
    else:
        assert federation.ledger == ledger
    assert len(ledger) == 4
    kept = Ledger(tmp_path / "ledger")
    results = [part for record in kept.rounds() for part in record.results]
    kept.close()
    assert any(len(part.report.line_search) for part in results) == bool(found)
    assert summary["state_digest"] == digest
    assert set(federation.digests().values()) == {digest}
    for site in "abc":
        assert federation.kept(site)["digest"] == digest and federation.kept(site)["rounds"] == 4


class Replay:
    """A link without sites: what sites answered once, again."""

    def __init__(self, recorded: list[tuple[str, Envelope, bytes]]) -> None:
        self.recorded = {
            (name, number(asked), asked.kind): (asked, data) for name, asked, data in recorded
        }
        self.out: list[tuple[str, Envelope]] = []

    def present(self) -> Sequence[str]:
        return ["a", "b", "c"]

    def send(self, site: str, data: bytes) -> None:
        self.out.append((site, Envelope.decode(data)))

    def receive(self) -> Sequence[Reply]:
        out, self.out = self.out, []
        came = []
        for name, message in out:
            asked, data = self.recorded[name, number(message), message.kind]
            assert message.body == asked.body, "the same is asked"
            came.append(Reply(name, replace(Envelope.decode(data), run=message.run).encode()))
        return came


def test_recorded_reports_make_the_same_ledger(world: Any, undisturbed: Undisturbed) -> None:
    recorded: list[tuple[str, Envelope, bytes]] = []
    first = world()

    def record(name: str, message: Envelope, answer: Any) -> bytes:
        data: bytes = answer()
        recorded.append((name, message, data))
        return data

    first.transport.hook = record
    check(first, first.run(), undisturbed)
    second = world()
    second.transport = Replay(recorded)
    summary = second.run()
    assert second.ledger == undisturbed.ledger
    assert summary["state_digest"] == undisturbed.digest
    assert second.untimed == first.untimed
    assert all(site.tuning is None for site in second.inside.values()), "no site did anything"


def test_the_order_of_reports_changes_nothing(world: Any, undisturbed: Undisturbed) -> None:
    found = world()

    def last_first(name: str, message: Envelope, answer: Any) -> bytes | None:
        if message.kind is not MessageKind.TASK or name == "c":
            return bytes(answer())
        due = found.clock.now + {"a": 2.0, "b": 1.0}[name]
        found.transport.later(name, answer(), lambda: found.clock.now >= due)
        return None

    found.transport.hook = last_first
    check(found, found.run(), undisturbed)
