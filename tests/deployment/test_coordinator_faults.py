"""The server across machines when anything goes wrong with sites, letters, time or itself.

Sites, letters, ledger and models are the real ones; only the link and the clock are the test's.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.config import site as sites
from fedforward.config.loading import validate, validate_as
from fedforward.config.schema import Config
from fedforward.config.site import SiteConfig, terms
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Steps, Update
from fedforward.data.sampler import Batches
from fedforward.demo.text import ANSWER, PROMPT, site_examples
from fedforward.deployment import site as site_module
from fedforward.deployment.coordinator import Coordinator, Stopped
from fedforward.deployment.participants import PATIENCE, TRIES
from fedforward.deployment.site import Site, Tuning, build
from fedforward.deployment.transport import Arrival
from fedforward.directions import Layout
from fedforward.federation.client import Client, Replica
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import QuorumError, Server
from fedforward.messages.codec import MessageError, Report, Snapshot, Task, unpack_blocks
from fedforward.messages.envelope import Enrolment, Kind, Letter, packed
from fedforward.models.quadratic import Quadratic
from fedforward.planning.allocator import counted
from fedforward.training import assembly
from fedforward.training import replay as artefacts
from fedforward.training.assembly import build_method
from fedforward.training.metrics import DivergenceError
from fedforward.training.simulation import LocalRuntime
from tests.conftest import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("libraries_are_no_garbage")
ROWS = site_examples(seed=0, per_site=10)
#: Uneven, so that the weights of the average are.
PARTS = {"a": ROWS[:12], "b": ROWS[12:22], "c": ROWS[22:30], "d": ROWS[30:39]}
ALL = [0, 1, 2]


class KilledError(Exception):
    """Stands for the end of the coordinator's process."""


class Clock:
    """Time passes only when the coordinator waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.look: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        self.look()
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 1400.0:
            raise AssertionError("the coordinator waits for ever")


#: From a site's name, the letter to it, and what the site makes of any letter, to what comes back;
#: None where nothing does.
Hook = Callable[[str, Letter, Callable[..., bytes]], bytes | Arrival | None]


class Link:
    """Sites in this process; `hook` stands between them and the coordinator."""

    def __init__(self, inside: dict[str, Site], hook: Hook | None = None) -> None:
        self.inside = inside
        self.hook = hook
        self.away: Callable[[], Sequence[str]] = lambda: ()
        self.out: list[tuple[str, bytes]] = []
        self.kept: list[tuple[Callable[[], bool], Arrival]] = []
        self.sent: list[tuple[str, Kind, bytes]] = []
        self.answers: list[tuple[str, Kind, bytes]] = []

    def present(self) -> Sequence[str]:
        return [name for name in self.inside if name not in self.away()]

    def send(self, site: str, data: bytes) -> None:
        self.out.append((site, data))

    def receive(self) -> Sequence[Arrival]:
        came = [arrival for when, arrival in self.kept if when()]
        self.kept = [(when, arrival) for when, arrival in self.kept if not when()]
        out, self.out = self.out, []
        for name, data in out:
            letter = Letter.open(data)
            self.sent.append((name, letter.kind, letter.body))
            if name in self.away():
                came.append(Arrival(name, error="the connection was lost"))
                continue

            def answer(changed: bytes = data, name: str = name) -> bytes:
                sealed = self.inside[name].answer(changed)
                opened = Letter.open(sealed)
                self.answers.append((name, opened.kind, opened.body))
                return sealed

            found = self.hook(name, letter, answer) if self.hook else answer()
            if found is not None:
                came.append(found if isinstance(found, Arrival) else Arrival(name, found))
        return came

    def later(self, name: str, data: bytes, when: Callable[[], bool]) -> None:
        """Let an answer come when something holds."""
        self.kept.append((when, Arrival(name, data)))

    def bodies(self, name: str, kind: Kind) -> list[bytes]:
        """What a site was sent."""
        return [body for who, what, body in self.sent if (who, what) == (name, kind)]

    def tasks(self, name: str) -> list[Task]:
        return [Task.decode(body) for body in self.bodies(name, Kind.TASK)]

    def kinds(self, name: str) -> list[Kind]:
        """What a site answered."""
        return [kind for who, kind, _ in self.answers if who == name]


def number(letter: Letter) -> int:
    """The round of a letter that is a task, or -1."""
    tasks = (Kind.TASK, Kind.EVALUATION, Kind.FAREWELL)
    return Task.decode(letter.body).round if letter.kind in tasks else -1


@dataclass
class World:
    """A coordinator, its sites, and everything that a test may want to change about them."""

    path: Path
    config: Config
    hook: Hook | None = None
    names: str = "abc"
    limits: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.out = self.path / "out"
        self.clock = Clock()
        self.inside = {name: self.site(name) for name in self.names}
        self.link = Link(self.inside, self.hook)
        self.coordinator: Coordinator | None = None

    def settings(self, name: str, **changes: Any) -> SiteConfig:
        rows = self.path / f"{name}.jsonl"
        rows.write_text("".join(json.dumps(r) + "\n" for r in PARTS[name]), encoding="utf-8")
        content: dict[str, dict[str, Any]] = {
            "site": {"name": name, "out": str(self.path / name)},
            "model": {"path": str(DEMO_MODEL)},
            "data": {"source": str(rows)},
            "run": {"threads": 1, "device": "cpu"},
            "limits": dict(self.limits.get(name, {})),
        }
        for key, value in changes.items():
            section, _, part = key.partition("__")
            content[section][part] = value
        return validate_as(SiteConfig, content, "site.toml")

    def site(self, name: str, **changes: Any) -> Site:
        return Site(self.settings(name, **changes), lambda text: None)

    def restart(self, *names: str) -> None:
        """The sites' processes end, and begin anew."""
        for name in names:
            self.inside[name] = self.site(name)

    def run(self, resume: bool = False, config: Config | None = None) -> dict[str, Any]:
        """A coordinator's process, up to its end."""
        self.link.out, self.link.kept = [], []
        self.coordinator = Coordinator(
            config or self.config,
            self.out,
            self.link,
            resume=resume,
            clock=self.clock,
            pause=self.clock.pause,
        )
        try:
            return self.coordinator.run()
        finally:
            if self.coordinator.server is not None:
                self.coordinator.server.ledger.close()

    def killed(self) -> None:
        """A coordinator's process that does not end well; then what killed it is gone."""
        with pytest.raises(KilledError):
            self.run()
        self.link.hook, self.clock.look = None, lambda: None

    @property
    def round(self) -> int:
        """Rounds in the ledger, from within a run."""
        server = self.coordinator.server if self.coordinator else None
        return server.round if server else 0

    @property
    def status(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / "status.json").read_text())
        return content

    def of(self, name: str) -> dict[str, Any]:
        """A site's part of the status."""
        (found,) = [site for site in self.status["sites"] if site["name"] == name]
        return dict(found)

    @property
    def lines(self) -> list[dict[str, Any]]:
        text = (self.out / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def untimed(self) -> list[dict[str, Any]]:
        """The lines without what may differ from run to run."""
        timed = ("seconds", "bytes")
        return [{k: v for k, v in line.items() if k not in timed} for line in self.lines]

    @property
    def ledger(self) -> list[tuple[bytes, ...]]:
        return rounds(self.out / "ledger.sqlite")

    def clients(self) -> list[list[int]]:
        """Whose reports each round was made from."""
        ledger = Ledger(self.out / "ledger.sqlite")
        found = [[o.report.client for o in record.origins] for record in ledger.rounds()]
        ledger.close()
        return found

    def digests(self) -> dict[str, str]:
        """Of what each site holds."""
        return {
            name: site.tuning.model.digest().hex()
            for name, site in self.inside.items()
            if site.tuning is not None
        }

    def kept(self, name: str) -> dict[str, Any]:
        """What a site wrote down at the end."""
        content: dict[str, Any] = json.loads((self.path / name / "state.json").read_text())
        return content


def rounds(path: Path, proofs: bool = True) -> list[tuple[bytes, ...]]:
    """The rounds of a ledger, bit for bit; without `proofs`, but for the digests in reports."""
    ledger = Ledger(path)
    found = []
    for record in ledger.rounds():
        origins = record.origins
        if not proofs:
            origins = tuple(replace(o, report=replace(o.report, digest=b"")) for o in origins)
        found.append((record.entry.encode(), *(origin.encode() for origin in origins)))
    ledger.close()
    return found


def wire(content: Any) -> Any:
    return json.loads(json.dumps(content))


def configured(**changes: Any) -> Config:
    content: dict[str, dict[str, Any]] = {
        "model": {"path": sites.AT_SITES},
        "lora": {"rank": 2},
        "data": {
            "source": sites.AT_SITES,
            "prompt": PROMPT,
            "answer": ANSWER,
            "heldout": 2,
            "sequence_length": 64,
        },
        "federation": {"clients": 3, "rounds": 5},
        "method": {"learning_rate": 3e-3, "mu": 1e-2, "local_steps": 1, "batch_size": 1},
        "run": {"evaluate_every": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content.setdefault(section, {})[name] = value
    config = validate(content)
    sites.check_terms(config, "run.toml")
    return config


@pytest.fixture(scope="module")
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
        method = config.method
        return replace(
            old,
            run=run,
            terms=given,
            config=config,
            replica=Replica(old.model, config.run.seed, method.directions, method.pool),
            method=build_method(config),
            clients={},
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


@dataclass
class Undisturbed:
    """What a run is without any trouble."""

    ledger: list[tuple[bytes, ...]]
    unproven: list[tuple[bytes, ...]]
    digest: str
    lines: list[dict[str, Any]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: Any) -> Undisturbed:
    """The run that most tests disturb, with models loaded by the sites themselves."""
    quiet = World(tmp_path_factory.mktemp("undisturbed"), configured())
    summary = quiet.run()
    assert [site.loads for site in quiet.inside.values()] == [1, 1, 1]
    assert set(quiet.digests().values()) == {summary["state_digest"]}
    unproven = rounds(quiet.out / "ledger.sqlite", proofs=False)
    return Undisturbed(quiet.ledger, unproven, summary["state_digest"], quiet.untimed)


def check(found: World, summary: dict[str, Any], wanted: Undisturbed, proofs: bool = True) -> None:
    """The rounds and the end of an undisturbed run, and nothing less on any site.

    Without `proofs`, reports may have a digest where the undisturbed run had not asked for one:
    while a site catches up, all prove where they are.
    """
    if proofs:
        assert found.ledger == wanted.ledger
    assert rounds(found.out / "ledger.sqlite", proofs=False) == wanted.unproven
    assert summary["state_digest"] == wanted.digest
    assert set(found.digests().values()) == {wanted.digest}


# The simulation's bits.


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
            first.method,
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
        assert not allocate.plan(range(len(names))).matrix.all(), "some block rests somewhere"
    settings = assembly.server_settings(config, first.identity, examples, allocate)
    ledger = Ledger.create(path, {})
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
}


@pytest.mark.parametrize("name", list(METHODS))
def test_sites_and_simulation_have_the_same_bits(tmp_path: Path, name: str) -> None:
    """Entries, reports with their proofs, rates, weights and blocks; and the state at the end."""
    limits = {"a": {"active_blocks": 1}, "b": {"active_blocks": 2}} if name == "zorba" else {}
    changes = {"method__local_steps": 2, "method__batch_size": 2, "federation__rounds": 4}
    config = configured(method__name=name, **changes, **METHODS[name])
    federation = World(tmp_path / "sites", config, limits=limits)
    summary = federation.run()
    assert [site.loads for site in federation.inside.values()] == [1, 1, 1]
    settings = [site.settings for site in federation.inside.values()]
    # Clients in lockstep are the same as each for itself.
    together = 3 if name == "zorba" else 1
    ledger, digest = simulated(config, settings, tmp_path / "ledger", together)
    assert federation.ledger == ledger and len(ledger) == 4
    assert summary["state_digest"] == digest
    assert set(federation.digests().values()) == {digest}
    for site in "abc":
        assert federation.kept(site)["digest"] == digest and federation.kept(site)["rounds"] == 4


class Replay:
    """A link without sites: what sites answered once, again."""

    def __init__(self, recorded: list[tuple[str, Letter, bytes]]) -> None:
        self.recorded = {
            (name, number(asked), asked.kind): (asked, data) for name, asked, data in recorded
        }
        self.out: list[tuple[str, Letter]] = []

    def present(self) -> Sequence[str]:
        return ["a", "b", "c"]

    def send(self, site: str, data: bytes) -> None:
        self.out.append((site, Letter.open(data)))

    def receive(self) -> Sequence[Arrival]:
        out, self.out = self.out, []
        came = []
        for name, letter in out:
            asked, data = self.recorded[name, number(letter), letter.kind]
            assert letter.body == asked.body, "the same is asked"
            came.append(Arrival(name, replace(Letter.open(data), run=letter.run).seal()))
        return came


def test_recorded_reports_make_the_same_ledger(world: Any, undisturbed: Undisturbed) -> None:
    recorded: list[tuple[str, Letter, bytes]] = []
    first = world()

    def record(name: str, letter: Letter, answer: Any) -> bytes:
        data: bytes = answer()
        recorded.append((name, letter, data))
        return data

    first.link.hook = record
    check(first, first.run(), undisturbed)
    second = world()
    second.link = Replay(recorded)
    summary = second.run()
    assert second.ledger == undisturbed.ledger
    assert summary["state_digest"] == undisturbed.digest
    assert second.untimed == first.untimed
    assert all(site.tuning is None for site in second.inside.values()), "no site did anything"


def test_the_order_of_reports_changes_nothing(world: Any, undisturbed: Undisturbed) -> None:
    found = world()

    def last_first(name: str, letter: Letter, answer: Any) -> bytes | None:
        if letter.kind is not Kind.TASK or name == "c":
            return bytes(answer())
        due = found.clock.now + {"a": 2.0, "b": 1.0}[name]
        found.link.later(name, answer(), lambda: found.clock.now >= due)
        return None

    found.link.hook = last_first
    check(found, found.run(), undisturbed)


# Killed and started again.


def kill_at(found: World, kind: Kind, round_: int, name: str) -> None:
    """Kill the coordinator when a site is to answer a letter."""

    def hook(who: str, letter: Letter, answer: Any) -> bytes:
        if (letter.kind, number(letter), who) == (kind, round_, name):
            raise KilledError
        return bytes(answer())

    found.link.hook = hook


def kill_before_the_line(found: World) -> None:
    """Kill it when a round is in the ledger and not yet in the metrics."""

    def look() -> None:
        coordinator = found.coordinator
        if found.round == 3 and coordinator and coordinator.lines[-1]["round"] == 2:
            raise KilledError

    found.clock.look = look


MOMENTS: dict[str, Callable[[World], None]] = {
    "greeting": lambda found: kill_at(found, Kind.GREETING, -1, "b"),
    "evaluating the base": lambda found: kill_at(found, Kind.EVALUATION, 0, "c"),
    "in the first round": lambda found: kill_at(found, Kind.TASK, 0, "c"),
    "in a round": lambda found: kill_at(found, Kind.TASK, 2, "b"),
    "before the line": kill_before_the_line,
    "evaluating": lambda found: kill_at(found, Kind.EVALUATION, 4, "b"),
    "at the farewell": lambda found: kill_at(found, Kind.FAREWELL, 5, "b"),
}


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
        kill_at(found, Kind.TASK, last, "abcab"[last])
        with pytest.raises(KilledError):
            found.run(resume=last > 0)
        found.restart("cabbc"[last])
    found.link.hook = None
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


@pytest.mark.parametrize("how", ["stranger", "behind"])
def test_a_site_that_lost_its_state_in_a_round_is_sent_it_again(
    world: Any, undisturbed: Undisturbed, how: str
) -> None:
    found = world()
    done: list[str] = []

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if letter.kind is Kind.TASK and number(letter) == 3 and name == "b" and not done:
            done.append(name)
            if how == "stranger":
                found.restart("b")
            else:
                found.inside["b"].tuning.replica.reset()
        return bytes(answer())

    found.link.hook = hook
    # In the round after, all prove that they are where the others are.
    check(found, found.run(), undisturbed, proofs=False)
    assert found.link.kinds("b").count(Kind[how.upper()]) == 1
    assert len(found.link.bodies("b", Kind.GREETING)) == 1 + (how == "stranger")
    again = [len(task.entries) for task in found.link.tasks("b") if task.round == 3]
    # The evaluation before the round had brought it there.
    assert again == [1, 3]


def test_sites_that_are_ahead_of_the_ledger_start_again(
    world: Any, undisturbed: Undisturbed
) -> None:
    """The folder was restored from an older copy."""
    found = world()
    copy = found.path / "copy"

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if letter.kind is Kind.TASK and number(letter) == 2 and name == "a":
            shutil.copytree(found.out, copy)
        return bytes(answer())

    found.link.hook = hook
    check(found, found.run(), undisturbed)
    shutil.rmtree(found.out)
    copy.rename(found.out)
    found.link.hook = None
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


# Sites that come and go.


def test_a_site_joins_after_ten_rounds_and_another_leaves(world: Any) -> None:
    found = world(names="abcd", federation__rounds=14, run__evaluate_every=14)

    def away() -> list[str]:
        return ["d"] * (found.round < 10) + ["b"] * (found.round >= 6)

    found.link.away = away
    summary = found.run()
    # It is seen in the eleventh round, enrolled in the twelfth, and has a task after that.
    assert found.clients() == [ALL] * 6 + [[0, 2]] * 6 + [[0, 2, 3]] * 2
    assert found.kept("d")["digest"] == found.kept("a")["digest"] == summary["state_digest"]
    assert found.kept("d")["rounds"] == 14
    assert not (found.path / "b" / "state.json").exists()
    assert found.digests()["b"] != summary["state_digest"]
    # What it missed is in the ledger, and leads to the same state.
    tuning = found.inside["b"].tuning
    ledger = Ledger(found.out / "ledger.sqlite")
    tuning.replica.catch_up(list(ledger.entries()))
    ledger.close()
    assert tuning.model.digest().hex() == summary["state_digest"]
    assert [site["present"] for site in found.status["sites"]] == [True, False, True, True]


def test_a_site_that_comes_back_keeps_its_number(world: Any) -> None:
    found = world(federation__rounds=6)
    found.link.away = lambda: ["b"] if 1 <= found.round < 4 else []
    summary = found.run()
    assert found.clients() == [ALL] + [[0, 2]] * 3 + [ALL] * 2
    assert set(found.digests().values()) == {summary["state_digest"]}
    assert found.inside["b"].loads == 1


def test_a_site_that_is_away_when_the_others_agree_is_asked_later(world: Any) -> None:
    found = world(names="abcd", federation__rounds=4)

    def hook(name: str, letter: Letter, answer: Any) -> bytes | None:
        if letter.kind is Kind.GREETING and name in "bd":
            found.link.later(name, answer(), lambda: found.clock.now > 1001)
            return None
        return bytes(answer())

    found.link.hook = hook
    # It has enrolled when it goes, and three others are there while it is away.
    found.link.away = lambda: ["a"] if found.clock.now > 1000.3 and found.round < 2 else []
    found.run()
    assert found.of("a")["present"] and found.of("a")["number"] is not None
    assert found.digests()["a"] == found.digests()["b"]


def test_a_quorum_is_waited_for_beyond_the_deadline(world: Any) -> None:
    found = world(federation__quorum=2, federation__deadline=1.0, federation__rounds=2)

    def hook(name: str, letter: Letter, answer: Any) -> bytes | None:
        if letter.kind is Kind.TASK and number(letter) == 1 and name != "a":
            due = found.clock.now + 20
            found.link.later(name, answer(), lambda: found.clock.now >= due)
            return None
        return bytes(answer())

    found.link.hook = hook
    found.run()
    assert found.clients() == [ALL] * 2
    assert found.lines[-1]["seconds"] - found.lines[1]["seconds"] >= 19.9


def make_late(found: World, kind: Kind) -> None:
    """Site c answers what it was asked at round 2 only when round 3 is closed."""

    def hook(name: str, letter: Letter, answer: Any) -> bytes | None:
        if letter.kind is kind and number(letter) == 2 and name == "c":
            found.link.later(name, answer(), lambda: found.round == 4)
            return None
        return bytes(answer())

    found.link.hook = hook


def test_a_late_report_is_counted_and_dropped(world: Any) -> None:
    found = world(federation__deadline=5.0, federation__rounds=7)
    make_late(found, Kind.TASK)
    summary = found.run()
    # While it owes an answer it is not asked; only its own round waits for it.
    assert found.clients() == [ALL] * 2 + [[0, 1]] * 2 + [ALL] * 3
    seconds = [line["seconds"] for line in found.lines]
    assert 5.0 <= seconds[3] - seconds[2] < 6.0 and seconds[4] - seconds[3] < 1.0
    assert sum(line.get("clients", {}).get("late", 0) for line in found.lines) == 1
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_a_line_says_how_many_were_asked(world: Any) -> None:
    found = world(federation__deadline=5.0, federation__rounds=4)
    make_late(found, Kind.TASK)
    found.run()
    assert found.lines[3]["clients"] == {"asked": 3, "reported": 2, "late": 0}


def test_a_deadline_ends_an_evaluation(world: Any) -> None:
    found = world(federation__deadline=5.0)
    make_late(found, Kind.EVALUATION)
    summary = found.run()
    assert found.clients() == [ALL] * 2 + [[0, 1]] * 2 + [ALL]
    assert 5.0 <= found.lines[2]["seconds"] - found.lines[1]["seconds"] < 6.5
    assert math.isfinite(found.lines[2]["heldout_loss"])
    assert set(found.digests().values()) == {summary["state_digest"]}


FAILURES: dict[str, tuple[Callable[[Letter], Arrival | bytes], str]] = {
    "lost": (lambda letter: Arrival("b", error="the connection was lost"), "connection was lost"),
    "refused": (lambda letter: Letter(Kind.REFUSAL, letter.run, b"no room").seal(), "no room"),
    "wrong kind": (lambda letter: Letter(Kind.FIGURES, letter.run, b"{}").seal(), "with FIGURES"),
    "garbage": (lambda letter: b"garbage of some length", "not fedforward's"),
    "wrong run": (lambda letter: Letter(Kind.REPORT, bytes(8)).seal(), "another run"),
    "nothing": (lambda letter: Letter(Kind.REPORT, letter.run).seal(), "ends where byte"),
}


@pytest.mark.parametrize("how", list(FAILURES))
def test_a_site_that_fails_again_and_again_stops_nobody(world: Any, how: str) -> None:
    found = world(federation__rounds=3, run__evaluate_every=3)
    failure, words = FAILURES[how]
    notes = []

    def hook(name: str, letter: Letter, answer: Any) -> bytes | Arrival:
        if letter.kind is Kind.EVALUATION and number(letter):
            notes.append(found.coordinator.members["b"].note)
        return failure(letter) if letter.kind is Kind.TASK and name == "b" else answer()

    found.link.hook = hook
    summary = found.run()
    assert found.clients() == [[0, 2]] * 3
    # Then it is left alone for a while.
    assert len(found.link.tasks("b")) == TRIES
    assert words in notes[0]
    # It could still evaluate, for which it was sent what the others have.
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_a_site_that_fails_a_few_times_is_asked_again(world: Any, undisturbed: Undisturbed) -> None:
    found = world()
    asked: list[tuple[Any, ...]] = []

    def hook(name: str, letter: Letter, answer: Any) -> bytes | Arrival:
        key = (name, letter.kind, number(letter))
        asked.append(key)
        if letter.kind in (Kind.TASK, Kind.EVALUATION) and asked.count(key) < TRIES:
            return Arrival(name, error="the connection was lost")
        return bytes(answer())

    found.link.hook = hook
    check(found, found.run(), undisturbed)


def test_all_failing_is_a_sentence(world: Any) -> None:
    found = world()

    def hook(name: str, letter: Letter, answer: Any) -> bytes | Arrival:
        if letter.kind is Kind.TASK and number(letter) == 1:
            return Arrival(name, error="the connection was lost")
        return bytes(answer())

    found.link.hook = hook
    with pytest.raises(QuorumError, match=r"0 of 3 clients have reported"):
        found.run()
    assert found.status["state"] == "failed" and "0 of 3" in found.status["error"]
    found.link.hook = None
    assert found.run(resume=True)["rounds"] == 5


# Sites that are wrong.


@pytest.mark.parametrize("when", [(Kind.TASK, 0), (Kind.EVALUATION, 2)], ids=["task", "evaluation"])
def test_a_site_with_another_state_starts_again(world: Any, when: Any) -> None:
    found = world()
    done: list[str] = []

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if (letter.kind, number(letter)) == when and name == "b" and not done:
            done.append(name)
            found.inside["b"].tuning.model.commit([Update(Steps.of([1], [0.1]), 0)])
        return bytes(answer())

    found.link.hook = hook
    summary = found.run()
    first = when[0] is Kind.TASK
    assert found.clients() == [[0, 2] if first else ALL] + [ALL] * 4
    assert [task.round for task in found.link.tasks("b") if task.reset] == [1 if first else 2]
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_a_site_that_lies_about_its_digest_comes_back(world: Any) -> None:
    found = world()

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        data: bytes = answer()
        if letter.kind is Kind.TASK and number(letter) == 0 and name == "b":
            report = replace(Report.decode(Letter.open(data).body), digest=bytes(16))
            return Letter(Kind.REPORT, letter.run, report.encode()).seal()
        return data

    found.link.hook = hook
    summary = found.run()
    assert found.clients() == [[0, 2]] + [ALL] * 4
    assert set(found.digests().values()) == {summary["state_digest"]}


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place % len(data)] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.parametrize("way", ["up", "down"])
def test_letters_altered_on_their_way_change_nothing(
    world: Any, undisturbed: Undisturbed, way: str
) -> None:
    """The first letter of every kind in every round arrives with a wrong bit."""
    found = world()
    seen: set[tuple[Any, ...]] = set()

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        key = (name, letter.kind, number(letter))
        if key in seen:
            return bytes(answer())
        seen.add(key)
        place = 37 * len(seen) + 11
        if way == "up":
            return flipped(answer(), place)
        return bytes(answer(flipped(letter.seal(), place)))

    found.link.hook = hook
    check(found, found.run(), undisturbed)
    # A site whose enrolment was altered is asked again after a while.
    assert found.clock.now - 1000 > PATIENCE
    assert len(seen) == 3 * (1 + 5 + 4 + 1)
    assert [site.loads for site in found.inside.values()] == [1, 1, 1]


def another_model(found: World, what: str) -> str:
    """The demonstration model with another weight, or with another vocabulary."""
    place = found.path / f"other-{what}"
    shutil.copytree(DEMO_MODEL, place)
    if what == "base":
        from safetensors.torch import load_file, save_file

        tensors = load_file(place / "model.safetensors")
        tensors[min(tensors)].view(-1)[0] += 1
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    else:
        content = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        one, two = [token for token, number in vocabulary.items() if number in (200, 201)]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
        (place / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return str(place)


def other_layout(name: str, letter: Letter, answer: Any) -> bytes:
    """Site d enrols with one tensor more than the others."""
    data: bytes = answer()
    if name != "d" or letter.kind is not Kind.GREETING:
        return data
    mine = Enrolment.decode(Letter.open(data).json())
    old = mine.model.layout
    layout = Layout((*old.names, "~"), (*old.shapes, (2, 2)), old.blocks, (*old.owners, 0))
    other = replace(mine, model=replace(mine.model, layout=layout))
    return Letter(Kind.ENROLMENT, letter.run, other.encode()).seal()


@pytest.mark.parametrize(
    ("what", "early"),
    [("base", True), ("base", False), ("tokenizer", True), ("layout", True), ("layout", False)],
)
def test_a_site_with_another_model_is_dismissed(
    world: Any, undisturbed: Undisturbed, what: str, early: bool
) -> None:
    found = world(names="abcd")
    heard: list[str] = []
    changes = {} if what == "layout" else {"model__path": another_model(found, what)}
    found.inside["d"] = Site(found.settings("d", **changes), heard.append)
    if what == "layout":
        found.link.hook = other_layout
    if not early:
        found.link.away = lambda: ["d"] if found.round < 2 else []
    summary = found.run()
    assert found.ledger == undisturbed.ledger and summary["state_digest"] == undisturbed.digest
    words = {"base": "other weights", "tokenizer": "tokenizer splits", "layout": "other names"}
    (told,) = [text for text in heard if "will not have this site" in text]
    assert words[what] in told and words[what] in found.of("d")["note"]
    # It is not asked again at once.
    assert len(found.link.bodies("d", Kind.GREETING)) == 1 and not found.of("d")["ready"]


def test_a_site_of_another_release_is_told(world: Any, undisturbed: Undisturbed) -> None:
    found = world(names="abcd")
    heard: list[str] = []
    found.inside["d"] = Site(found.settings("d"), heard.append)

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        data: bytes = answer()
        if name != "d" or letter.kind is not Kind.GREETING:
            return data
        content = Letter.open(data).json() | {"direction_version": "0"}
        return Letter(Kind.ENROLMENT, letter.run, packed(content)).seal()

    found.link.hook = hook
    summary = found.run()
    assert found.ledger == undisturbed.ledger and summary["state_digest"] == undisturbed.digest
    (told,) = [text for text in heard if "will not have this site" in text]
    assert "direction version 0" in told and "same release" in found.of("d")["note"]


def test_no_majority_is_a_sentence(world: Any) -> None:
    found = world(names="ad", federation__clients=2)
    found.inside["d"] = found.site("d", model__path=another_model(found, "base"))
    with pytest.raises(FedForwardError, match=r"do not have the same model, .*: a; d\."):
        found.run()
    assert found.status["state"] == "failed" and "a; d" in found.status["error"]
    assert not (found.out / "ledger.sqlite").exists()
    # With the right model it goes on in the same folder.
    found.restart("d")
    assert found.run(resume=True)["rounds"] == 5


def test_a_wrong_site_that_is_first_does_not_end_a_run_that_goes_on(world: Any) -> None:
    found = world(names="abcd")
    found.link.away = lambda: ["d"]
    MOMENTS["in a round"](found)
    found.killed()
    found.inside["d"] = found.site("d", model__path=another_model(found, "base"))
    began = found.clock.now
    found.link.away = lambda: ["a", "b", "c"] if found.clock.now < began + 3 else []
    assert found.run(resume=True)["rounds"] == 5
    assert "other weights" in found.of("d")["note"]


def test_a_site_that_refuses_the_terms_is_left_alone(world: Any, undisturbed: Undisturbed) -> None:
    found = world(names="abcd", limits={"d": {"rounds": 4}})
    summary = found.run()
    assert found.ledger == undisturbed.ledger and summary["state_digest"] == undisturbed.digest
    words = "federation.rounds = 5 is above this site's limits.rounds = 4"
    assert found.of("d")["note"] == words
    assert found.inside["d"].loads == 0
    assert len(found.link.bodies("d", Kind.GREETING)) == 1


def test_a_site_that_refuses_is_asked_again_after_a_while(world: Any) -> None:
    found = world(limits={"c": {"rounds": 4}})

    def mended() -> None:
        if found.clock.now > 1000 + 2.5 * PATIENCE and found.limits:
            found.limits = {}
            found.restart("c")

    found.clock.look = mended
    assert found.run()["rounds"] == 5
    assert len(found.link.bodies("c", Kind.GREETING)) == 4
    assert found.clock.now - 1000 == pytest.approx(3 * PATIENCE, abs=6)


@pytest.mark.parametrize(
    "victim",
    [
        "a",
        "c",
    ],
)
def test_a_report_under_another_sites_number_is_not_used(world: Any, victim: str) -> None:
    """Before the other has reported, or after."""
    found = world(federation__rounds=3)
    forged = np.array([7.0], np.float32)

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        data: bytes = answer()
        if letter.kind is Kind.TASK and number(letter) == 1 and name == "b":
            report = Report.decode(Letter.open(data).body)
            report = replace(report, client="abc".index(victim), gradients=forged)
            return Letter(Kind.REPORT, letter.run, report.encode()).seal()
        return data

    found.link.hook = hook
    found.run()
    assert found.clients() == [ALL, [0, 2], ALL]
    ledger = Ledger(found.out / "ledger.sqlite")
    used = [origin.report for origin in list(ledger.rounds())[1].origins]
    ledger.close()
    assert not any((report.gradients == forged).all() for report in used)
    assert len(found.link.tasks("b")) == 2 + TRIES


BAD_FIGURES: dict[str, Any] = {
    "metrics are a list": {"metrics": [1, 2]},
    "metrics are text": {"metrics": "good"},
    "tokens are text": {"tokens": "many"},
    "tokens are infinite": {"tokens": math.inf},
    "tokens are missing": {"tokens": None},
    "the loss is text": {"heldout_loss": "low"},
    "the loss is huge": {"heldout_loss": 10**400},
    "the loss is not a number": {"heldout_loss": math.nan},
}


@pytest.mark.parametrize("what", list(BAD_FIGURES))
def test_figures_that_are_none_end_nothing(world: Any, what: str) -> None:
    """The others' figures are what they are; nothing that one site sends ends the run."""
    found = world(evaluation__metrics=["perplexity"], federation__rounds=3)

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        data: bytes = answer()
        if letter.kind is Kind.EVALUATION and number(letter) == 2 and name == "a":
            figures = {**Letter.open(data).json(), **BAD_FIGURES[what]}
            return Letter(Kind.FIGURES, letter.run, json.dumps(figures).encode()).seal()
        return data

    found.link.hook = hook
    assert found.run()["rounds"] == 3
    assert math.isfinite(found.lines[2]["heldout_loss"])


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 200_000,
    ],
    ids=["empty", "list", "noise", "deep"],
)
@pytest.mark.parametrize("kind", [Kind.GREETING, Kind.EVALUATION])
def test_json_that_is_none_ends_nothing(world: Any, kind: Kind, body: bytes) -> None:
    found = world(names="abcd", federation__rounds=2)

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if name == "d" and letter.kind is kind:
            wanted = Kind.ENROLMENT if kind is Kind.GREETING else Kind.FIGURES
            return Letter(wanted, letter.run, body).seal()
        return bytes(answer())

    found.link.hook = hook
    assert found.run()["rounds"] == 2
    if kind is Kind.GREETING:
        assert found.clients() == [ALL] * 2 and "refused" in found.of("d")["note"]
    else:
        assert found.clients() == [[0, 1, 2, 3]] * 2


def test_an_enrolment_that_is_no_text_ends_nothing(world: Any) -> None:
    """Half a surrogate pair is legal JSON, and cannot be written to a file."""
    found = world(names="abcd", federation__rounds=2)

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        data: bytes = answer()
        if name == "d" and letter.kind is Kind.GREETING:
            content = Letter.open(data).json()
            content["name"] = content["model"]["base"] = "\ud800"
            content["model"]["layout"][2][0] = "\ud800"
            return Letter(Kind.ENROLMENT, letter.run, packed(content)).seal()
        return data

    found.link.hook = hook
    assert found.run()["rounds"] == 2
    assert found.clients() == [ALL] * 2 and not found.of("d")["ready"]


def test_behind_in_answer_to_a_greeting_ends_nothing(world: Any) -> None:
    found = world()
    MOMENTS["in a round"](found)
    found.killed()
    done: list[str] = []

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if letter.kind is Kind.GREETING and name == "a" and not done:
            done.append(name)
            return Letter(Kind.BEHIND, letter.run, packed({"rounds": 0})).seal()
        return bytes(answer())

    found.link.hook = hook
    assert found.run(resume=True)["rounds"] == 5


@pytest.mark.parametrize("kind", [Kind.STRANGER, Kind.BEHIND, Kind.GREETING, Kind.REFUSAL])
def test_letters_that_nobody_asked_for_change_nothing(
    world: Any, undisturbed: Undisturbed, kind: Kind
) -> None:
    found = world(names="abcd", limits={"d": {"rounds": 4}})

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if name == "a" and letter.kind is Kind.TASK:
            body = packed({"rounds": 2**70})
            found.link.later("d", Letter(kind, letter.run, body).seal(), lambda: True)
            found.link.later("nobody", b"", lambda: True)
        return bytes(answer())

    found.link.hook = hook
    summary = found.run()
    assert found.ledger == undisturbed.ledger and summary["state_digest"] == undisturbed.digest


def test_a_participant_that_fails_for_a_while_does_not_end_the_run(world: Any) -> None:
    """The sample of each round is a function of who is there, and it is one of them."""
    found = world(federation__participation=0.34, federation__rounds=6)

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if name == "c" and letter.kind is Kind.TASK:
            return Letter(Kind.REFUSAL, letter.run, b"out of memory").seal()
        return bytes(answer())

    found.link.hook = hook
    assert found.run()["rounds"] == 6
    assert 2 not in [client for clients in found.clients() for client in clients]
    assert found.of("c")["note"] == "out of memory" or found.of("c")["note"] == ""


def test_a_participant_that_is_silent_is_replaced_after_the_deadline(world: Any) -> None:
    found = world(
        names="abcd",
        federation__clients=4,
        federation__participation=0.5,
        federation__quorum=2,
        federation__rounds=6,
        federation__deadline=5.0,
    )

    def hook(name: str, letter: Letter, answer: Any) -> bytes | None:
        return None if name == "c" and letter.kind is Kind.TASK else bytes(answer())

    found.link.hook = hook
    assert found.run()["rounds"] == 6
    assert all(2 not in clients and len(clients) == 2 for clients in found.clients())


def test_two_that_disagree_start_again(world: Any, undisturbed: Undisturbed) -> None:
    """Of two, none is right by majority; from the base both come to the same."""
    found = world(names="ab", federation__clients=2)
    done: list[str] = []

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if (letter.kind, number(letter)) == (Kind.EVALUATION, 2) and name == "b" and not done:
            done.append(name)
            found.inside["b"].tuning.model.commit([Update(Steps.of([1], [0.1]), 0)])
        return bytes(answer())

    found.link.hook = hook
    summary = found.run()
    assert found.clients() == [[0, 1]] * 5
    assert [task.round for task in found.link.tasks("a") if task.reset] == [2]
    assert set(found.digests().values()) == {summary["state_digest"]}
    assert "heldout_loss" not in found.lines[2]


def test_who_must_start_again_is_remembered_over_a_kill(world: Any) -> None:
    found = world(federation__rounds=5)
    done: list[str] = []

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if (letter.kind, number(letter)) == (Kind.EVALUATION, 2) and name == "b" and not done:
            done.append(name)
            found.inside["b"].tuning.model.commit([Update(Steps.of([1], [0.1]), 0)])
        if (letter.kind, number(letter)) == (Kind.TASK, 2):
            raise KilledError
        return bytes(answer())

    found.link.hook = hook
    found.killed()
    summary = found.run(resume=True)
    assert [task.round for task in found.link.tasks("b") if task.reset] == [2]
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
    found.link.away = lambda: ["c", "d"] if found.round < 5 else []

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if letter.kind is Kind.SNAPSHOT_WANTED and name == "a":
            # A lie that fits itself: the tuned state is really changed.
            found.inside["a"].tuning.model.commit([Update(Steps.of([1], [0.1]), 0)])
            found.inside["a"].tuning.replica._digest = (-1, b"")
        return bytes(answer())

    found.link.hook = hook
    summary = found.run()
    result = artefacts.verify(found.out, str(DEMO_MODEL))
    assert result.state_digest == summary["state_digest"]
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_blocks_in_turn_where_not_all_can_be_perturbed(world: Any) -> None:
    limits = {"a": {"active_blocks": 2}, "b": {"active_blocks": 1}}
    found = world(
        names="ab", method__name="zorba", limits=limits, federation__clients=2, federation__rounds=6
    )
    done: list[str] = []

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if letter.kind is Kind.TASK and number(letter) == 2 and name == "a" and not done:
            done.append(name)
            found.limits["a"] = {"active_blocks": 1}
            found.restart("a")
        return bytes(answer())

    found.link.hook = hook
    assert found.run()["rounds"] == 6
    ledger = Ledger(found.out / "ledger.sqlite")
    last = [
        [unpack_blocks(o.blocks, 3).tolist() for o in record.origins] for record in ledger.rounds()
    ][3:]
    ledger.close()
    assert all(sum(row) == 1 for rows in last for row in rows)
    assert np.any([row for rows in last for row in rows], axis=0).all()


# Blocks and snapshots.

#: Few tuned tensors and many scalars a round.
SNAPSHOTS_PAY: dict[str, Any] = {
    "lora__rank": 1,
    "lora__targets": ["v_proj"],
    "model__blocks": [0],
    "method__directions": 20,
    "method__learning_rate": 1e-5,
}


def test_blocks_are_planned_again_for_whoever_is_there(world: Any) -> None:
    """While a site with few blocks is away, the others have all between them."""
    limits = {"a": {"active_blocks": 1}, "b": {"active_blocks": 2}}
    found = world(method__name="zorba", limits=limits, federation__rounds=6)
    found.link.away = lambda: ["a"] if 1 <= found.round < 4 else []
    summary = found.run()
    ledger = Ledger(found.out / "ledger.sqlite")
    active = [
        {o.report.client: unpack_blocks(o.blocks, 3) for o in record.origins}
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
    found.link.away = lambda: ["a"] if 1 <= found.round < 4 else []
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
    found.link.away = lambda: ["d"] if found.round < 5 else []

    def hook(name: str, letter: Letter, answer: Any) -> bytes | None:
        return None if hangs and letter.kind is Kind.SNAPSHOT_WANTED else bytes(answer())

    found.link.hook = hook
    summary = found.run()
    assert sum(kind is Kind.SNAPSHOT_WANTED for _, kind, _ in found.link.sent) >= 1
    task = found.link.tasks("d")[0]
    assert bool(task.snapshot) is not hangs
    assert found.digests()["d"] == summary["state_digest"]


def test_a_wrong_snapshot_is_not_sent_again(world: Any) -> None:
    found = world(
        names="abcd",
        **SNAPSHOTS_PAY,
        federation__rounds=9,
        run__evaluate_every=9,
    )
    found.link.away = lambda: ["d"] if found.round < 5 else []

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        data: bytes = answer()
        if letter.kind is not Kind.SNAPSHOT_WANTED or name != "a":
            return data
        snapshot = Snapshot.decode(Letter.open(data).body)
        wrong = replace(snapshot, data=bytes(len(snapshot.data)))
        return Letter(Kind.SNAPSHOT, letter.run, wrong.encode()).seal()

    found.link.hook = hook
    summary = found.run()
    givers = [who for who, kind, _ in found.link.sent if kind is Kind.SNAPSHOT_WANTED]
    # It says that it is another's than its bytes are, so whoever is sent it refuses it.
    assert givers[0] == "a" and givers.count("a") == 1
    assert Kind.REFUSAL in found.link.kinds("d")
    assert len([task for task in found.link.tasks("d") if task.snapshot]) <= 2
    assert found.digests()["d"] == summary["state_digest"]
    assert found.clients()[-1] == [0, 1, 2, 3]


# What is written down, and asked for from outside.


def test_a_stop_file_stops_and_the_run_goes_on_later(world: Any, undisturbed: Undisturbed) -> None:
    found = world()

    def hook(name: str, letter: Letter, answer: Any) -> bytes:
        if letter.kind is Kind.TASK and number(letter) == 2:
            (found.out / "stop").touch()
        return bytes(answer())

    found.link.hook = hook
    with pytest.raises(Stopped, match="asked to stop"):
        found.run()
    assert not (found.out / "stop").exists()
    assert found.status["state"] == "stopped" and "asked to stop" in found.status["error"]
    assert len(found.ledger) == 3
    found.link.hook = None
    # One that was left over from before asks for nothing.
    (found.out / "stop").touch()
    check(found, found.run(resume=True), undisturbed)
    assert found.status["state"] == "finished" and found.status["error"] == ""


def test_a_named_site_evaluates_alone_and_may_disappear(
    world: Any, undisturbed: Undisturbed
) -> None:
    found = world(evaluation__site="b")
    found.link.away = lambda: ["b"] if found.round >= 3 else []
    summary = found.run()
    assert found.clients() == [ALL] * 3 + [[0, 2]] * 2
    assert found.ledger[:3] == undisturbed.ledger[:3]
    assert {who for who, kind, _ in found.link.sent if kind is Kind.EVALUATION} == {"b"}
    losses = {
        n: line["heldout_loss"] for n, line in enumerate(found.lines) if "heldout_loss" in line
    }
    figures = [json.loads(body) for _, kind, body in found.link.answers if kind is Kind.FIGURES]
    assert [losses[0], losses[2]] == [figure["heldout_loss"] for figure in figures[:2]]
    assert losses[0] != undisturbed.lines[0]["heldout_loss"]
    assert set(losses) <= {0, 2, 5} and losses.get(5) is None
    assert summary["rounds"] == 5 and summary["state_digest"] == found.digests()["a"]


def test_figures_are_weighted_by_what_they_were_measured_on(world: Any) -> None:
    """Losses by answer tokens, other metrics by examples, perplexity from the whole."""
    metrics = ["perplexity", "f1"]
    found = world(
        evaluation__metrics=metrics,
        data__answer_tokens=4,
        federation__rounds=1,
        data__prompt=PROMPT.lstrip("# "),
    )
    found.inside["b"] = found.site("b", data__heldout=6.0)
    found.run()
    answers = [json.loads(body) for _, kind, body in found.link.answers if kind is Kind.FIGURES][:3]
    assert [answer["examples"] for answer in answers] == [2, 6, 2]
    tokens = [answer["tokens"] for answer in answers]
    loss = np.dot(tokens, [answer["heldout_loss"] for answer in answers]) / sum(tokens)
    f1 = np.dot([2, 6, 2], [answer["metrics"]["f1"] for answer in answers]) / 10
    line = found.lines[0]
    assert line["heldout_loss"] == pytest.approx(loss, rel=1e-12)
    assert line["metrics"]["perplexity"] == pytest.approx(np.exp(loss))
    assert line["metrics"]["f1"] == pytest.approx(f1)


def test_the_status_is_whole_json_at_every_moment(world: Any) -> None:
    found = world(names="abcd", limits={"d": {"rounds": 4}})
    seen: list[dict[str, Any]] = []

    def hook(name: str, letter: Letter, answer: Any) -> bytes | None:
        if (found.out / "status.json").exists():
            seen.append(found.status)
        if letter.kind is Kind.TASK and name == "c":
            due = found.clock.now + 3
            found.link.later(name, answer(), lambda: found.clock.now > due)
            return None
        return bytes(answer())

    found.link.hook = hook
    summary = found.run()
    seen.append(found.status)
    for status in seen:
        assert status["state"] in ("running", "finished") and status["what"]
        assert status["rounds"] == 5 and 0 <= status["round"] <= 5
        assert status["run"] == found.coordinator.papers.run.hex() and status["pid"]
        for site in status["sites"]:
            wanted = {"name", "number", "examples", "ready", "present", "pending", "note"}
            assert wanted <= site.keys()
    waiting = [s for status in seen for s in status["sites"] if s["pending"] == "task"]
    assert {s["name"] for s in waiting} == {"c"} and max(s["waiting"] for s in waiting) >= 1.0
    assert [status["round"] for status in seen] == sorted(status["round"] for status in seen)
    end = seen[-1]
    assert (end["state"], end["round"]) == ("finished", 5)
    assert end["heldout_loss"] == summary["heldout_loss"]["end"]
    assert [site["number"] for site in end["sites"]] == [0, 1, 2, None]
    assert [site["rounds"] for site in end["sites"]] == [5, 5, 5, 0]
    assert [site.get("holds") for site in end["sites"]] == [5, 5, 5, None]
    assert "limits.rounds" in end["sites"][3]["note"]


def test_a_run_that_diverges_says_so(world: Any) -> None:
    found = world(method__learning_rate=1e3)
    with pytest.raises(DivergenceError, match=r"Lower method\.learning_rate"):
        found.run()
    assert found.status["state"] == "failed"
    assert json.loads((found.out / "summary.json").read_text())["stopped"].startswith("diverged")


def test_a_site_answers_whatever_it_is_sent(world: Any) -> None:
    """A sentence and no exception, for letters that make no sense to it."""
    site: Site = world().inside["a"]
    run = b"whatever"
    assert Letter.open(site.answer(b"noise")).kind is Kind.REFUSAL
    for kind in Kind:
        answer = Letter.open(site.answer(Letter(kind, run, b"{}").seal()))
        expected = {Kind.GREETING: Kind.REFUSAL, Kind.DISMISSAL: Kind.FIGURES}
        assert answer.kind is expected.get(kind, Kind.STRANGER) and answer.run == run
    greeting = packed({"terms": wire(terms(configured()))})
    enrolment = site.answer(Letter(Kind.GREETING, run, greeting).seal())
    assert Letter.open(enrolment).kind is Kind.ENROLMENT
    for kind in (Kind.TASK, Kind.EVALUATION, Kind.FAREWELL, Kind.REPORT, Kind.FIGURES):
        answer = Letter.open(site.answer(Letter(kind, run, b"nonsense").seal()))
        assert answer.kind is Kind.REFUSAL and "refused" in answer.text()
    assert site.tuning is not None and site.tuning.replica.rounds == 0
    with pytest.raises(MessageError):
        Task.decode(b"nonsense")
