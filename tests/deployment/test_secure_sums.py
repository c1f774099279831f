"""Secure sums across machines: their bits, who vanishes when, and what the server can see."""

from pathlib import Path
from typing import Any

import pytest

from tests.deployment.test_coordinator_bits import simulated
from tests.support.coordinator import World, configured

pytestmark = pytest.mark.usefixtures("libraries_are_no_garbage")

SECURE: dict[str, Any] = {
    "method__name": "decomfl",
    "federation__secure_sums": True,
    "federation__weights": "equal",
}


def test_sites_and_simulation_have_the_same_bits(tmp_path: Path) -> None:
    config = configured(**SECURE, federation__rounds=4, method__local_steps=2)
    federation = World(tmp_path / "sites", config)
    summary = federation.run()
    settings = [site.settings for site in federation.inside.values()]
    ledger, digest = simulated(config, settings, tmp_path / "ledger", 1)
    assert federation.ledger == ledger and len(ledger) == 4
    assert summary["state_digest"] == digest
