"""Privacy across machines: what leaves a site, what a site refuses, and bits with drawn noise."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedforward.config import site as sites
from fedforward.config.template import toml_value
from fedforward.core.errors import FedForwardError
from fedforward.deployment import site as site_module
from fedforward.deployment.site import Site
from fedforward.deployment.tuning import Tuning, build
from fedforward.federation.budget import Accounts
from fedforward.federation.ledger import Ledger
from fedforward.federation.privacy import epsilon
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.refusal import RefusalCode
from fedforward.messages.report import Report
from tests.deployment.test_site_secrets import hello, refusal
from tests.methods.test_privacy import Seeded
from tests.support.command_line import command
from tests.support.coordinator import ALL, KilledError
from tests.support.sites import party, run_toml

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


def sent(
    world: Any, changed: Callable[[list[dict[str, str]]], None], **changes: Any
) -> list[tuple[str, MessageKind, bytes]]:
    """All that sites send in a whole run, on rows that a function has changed."""
    found = world(**(PRIVATE | changes))
    for name in "abc":
        text = (found.path / f"{name}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(row) for row in text.splitlines()]
        changed(rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        settings = found.inside[name].settings
        Path(settings.data.source).write_text(text, encoding="utf-8")
        found.inside[name] = Site(settings)
    found.transport.inside.update(found.inside)
    found.run()
    return list(found.transport.answers)


def unchanged(rows: list[dict[str, str]]) -> None:
    """Leave rows as they are."""


def others(rows: list[dict[str, str]]) -> None:
    """Other answers in all rows, held-out ones among them."""
    for row in rows:
        row["answer"] = "quite another answer than before"


def one_less(rows: list[dict[str, str]]) -> None:
    """The last row goes; which rows are held out changes with it."""
    del rows[-1]


@pytest.mark.parametrize("changed", [others, one_less])
def test_nothing_depends_on_rows_but_through_the_mechanism(
    world: Any, monkeypatch: pytest.MonkeyPatch, changed: Any
) -> None:
    """With the same draws and a bound of nearly nothing, other rows send the same bytes."""
    seeded(monkeypatch)
    # Each site reads its own rows anew.
    monkeypatch.setattr(site_module, "build", build)
    tiny = {"privacy__clip": 1e-30, "privacy__noise_multiplier": 1e12}
    first, second = (sent(world, how, **tiny) for how in (unchanged, changed))
    assert Counter(kind for _, kind, _ in first)[MessageKind.REPORT] == 12
    assert Counter(kind for _, kind, _ in first)[MessageKind.METRICS] >= 9
    assert first == second


def test_with_a_bound_that_lets_rows_speak_only_the_gradients_do(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round's reports are equal in every byte but those of the scalars."""
    seeded(monkeypatch)
    monkeypatch.setattr(site_module, "build", build)
    reports = [
        [
            Report.decode(body)
            for _, kind, body in sent(world, how, federation__rounds=1)
            if kind is MessageKind.REPORT
        ]
        for how in (unchanged, others)
    ]
    assert len(reports[0]) == 3
    for one, other in zip(*reports, strict=True):
        assert (one.gradients != other.gradients).any()
        assert replace(one, gradients=other.gradients).encode() == other.encode()


def test_figures_of_held_out_rows_stay_at_the_sites(world: Any, tmp_path: Path) -> None:
    found = world(**PRIVATE)
    summary = found.run()
    for kind in (MessageKind.METRICS, MessageKind.ENROLLMENT):
        bodies = [json.loads(body) for _, what, body in found.transport.answers if what is kind]
        assert bodies
        for body in bodies:
            assert "heldout_loss" not in body and "metrics" not in body
            assert {body.get("heldout", 0), body.get("tokens", 0)} == {0}
    assert summary["heldout_loss"] is None and summary["rounds"] == 4
    assert all("heldout_loss" not in line for line in found.lines)
    assert found.status["heldout_loss"] is None
    page = command("report", found.out, "--out", tmp_path / "page.html")
    assert page.code == 0, page
    assert "withheld" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_private_run_goes_on_without_figures(world: Any) -> None:
    found = world(**PRIVATE)

    def kill(name: str, message: Envelope, answer: Any) -> Any:
        if message.kind is MessageKind.EVALUATION and found.round == 2:
            raise KilledError
        return answer()

    found.transport.hook = kill
    found.killed()
    summary = found.run(resume=True)
    assert set(found.digests().values()) == {summary["state_digest"]}
    assert [line["round"] for line in found.lines] == [0, 1, 2, 3, 4]
    # A first line that says neither is no line.
    file = found.out / "metrics.jsonl"
    file.write_text(file.read_text("utf-8").replace(', "withheld": true', "", 1), "utf-8")
    assert found.run(resume=True)["state_digest"] == summary["state_digest"]
    assert found.lines[0]["withheld"] is True


def test_figures_are_sent_where_the_terms_and_the_site_have_it_so(
    world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = world(**PRIVATE, privacy__heldout="plain")
    assert found.run()["heldout_loss"]["end"] > 0.0
    terms = sites.terms(
        run_toml(tmp_path, *OVERRIDES, "privacy.delta=1e-5", "privacy.heldout=plain")
    )
    refused = refusal(party(tmp_path, "a", limits__epsilon=50.0).answer(hello(terms)))
    assert refused.code is RefusalCode.LIMITS and "privacy.heldout" in refused.keys
    assert "sends figures of held-out rows without noise" in caplog.text


def test_a_site_that_sends_what_it_should_withhold_is_told_from_the_others(world: Any) -> None:
    found = world(**PRIVATE)

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        data = Envelope.decode(answer())
        if data.kind is MessageKind.METRICS and name == "c":
            body = json.dumps({**data.json(), "heldout_loss": 0.5}).encode()
            data = replace(data, body=body)
        return data.encode()

    found.transport.hook = hook
    assert found.run()["heldout_loss"] is None
    assert "should have withheld" in found.of("c")["note"]


def test_patience_needs_figures(tmp_path: Path) -> None:
    with pytest.raises(FedForwardError, match=r"run.patience = 3 .*privacy.heldout"):
        run_toml(tmp_path, *OVERRIDES, "privacy.delta=1e-5", "run.patience=3")


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


def test_the_cost_of_all_runs_is_bounded(
    world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = world(**PRIVATE)
    found.run()
    cost = epsilon(0.25, 2.0, 8, 1e-5)
    (account,) = Accounts(found.path / "a" / "privacy").all()
    assert (account.rounds, account.last, account.epsilon) == (4, 3, cost)
    # The same rows in another file, and another run.
    own = found.inside["a"].settings
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(own.data.source).read_bytes())
    again = own.model_copy(
        update={
            "data": own.data.model_copy(update={"source": str(moved)}),
            "limits": own.limits.model_copy(update={"epsilon": 1.9 * cost, "delta": 1e-4}),
        }
    )
    terms = sites.terms(found.config)
    refused = refusal(Site(again).answer(hello(terms)))
    assert refused.code is RefusalCode.LIMITS and "limits.epsilon" in refused.keys
    assert f"other runs have spent {cost:.4g} on these rows" in caplog.text
    enough = again.limits.model_copy(update={"epsilon": 2.1 * cost})
    twice = Site(again.model_copy(update={"limits": enough}))
    assert Envelope.decode(twice.answer(hello(terms))).kind is MessageKind.ENROLLMENT
    # What cannot be read is no licence.
    (found.path / "a" / "privacy" / "spent.json").write_text("{", encoding="utf-8")
    refused = refusal(Site(own).answer(hello(terms)))
    assert refused.code is RefusalCode.LIMITS and not refused.keys
    assert "spent.json cannot be read" in caplog.text


def test_a_round_that_nothing_is_left_for_is_refused(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Another run has spent it since this one began."""
    cost = epsilon(0.25, 2.0, 8, 1e-5)
    limits = {"c": {"epsilon": 1.2 * cost, "delta": 1e-3}}
    found = world(**PRIVATE, limits=limits, federation__quorum=2)

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if found.round == 2 and name == "c" and message.kind is MessageKind.TASK:
            accounts = Accounts(found.path / "c" / "privacy")
            if len(accounts.all()) == 1:
                (mine,) = accounts.all()
                accounts.keep(replace(mine, run="ff", epsilon=cost), accounts.rows(mine.rows))
        return bytes(answer())

    found.transport.hook = hook
    found.run()
    assert found.clients() == [ALL, ALL, [0, 1], [0, 1]]
    assert "limits.epsilon" in found.of("c")["note"]
    assert "other runs have spent" in caplog.text


def test_an_operator_sees_what_was_spent(world: Any, tmp_path: Path) -> None:
    found = world(**PRIVATE)
    own = found.inside["a"].settings
    file = tmp_path / "site.toml"
    content = own.model_dump(exclude_unset=True)
    content["limits"]["epsilon"] = 50.0
    lines = [
        f"{section}.{key} = {toml_value(value)}"
        for section, values in content.items()
        for key, value in values.items()
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    before = command("privacy", file)
    assert before.code == 0 and "no run with [privacy]" in before.out, before
    found.run()
    shown = command("privacy", file, "--json")
    told = json.loads(shown.out)
    cost = epsilon(0.25, 2.0, 8, 1e-5)
    assert (told["rows"], told["epsilon"], told["limit_epsilon"]) == (12, cost, 50.0)
    assert [run["rounds"] for run in told["runs"]] == [4]
    text = " ".join(command("privacy", file).out.split())
    assert f"epsilon {cost:.4g} spent on one" in text and f"leaves {50.0 - cost:.4g}" in text
    command("privacy", tmp_path / "no.toml").refused("no.toml")


def test_noise_of_the_server_is_not_the_sites_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    terms = sites.terms(
        run_toml(
            tmp_path,
            "federation.weights=equal",
            "federation.secure_sums=true",
            "method.name=decomfl",
            "privacy.level=client",
            "privacy.clip=1.0",
            "privacy.noise_multiplier=20.0",
            "privacy.delta=1e-5",
        )
    )
    refused = refusal(party(tmp_path, "a", limits__epsilon=50.0).answer(hello(terms)))
    assert refused.code is RefusalCode.LIMITS and "privacy.level" in refused.keys
    assert "noise that the server adds" in caplog.text
    answer = Envelope.decode(party(tmp_path, "a").answer(hello(terms)))
    # All examples of a client count as one, and how many they are is not told.
    assert answer.kind is MessageKind.ENROLLMENT and answer.json()["examples"] == 1
