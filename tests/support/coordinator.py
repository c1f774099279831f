"""A coordinator and its sites in one process, for tests of what goes wrong between them.

Sites, messages, ledger and models are the real ones; only the transport and the clock are not.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fedforward.config import site as sites
from fedforward.config.loading import validate, validate_as
from fedforward.config.schema import Config
from fedforward.config.site import SiteConfig
from fedforward.demo.text import ANSWER, PROMPT, site_examples
from fedforward.deployment.coordinator import Coordinator
from fedforward.deployment.site import Site
from fedforward.deployment.transport import Reply
from fedforward.federation.ledger import Ledger
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.task import Task
from tests.conftest import DEMO_MODEL

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

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 1400.0:
            raise AssertionError("the coordinator waits for ever")


#: From a site's name, the message to it, and what the site replies to any, to what comes back;
#: None where nothing does.
Hook = Callable[[str, Envelope, Callable[..., bytes]], bytes | Reply | None]


class InProcess:
    """A transport to sites in this process; `hook` stands between them and the coordinator."""

    def __init__(self, inside: dict[str, Site], hook: Hook | None = None) -> None:
        self.inside = inside
        self.hook = hook
        self.away: Callable[[], Sequence[str]] = lambda: ()
        self.out: list[tuple[str, bytes]] = []
        self.kept: list[tuple[Callable[[], bool], Reply]] = []
        self.sent: list[tuple[str, MessageKind, bytes]] = []
        self.answers: list[tuple[str, MessageKind, bytes]] = []

    def present(self) -> Sequence[str]:
        return [name for name in self.inside if name not in self.away()]

    def send(self, site: str, data: bytes) -> None:
        self.out.append((site, data))

    def receive(self) -> Sequence[Reply]:
        came = [reply for when, reply in self.kept if when()]
        self.kept = [(when, reply) for when, reply in self.kept if not when()]
        out, self.out = self.out, []
        for name, data in out:
            message = Envelope.decode(data)
            self.sent.append((name, message.kind, message.body))
            if name in self.away():
                came.append(Reply(name, error="the connection was lost"))
                continue

            def answer(changed: bytes = data, name: str = name) -> bytes:
                encoded = self.inside[name].answer(changed)
                decoded = Envelope.decode(encoded)
                self.answers.append((name, decoded.kind, decoded.body))
                return encoded

            found = self.hook(name, message, answer) if self.hook else answer()
            if found is not None:
                came.append(found if isinstance(found, Reply) else Reply(name, found))
        return came

    def later(self, name: str, data: bytes, when: Callable[[], bool]) -> None:
        """Let an answer come when something holds."""
        self.kept.append((when, Reply(name, data)))

    def bodies(self, name: str, kind: MessageKind) -> list[bytes]:
        """What a site was sent."""
        return [body for who, what, body in self.sent if (who, what) == (name, kind)]

    def tasks(self, name: str) -> list[Task]:
        return [Task.decode(body) for body in self.bodies(name, MessageKind.TASK)]

    def kinds(self, name: str) -> list[MessageKind]:
        """What a site answered."""
        return [kind for who, kind, _ in self.answers if who == name]


def number(message: Envelope) -> int:
    """The round of a message that is a task, or -1."""
    tasks = (MessageKind.TASK, MessageKind.EVALUATION, MessageKind.FINALIZE)
    return Task.decode(message.body).round if message.kind in tasks else -1


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
        self.transport = InProcess(self.inside, self.hook)
        self.coordinator: Coordinator | None = None

    def settings(self, name: str, **changes: Any) -> SiteConfig:
        rows = self.path / f"{name}.jsonl"
        rows.write_text("".join(json.dumps(r) + "\n" for r in PARTS[name]), encoding="utf-8")
        content: dict[str, dict[str, Any]] = {
            "site": {"name": name, "out": str(self.path / name)},
            "model": {"path": str(DEMO_MODEL)},
            "data": {"source": str(rows)},
            "run": {"threads": 1, "device": "cpu"},
            "limits": {"fields": list(ROWS[0]), "heldout": 1, **self.limits.get(name, {})},
        }
        for key, value in changes.items():
            section, _, part = key.partition("__")
            content[section][part] = value
        return validate_as(SiteConfig, content, "site.toml")

    def site(self, name: str, **changes: Any) -> Site:
        return Site(self.settings(name, **changes))

    def restart(self, *names: str) -> None:
        """The sites' processes end, and begin anew."""
        for name in names:
            self.inside[name] = self.site(name)

    def run(self, resume: bool = False, config: Config | None = None) -> dict[str, Any]:
        """A coordinator's process, up to its end."""
        self.transport.out, self.transport.kept = [], []
        self.coordinator = Coordinator(
            config or self.config,
            self.out,
            self.transport,
            resume=resume,
            clock=self.clock,
            sleep=self.clock.sleep,
        )
        try:
            return self.coordinator.run().to_json()
        finally:
            if self.coordinator.server is not None:
                self.coordinator.server.ledger.close()

    def killed(self) -> None:
        """A coordinator's process that does not end well; then what killed it is gone."""
        with pytest.raises(KilledError):
            self.run()
        self.transport.hook, self.clock.look = None, lambda: None

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
        found = [[o.report.client for o in record.results] for record in ledger.rounds()]
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
        origins = record.results
        if not proofs:
            origins = tuple(replace(o, report=replace(o.report, digest=b"")) for o in origins)
        total = b"" if record.total is None else record.total.encode()
        parts = (record.entry.encode(), total, *(origin.encode() for origin in origins))
        found.append(parts)
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


@dataclass
class Undisturbed:
    """What a run is without any trouble."""

    ledger: list[tuple[bytes, ...]]
    unproven: list[tuple[bytes, ...]]
    digest: str
    lines: list[dict[str, Any]]


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


def kill_at(found: World, kind: MessageKind, round_: int, name: str) -> None:
    """Kill the coordinator when a site is to answer a message."""

    def hook(who: str, message: Envelope, answer: Any) -> bytes:
        if (message.kind, number(message), who) == (kind, round_, name):
            raise KilledError
        return bytes(answer())

    found.transport.hook = hook


def kill_before_the_line(found: World) -> None:
    """Kill it when a round is in the ledger and not yet in the metrics."""

    def look() -> None:
        coordinator = found.coordinator
        if (
            found.round == 3
            and coordinator
            and coordinator.loop
            and coordinator.loop.lines[-1]["round"] == 2
        ):
            raise KilledError

    found.clock.look = look


MOMENTS: dict[str, Callable[[World], None]] = {
    "hello": lambda found: kill_at(found, MessageKind.HELLO, -1, "b"),
    "evaluating the base": lambda found: kill_at(found, MessageKind.EVALUATION, 0, "c"),
    "in the first round": lambda found: kill_at(found, MessageKind.TASK, 0, "c"),
    "in a round": lambda found: kill_at(found, MessageKind.TASK, 2, "b"),
    "before the line": kill_before_the_line,
    "evaluating": lambda found: kill_at(found, MessageKind.EVALUATION, 4, "b"),
    "finalizing": lambda found: kill_at(found, MessageKind.FINALIZE, 5, "b"),
}


def make_late(found: World, kind: MessageKind) -> None:
    """Site c answers what it was asked at round 2 only when round 3 is closed."""

    def hook(name: str, message: Envelope, answer: Any) -> bytes | None:
        if message.kind is kind and number(message) == 2 and name == "c":
            found.transport.later(name, answer(), lambda: found.round == 4)
            return None
        return bytes(answer())

    found.transport.hook = hook


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


#: Few tuned tensors and many scalars a round.
SNAPSHOTS_PAY: dict[str, Any] = {
    "lora__rank": 1,
    "lora__targets": ["v_proj"],
    "model__blocks": [0],
    "method__directions": 20,
    "method__learning_rate": 1e-5,
}
