"""Small sites and a transport in one process, for tests of a run that goes well."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedforward.config import site as sites
from fedforward.config.loading import validate_as
from fedforward.config.schema import Config
from fedforward.demo.text import ANSWER, PROMPT, site_examples
from fedforward.deployment.coordinator import Coordinator
from fedforward.deployment.site import Site
from fedforward.deployment.transport import Reply
from fedforward.federation.ledger import Ledger
from fedforward.messages.envelope import Envelope
from tests.conftest import DEMO_MODEL


class Clock:
    """Time that passes when someone waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Direct:
    """A transport that hands messages over, each to be answered when it is asked for.

    `tamper` may change an answer, or hold it back with None.
    """

    def __init__(self, parties: dict[str, Site]) -> None:
        self.parties = dict(parties)
        self.outbox: list[tuple[str, bytes]] = []
        self.held: list[Reply] = []
        self.tamper: Callable[[str, Envelope, bytes], bytes | None] = lambda name, message, data: (
            data
        )
        self.looks = 0
        self.each_look: Callable[[int], None] = lambda number: None

    def present(self) -> Sequence[str]:
        self.looks += 1
        self.each_look(self.looks)
        return list(self.parties)

    def send(self, site: str, data: bytes) -> None:
        self.outbox.append((site, data))

    def receive(self) -> Sequence[Reply]:
        sent, self.outbox = self.outbox, []
        answers = []
        for name, data in sent:
            if name not in self.parties:
                answers.append(Reply(name, error="it is gone"))
                continue
            answer = self.tamper(name, Envelope.decode(data), self.parties[name].answer(data))
            if answer is None:
                self.outbox.append((name, data))
            else:
                answers.append(Reply(name, answer))
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
        "limits": {"fields": list(rows[0]), "heldout": 1},
    }
    for key, value in changes.items():
        section, _, rest = key.partition("__")
        content.setdefault(section, {})[rest] = value
    return validate_as(sites.SiteConfig, content, "site.toml")


def party(folder: Path, name: str, **changes: Any) -> Site:
    return Site(site_config(folder, name, **changes))


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


def carry_out(settings: Config, out: Path, transport: Direct, **options: Any) -> dict[str, Any]:
    clock = Clock()
    coordinator = Coordinator(settings, out, transport, clock=clock, sleep=clock.sleep, **options)
    return coordinator.run().to_json()


def rounds(out: Path) -> list[tuple[bytes, list[bytes]]]:
    ledger = Ledger(out / "ledger.sqlite")
    found = [(r.entry.encode(), [o.encode() for o in r.results]) for r in ledger.rounds()]
    ledger.close()
    return found
