"""The federation across machines without an engine: letters handed over in one process."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedforward.cli import main as cli
from fedforward.config import site as sites
from fedforward.config.loading import validate_as
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.demo.text import ANSWER, PROMPT, site_examples
from fedforward.deployment.coordinator import Coordinator, Stopped
from fedforward.deployment.site import Site
from fedforward.deployment.transport import Arrival
from fedforward.federation.client import Client
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import Server
from fedforward.messages.codec import MessageError
from fedforward.messages.envelope import Enrolment, Kind, Letter
from fedforward.methods.base import Method
from fedforward.training import assembly
from fedforward.training.simulation import LocalRuntime
from tests.conftest import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("libraries_are_no_garbage")
NAMES = ("a", "b", "c")


class Clock:
    """Time that passes when someone waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


class Direct:
    """A link that hands letters over, each to be answered when it is asked for.

    `tamper` may change an answer, or hold it back with None.
    """

    def __init__(self, parties: dict[str, Site]) -> None:
        self.parties = dict(parties)
        self.outbox: list[tuple[str, bytes]] = []
        self.held: list[Arrival] = []
        self.tamper: Callable[[str, Letter, bytes], bytes | None] = lambda name, letter, data: data
        self.looks = 0
        self.each_look: Callable[[int], None] = lambda number: None

    def present(self) -> Sequence[str]:
        self.looks += 1
        self.each_look(self.looks)
        return list(self.parties)

    def send(self, site: str, data: bytes) -> None:
        self.outbox.append((site, data))

    def receive(self) -> Sequence[Arrival]:
        arrived, self.outbox = self.outbox, []
        answers = []
        for name, data in arrived:
            if name not in self.parties:
                answers.append(Arrival(name, error="it is gone"))
                continue
            answer = self.tamper(name, Letter.open(data), self.parties[name].answer(data))
            if answer is None:
                self.outbox.append((name, data))
            else:
                answers.append(Arrival(name, answer))
        return answers


def site_config(folder: Path, name: str, **changes: Any) -> sites.SiteConfig:
    rows = site_examples(seed=0, per_site=9)["abc".index(name) :: 3]
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    content: dict[str, dict[str, Any]] = {
        "site": {"name": name, "out": str(folder / name)},
        "model": {"path": str(DEMO_MODEL)},
        "data": {"source": str(source)},
        "run": {"threads": 1, "probes_per_call": 2},
    }
    for key, value in changes.items():
        section, _, rest = key.partition("__")
        content.setdefault(section, {})[rest] = value
    return validate_as(sites.SiteConfig, content, "site.toml")


def party(folder: Path, name: str, **changes: Any) -> Site:
    return Site(site_config(folder, name, **changes), lambda text: None)


def run_toml(folder: Path, *overrides: str) -> Config:
    path = folder / "run.toml"
    path.write_text(
        f"""
        lora.rank = 2
        data.prompt = {json.dumps(PROMPT)}
        data.answer = {json.dumps(ANSWER)}
        data.heldout = 3
        data.sequence_length = 64
        federation.clients = 3
        federation.rounds = 4
        federation.quorum = 2
        method.learning_rate = 3e-3
        method.mu = 1e-2
        method.local_steps = 2
        run.evaluate_every = 2
        """,
        encoding="utf-8",
    )
    return sites.load_terms(path, list(overrides))


def carry_out(settings: Config, out: Path, link: Direct, **options: Any) -> dict[str, Any]:
    clock = Clock()
    coordinator = Coordinator(settings, out, link, clock=clock, pause=clock.pause, **options)
    return coordinator.run()


def rounds(out: Path) -> list[tuple[bytes, list[bytes]]]:
    ledger = Ledger(out / "ledger.sqlite")
    found = [(r.entry.encode(), [o.encode() for o in r.origins]) for r in ledger.rounds()]
    ledger.close()
    return found


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Site]:
    return {name: party(tmp_path, name) for name in NAMES}


METHODS = [
    ("method.name=fedmezo", "method.client_rates=update-difference"),
    ("method.name=decomfl",),
    ("method.name=zorba",),
    ("method.name=fedkseed-pro", "method.candidates=16"),
]


@pytest.mark.parametrize("overrides", METHODS, ids=lambda o: o[0].partition("=")[2])
def test_the_same_bits_as_on_one_machine(
    tmp_path: Path, three: dict[str, Site], overrides: tuple[str, ...]
) -> None:
    settings = run_toml(tmp_path, *overrides)
    summary = carry_out(settings, tmp_path / "out", Direct(three))
    assert [site.loads for site in three.values()] == [1, 1, 1]

    parts = [site.tuning for site in three.values()]
    assert all(part is not None for part in parts)
    first = parts[0]
    assert first is not None
    replica = first.replica
    replica.reset()
    method = assembly.build_method(settings)
    assert isinstance(method, Method)
    clients = [
        Client(number, part.client(number).batches, replica, method)
        for number, part in enumerate(parts)
        if part is not None
    ]
    examples = [len(client.batches) for client in clients]
    ledger = Ledger.create(tmp_path / "local.sqlite", {"local": True})
    server = Server(assembly.server_settings(settings, first.identity, examples), method, ledger)
    runtime = LocalRuntime(server, clients, first.model, together=1)
    for _ in range(settings.federation.rounds):
        runtime.run_round()
    here = [(r.entry.encode(), [o.encode() for o in r.origins]) for r in ledger.rounds()]

    def without_digests(found: list[tuple[bytes, list[bytes]]]) -> list[bytes]:
        return [entry for entry, _ in found]

    assert without_digests(rounds(tmp_path / "out")) == without_digests(here)
    replica.catch_up(list(ledger.entries()))
    assert summary["state_digest"] == first.model.digest().hex()


class KillError(BaseException):
    """Ends a coordinator as SIGKILL would."""


@pytest.mark.parametrize("fresh", [False, True], ids=["same sites", "sites started again"])
@pytest.mark.parametrize("look", [2, 4, 6, 8, 9])
def test_killed_and_resumed(tmp_path: Path, three: dict[str, Site], look: int, fresh: bool) -> None:
    settings = run_toml(tmp_path)
    whole = carry_out(settings, tmp_path / "whole", Direct(three))
    link = Direct({name: party(tmp_path, name) for name in NAMES})

    def kill(number: int) -> None:
        if number == look:
            raise KillError

    link.each_look = kill
    with pytest.raises(KillError):
        carry_out(settings, tmp_path / "out", link)
    left = {name: party(tmp_path, name) for name in NAMES} if fresh else link.parties
    again = carry_out(settings, tmp_path / "out", Direct(left), resume=True)
    assert again["state_digest"] == whole["state_digest"]
    entries = [entry for entry, _ in rounds(tmp_path / "whole")]
    assert [entry for entry, _ in rounds(tmp_path / "out")] == entries
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(5))


def test_a_site_that_starts_again_in_a_round_catches_up(
    tmp_path: Path, three: dict[str, Site]
) -> None:
    settings = run_toml(tmp_path)
    whole = carry_out(settings, tmp_path / "whole", Direct(three))
    link = Direct({name: party(tmp_path, name) for name in NAMES})
    tasks = 0

    def restart(name: str, letter: Letter, data: bytes) -> bytes:
        nonlocal tasks
        if letter.kind is Kind.TASK and name == "b":
            tasks += 1
            if tasks == 3:
                link.parties["b"] = party(tmp_path, "b")
                return link.parties["b"].answer(letter.seal())
        return data

    link.tamper = restart
    assert carry_out(settings, tmp_path / "out", link)["state_digest"] == whole["state_digest"]
    assert tasks > 4


def test_one_joins_and_one_leaves(tmp_path: Path, three: dict[str, Site]) -> None:
    settings = run_toml(tmp_path, "federation.rounds=14", "federation.clients=2")
    late = three.pop("c")
    link = Direct(three)
    path = tmp_path / "out" / "ledger.sqlite"

    def change(number: int) -> None:
        if not path.is_file():
            return
        ledger = Ledger(path)
        length = ledger.length
        ledger.close()
        if length >= 10:
            link.parties["c"] = late
        if length >= 12:
            link.parties.pop("a", None)

    link.each_look = change
    summary = carry_out(settings, tmp_path / "out", link)
    assert summary["rounds"] == 14 and set(summary["sites"]) == {"a", "b", "c"}
    digests = [
        json.loads((tmp_path / name / "state.json").read_text())["digest"] for name in ("b", "c")
    ]
    assert digests == [summary["state_digest"]] * 2
    assert not (tmp_path / "a" / "state.json").exists()


def test_altered_letters_are_refused_and_the_round_unharmed(
    tmp_path: Path, three: dict[str, Site]
) -> None:
    settings = run_toml(tmp_path)
    whole = carry_out(settings, tmp_path / "whole", Direct(three))
    link = Direct({name: party(tmp_path, name) for name in NAMES})
    seen = 0

    def flip(name: str, letter: Letter, data: bytes) -> bytes:
        nonlocal seen
        seen += letter.kind is Kind.TASK
        if letter.kind is Kind.TASK and seen % 3 == 0:
            place = len(data) // 2
            return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        return data

    link.tamper = flip
    assert carry_out(settings, tmp_path / "out", link)["state_digest"] == whole["state_digest"]
    assert seen > 12


def test_a_deadline_closes_without_the_slow(tmp_path: Path, three: dict[str, Site]) -> None:
    settings = run_toml(tmp_path, "federation.deadline=5.0", "federation.rounds=3")
    link = Direct(three)
    held = 0

    def hold(name: str, letter: Letter, data: bytes) -> bytes | None:
        nonlocal held
        if name == "c" and letter.kind is Kind.TASK and held < 26:
            held += 1
            return None
        return data

    link.tamper = hold
    summary = carry_out(settings, tmp_path / "out", link)
    assert summary["rounds"] == 3
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[1]["learning_rates"]) == {"0", "1"}
    assert sum(line.get("clients", {}).get("late", 0) for line in lines) == 1


def test_another_model_is_dismissed_with_a_sentence(tmp_path: Path, three: dict[str, Site]) -> None:
    answer = three["b"]._enrol

    def other(letter: Letter) -> Enrolment:
        from dataclasses import replace

        enrolment = answer(letter)
        return replace(enrolment, model=replace(enrolment.model, base="0" * 64))

    three["b"]._enrol = other  # type: ignore[method-assign]
    told: list[str] = []
    three["b"].notice = told.append
    summary = carry_out(run_toml(tmp_path), tmp_path / "out", Direct(three))
    assert set(summary["sites"]) == {"a", "c"}
    assert any("its base model has other weights" in text for text in told)
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["state"] == "finished"
    assert "other weights" in next(s["note"] for s in status["sites"] if s["name"] == "b")


def test_no_majority_is_a_sentence(tmp_path: Path, three: dict[str, Site]) -> None:
    del three["c"]
    three["b"].settings = site_config(tmp_path, "b")
    settings = run_toml(tmp_path, "federation.clients=2")
    answer = three["b"]._enrol

    def other(letter: Letter) -> Enrolment:
        from dataclasses import replace

        enrolment = answer(letter)
        return replace(enrolment, model=replace(enrolment.model, tokenizer="0" * 64))

    three["b"]._enrol = other  # type: ignore[method-assign]
    with pytest.raises(FedForwardError, match="none has most: a; b"):
        carry_out(settings, tmp_path / "out", Direct(three))


def test_a_site_refuses_terms_with_the_reason(tmp_path: Path, three: dict[str, Site]) -> None:
    three["c"] = party(tmp_path, "c", limits__rounds=3)
    settings = run_toml(tmp_path, "federation.clients=2")
    carry_out(settings, tmp_path / "out", Direct(three))
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    note = next(site["note"] for site in status["sites"] if site["name"] == "c")
    assert note == "federation.rounds = 4 is above this site's limits.rounds = 3"


def test_stopped_and_resumed(tmp_path: Path, three: dict[str, Site]) -> None:
    settings = run_toml(tmp_path)
    link = Direct(three)

    def stop(number: int) -> None:
        if number == 6:
            (tmp_path / "out" / "stop").touch()

    link.each_look = stop
    with pytest.raises(Stopped):
        carry_out(settings, tmp_path / "out", link)
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "stopped"
    link.each_look = lambda number: None
    assert carry_out(settings, tmp_path / "out", link, resume=True)["rounds"] == 4
    with pytest.raises(FedForwardError, match="holds a run already"):
        carry_out(settings, tmp_path / "out", link)


def test_a_named_evaluator(tmp_path: Path, three: dict[str, Site]) -> None:
    settings = run_toml(tmp_path, 'evaluation.site="b"')
    asked = set()
    link = Direct(three)

    def watch(name: str, letter: Letter, data: bytes) -> bytes:
        if letter.kind is Kind.EVALUATION:
            asked.add(name)
        return data

    link.tamper = watch
    carry_out(settings, tmp_path / "out", link)
    assert asked == {"b"}


def test_the_server_needs_no_torch() -> None:
    code = (
        "import sys, fedforward.deployment.coordinator, fedforward.config.site;"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- letters and terms -----------------------------------------------------------------------


def test_a_letter_with_any_bit_changed_is_refused() -> None:
    data = Letter(Kind.TASK, b"12345678", b"body of a letter").seal()
    assert Letter.open(data).body == b"body of a letter"
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(MessageError):
            Letter.open(bytes(changed))
    for size in range(len(data)):
        with pytest.raises(MessageError):
            Letter.open(data[:size])


@pytest.mark.parametrize("key", ["examples", "heldout", "rounds"])
@pytest.mark.parametrize("value", [-1, 1.5, "3", None, True, 2**70])
def test_enrolments_with_nonsense_are_refused(
    three: dict[str, Site], tmp_path: Path, key: str, value: Any
) -> None:
    content = _an_enrolment()
    assert Enrolment.decode(content).examples == 5
    with pytest.raises(MessageError):
        Enrolment.decode({**content, key: value})


def _an_enrolment() -> dict[str, Any]:
    from fedforward.directions import Layout
    from fedforward.training.assembly import ModelIdentity

    model = ModelIdentity(Layout.of({"w": (3, 2), "v": ()}), "base", (), 28, "tokenizer")
    return dict(json.loads(Enrolment("a", model, 5, 2, 0).encode()))


def test_enrolments_of_other_versions_are_refused() -> None:
    content = _an_enrolment()
    for key in ("direction_version", "wire_version"):
        with pytest.raises(MessageError, match="Install the same release"):
            Enrolment.decode({**content, key: "another"})
    for layout in (
        [[], [], [], []],
        [["b", "a"], [[1], [1]], ["all"], [0, 0]],
        [["a"], [[0]], ["all"], [0]],
    ):
        with pytest.raises(MessageError):
            Enrolment.decode({**content, "model": {**content["model"], "layout": layout}})


def test_nothing_of_a_site_travels(tmp_path: Path) -> None:
    given = sites.terms(run_toml(tmp_path))
    assert "simulation" not in given
    for section, key in (("model", "path"), ("data", "source"), ("run", "device")):
        assert key not in given[section]
    joined = sites.join(given, site_config(tmp_path, "a"))
    assert joined.federation.clients == 1 and joined.model.path == str(DEMO_MODEL)
    assert joined.method == run_toml(tmp_path).method


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("federation", "rounds", 2000, "limits.rounds"),
        ("federation", "rounds", "many", "limits.rounds"),
        ("method", "local_steps", 5000, "limits.local_steps"),
        ("method", "directions", 65, "limits.directions"),
        ("method", "name", "fedavg", "would send tensors"),
        ("method", "objective", "os:getcwd", "limits.functions"),
        ("evaluation", "metrics", ["os:getcwd"], "limits.functions"),
        ("model", "tune", "full", "limits.full_tuning"),
    ],
)
def test_limits(tmp_path: Path, section: str, key: str, value: Any, words: str) -> None:
    limits = sites.LimitsSection()
    given = sites.terms(run_toml(tmp_path))
    assert sites.refusals(given, limits) == []
    given[section] = {**given[section], key: value}
    (sentence,) = sites.refusals(given, limits)
    assert words in sentence
    # Whatever is sent, there are sentences.
    assert sites.refusals({}, limits) and sites.refusals({section: 3}, limits)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.name=fedavg", "method.name = 'fedavg'"),
        ("simulation.dropout=0.1", r"\[simulation\]"),
        ("federation.partition=dirichlet", "federation.partition"),
        ("evaluation.source=x.jsonl", "evaluation.source"),
    ],
)
def test_terms_that_need_one_machine_are_refused(tmp_path: Path, override: str, words: str) -> None:
    extra = ["federation.field=site"] if "partition" in override else []
    with pytest.raises(FedForwardError, match=words):
        run_toml(tmp_path, override, *extra)


def test_a_sites_file(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(sites.example_site(), encoding="utf-8")
    assert sites.load_site(path).limits == sites.LimitsSection()
    path.write_text("model.path = 'm'\ndata.source = 'd'\nlimits.full_tunning = true\n")
    with pytest.raises(FedForwardError, match=r"Did you mean limits\.full_tuning"):
        sites.load_site(path)


def test_fields_of_other_names(tmp_path: Path) -> None:
    rows = site_examples(seed=0, per_site=9)
    names = {key: f"their {key}" for key in rows[0]}
    own = tmp_path / "own.jsonl"
    own.write_text(
        "".join(json.dumps({names[k]: v for k, v in row.items()}) + "\n" for row in rows[0::3]),
        encoding="utf-8",
    )
    given = sites.terms(run_toml(tmp_path))
    greeting = Letter(Kind.GREETING, b"12345678", json.dumps({"terms": given}).encode()).seal()
    there = Letter.open(
        party(tmp_path, "a", data__source=str(own), data__fields=names).answer(greeting)
    )
    usual = Letter.open(party(tmp_path, "a").answer(greeting))
    assert (there.kind, there.body) == (Kind.ENROLMENT, usual.body)
    wrong = {next(iter(names)): "nothing"}
    answer = Letter.open(party(tmp_path, "a", data__fields=wrong).answer(greeting))
    assert answer.kind is Kind.REFUSAL and "Their fields are" in answer.text()


def test_a_servers_run_is_verified_and_exported_with_the_sites_model(
    tmp_path: Path, three: dict[str, Site]
) -> None:
    from fedforward.training import replay as artefacts

    out = tmp_path / "out"
    summary = carry_out(run_toml(tmp_path), out, Direct(three))
    with pytest.raises(FedForwardError, match="Give --model FOLDER"):
        artefacts.verify(out)
    result = artefacts.verify(out, str(DEMO_MODEL))
    assert result.differences == [] and result.proofs
    assert result.state_digest == summary["state_digest"]
    artefacts.export(out, tmp_path / "adapter", merge=False, base=str(DEMO_MODEL))
    name = "adapter_model.safetensors"
    kept = (tmp_path / "a" / "adapter" / name).read_bytes()
    assert (tmp_path / "adapter" / name).read_bytes() == kept
    shown = CliRunner().invoke(cli.app, ["status", str(out)])
    assert "finished: 4 of 4 rounds" in shown.stdout and "takes part" not in shown.stdout
    (out / "summary.json").write_text(
        (out / "summary.json").read_text().replace(summary["state_digest"], "00" * 32)
    )
    (difference,) = artefacts.verify(out, str(DEMO_MODEL)).differences
    assert "state_digest" in difference
