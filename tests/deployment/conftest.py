"""Sites whose models are loaded once, and a run that nothing disturbs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedforward.config import site as sites
from fedforward.config.site import SiteConfig
from fedforward.deployment import site as site_module
from fedforward.deployment.secure import sum_site
from fedforward.deployment.tuning import Tuning, asked_of, build, releases_of
from fedforward.federation.client import Replica
from fedforward.training import build as experiment
from fedforward.training.assembly import build_method, mechanism_of
from tests.conftest import DEMO_MODEL
from tests.support.coordinator import Undisturbed, World, configured, rounds


@pytest.fixture(scope="session")
def models() -> Callable[..., Tuning]:
    """`build` with the models of earlier tests, back at their base."""
    built: dict[str, tuple[Tuning, bytes]] = {}

    def again(run: bytes, given: dict[str, Any], settings: SiteConfig) -> Tuning:
        own = settings.model_dump(exclude={"site", "limits"})
        own["data"]["source"] = settings.site.name
        parts = [given[section] for section in ("model", "lora", "data", "evaluation", "run")]
        key = json.dumps([*parts, given["method"]["name"], own])
        # A path of its own is a model that only one test has.
        if settings.model.path != str(DEMO_MODEL):
            return build(run, given, settings)
        if key not in built:
            tuning = build(run, given, settings)
            built[key] = tuning, tuning.model.digest()
        old, base = built[key]
        old.model.reset()
        assert old.model.digest() == base, "nothing of the last test is left"
        config = sites.join(given, settings)
        method = build_method(config)
        return replace(
            old,
            run=run,
            terms=given,
            config=config,
            replica=Replica(old.model, method),
            method=method,
            clients={},
            asked=asked_of(run, settings),
            sums=sum_site(run, config),
            mechanism=mechanism_of(config),
            releases=releases_of(run, config, settings, experiment.corpus_reader(config)),
        )

    return again


@pytest.fixture
def world(tmp_path: Path, monkeypatch: Any, models: Any) -> Callable[..., World]:
    """A function that makes sites; their models are loaded once for all tests of this file."""
    monkeypatch.setattr(site_module, "build", models)

    def make(names: str = "abc", limits: Any = None, **changes: Any) -> World:
        place = tmp_path / f"world{len(list(tmp_path.iterdir()))}"
        return World(place, configured(**changes), None, names, limits or {})

    return make


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: Any) -> Undisturbed:
    """The run that most tests disturb, with models loaded by the sites themselves."""
    quiet = World(tmp_path_factory.mktemp("undisturbed"), configured())
    summary = quiet.run()
    assert [site.loads for site in quiet.inside.values()] == [1, 1, 1]
    assert set(quiet.digests().values()) == {summary["state_digest"]}
    unproven = rounds(quiet.out / "ledger.sqlite", proofs=False)
    return Undisturbed(quiet.ledger, unproven, summary["state_digest"], quiet.untimed)
