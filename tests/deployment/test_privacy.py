"""Privacy across machines: what leaves a site, what a site refuses, and bits with drawn noise."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedforward.config import site as sites
from fedforward.deployment import site as site_module
from fedforward.deployment.site import Site, Tuning, build
from fedforward.federation.ledger import Ledger
from fedforward.federation.privacy import epsilon
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.refusal import RefusalCode
from fedforward.messages.report import Report
from tests.deployment.test_site_secrets import hello, refusal
from tests.methods.test_privacy import Seeded
from tests.support.coordinator import ALL, KilledError
from tests.support.sites import party, run_toml

pytestmark = pytest.mark.usefixtures("libraries_are_no_garbage")

PRIVATE: dict[str, Any] = {
    "federation__weights": "equal",
    "federation__rounds": 4,
    "method__batch_size": 2,
    "method__local_steps": 2,
    "method__learning_rate": 1e-5,
    "privacy__clip": 20.0,
    "privacy__noise_multiplier": 2.0,
    "privacy__delta": 1e-5,
    "privacy__examples": 8,
}


def reports(world: Any) -> list[Report]:
    return [Report.decode(body) for _, kind, body in world.transport.answers if kind == kind.REPORT]


def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site draws what follows from its number, whatever it is asked."""
    client = Tuning.client

    def drawn(self: Tuning, number: int) -> Any:
        found = client(self, number)
        if found.mechanism is not None and not isinstance(found.mechanism.entropy, Seeded):
            object.__setattr__(found.mechanism, "entropy", Seeded(number))
        return found

    monkeypatch.setattr(Tuning, "client", drawn)


def test_a_whole_run_and_what_leaves_its_sites(world: Any) -> None:
    found = world(**PRIVATE)
    summary = found.run()
    assert set(found.digests().values()) == {summary["state_digest"]}
    sent = reports(found)
    assert len(sent) == 12
    for report in sent:
        assert math.isnan(report.loss)
        assert (report.skipped, report.examples, len(report.gradients)) == (0, 8, 2)
        assert report.gradients.all() and not len(report.line_search) and not report.payload
    for name in "abc":
        counted = [
            json.loads(body)
            for who, kind, body in found.transport.answers
            if (who, kind) == (name, MessageKind.ENROLLMENT)
        ]
        assert counted and {enrollment["examples"] for enrollment in counted} == {8}
    assert [line["epsilon"] for line in found.lines[1:]] == [
        epsilon(0.25, 2.0, 2 * rounds, 1e-5) for rounds in (1, 2, 3, 4)
    ]


def test_reports_depend_on_data_only_through_the_mechanism(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same draws and a bound of nearly nothing, other data send the same bytes."""
    seeded(monkeypatch)
    # Each site reads its own rows anew.
    monkeypatch.setattr(site_module, "build", build)
    tiny = PRIVATE | {"privacy__clip": 1e-30, "privacy__noise_multiplier": 1e12}
    first = world(**tiny)
    first.run()
    bodies = {(name, body) for name, kind, body in first.transport.answers if kind == kind.REPORT}
    assert len(bodies) == 12
    second = world(**tiny)
    for name in "abc":
        text = (second.path / f"{name}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(row) for row in text.splitlines()]
        for row in rows:
            row["answer"] = "quite another answer than before"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        settings = second.inside[name].settings
        Path(settings.data.source).write_text(text, encoding="utf-8")
        second.inside[name] = Site(settings)
    second.transport.inside.update(second.inside)
    second.run()
    others = {(name, body) for name, kind, body in second.transport.answers if kind == kind.REPORT}
    assert bodies == others


def test_a_server_that_starts_again_gets_the_report_that_was_drawn(world: Any) -> None:
    """Its last round was answered, and is not in its ledger."""
    found = world(**PRIVATE)

    def kill(name: str, message: Envelope, answer: Any) -> Any:
        data = answer()
        if message.kind is MessageKind.TASK and found.round == 2 and name == "c":
            raise KilledError
        return data

    found.transport.hook = kill
    found.killed()
    # One of the sites has lost all but its files as well.
    found.restart("b")
    found.run(resume=True)
    assert found.clients() == [ALL] * 4
    for number in range(4):
        for client in ALL:
            drawn = {
                report.gradients.tobytes()
                for report in reports(found)
                if (report.round, report.client) == (number, client)
            }
            assert len(drawn) == 1, "one answer a round"
    ledger = Ledger(found.out / "ledger.sqlite")
    assert ledger.length == 4
    ledger.close()


OVERRIDES = [
    "federation.weights=equal",
    "method.batch_size=2",
    "privacy.clip=1.0",
    "privacy.noise_multiplier=2.0",
    "privacy.examples=8",
]


@pytest.mark.parametrize(
    ("limit", "delta", "words", "keys"),
    [
        (0.5, "1e-5", "above this site's limits.epsilon = 0.5", ["limits.epsilon"]),
        (50.0, "1e-4", "above this site's limits.delta = 1e-05", ["limits.delta"]),
        (50.0, None, "The terms have no privacy.clip", ["limits.epsilon"]),
    ],
)
def test_a_site_has_the_last_word(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    limit: float,
    delta: str | None,
    words: str,
    keys: list[str],
) -> None:
    private = [] if delta is None else [*OVERRIDES, f"privacy.delta={delta}"]
    terms = sites.terms(run_toml(tmp_path, *private))
    found = refusal(party(tmp_path, "a", limits__epsilon=limit).answer(hello(terms)))
    assert found.code is RefusalCode.LIMITS and set(keys) <= set(found.keys)
    assert words in caplog.text


def test_a_site_takes_terms_that_are_within_its_own(tmp_path: Path) -> None:
    terms = sites.terms(run_toml(tmp_path, *OVERRIDES, "privacy.delta=1e-5"))
    answer = party(tmp_path, "a", limits__epsilon=50.0).answer(hello(terms))
    envelope = Envelope.decode(answer)
    assert envelope.kind is MessageKind.ENROLLMENT and envelope.json()["examples"] == 8


def test_terms_may_have_aligned_adapters(tmp_path: Path) -> None:
    """Whoever made A did so before: each site has the file."""
    path = tmp_path / "run.toml"
    path.write_text(
        "method.learning_rate = 1e-3\n"
        'lora.init = "aligned"\n'
        'federation.weights = "equal"\n'
        "privacy = {clip = 1.0, noise_multiplier = 1.0, delta = 1e-5, examples = 1000}\n",
        encoding="utf-8",
    )
    assert sites.load_terms(path, []).privacy.on
