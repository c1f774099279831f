"""What live targets act on: a server without a disk, a site on a quadratic, one sum of sites."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedforward.directions import Distribution, Layout
from fedforward.federation.learning_rates import RateSettings
from fedforward.federation.ledger import Ledger, Round
from fedforward.federation.server import Server, ServerSettings
from fedforward.messages.entry import Entry
from fedforward.messages.report import Report
from fedforward.methods.decomfl import DeComFL
from fedforward.methods.estimators import TwoPoint

STEPS, DIRECTIONS, CLIENTS, SEED = 2, 1, 3, 5
LAYOUT = Layout.of({"0.a": (8,), "1.a": (8,)}, {"0": ["0.a"], "1": ["1.a"]})
HEADER = json.dumps({"format": 7, "run_seed": SEED})


def method() -> DeComFL:
    """Shared directions: the method whose entries are made again from reports."""
    return DeComFL(run_seed=SEED, local_steps=STEPS, estimator=TwoPoint(DIRECTIONS, 1e-2))


def settings() -> ServerSettings:
    """Of a server with three clients."""
    return ServerSettings(
        run_seed=SEED,
        examples=(10, 20, 30),
        participation=1.0,
        weights="examples",
        weight_ratio=10.0,
        weight_share=0.5,
        rates=RateSettings(1e-2, 0.0, "fixed", "constant", 0, 10, 1.0),
        layout=LAYOUT,
        distribution=Distribution.GAUSSIAN,
        quorum=2,
        deadline=math.inf,
        state_bytes=4 * LAYOUT.parameters,
    )


class MemoryLedger:
    """The part of a ledger that a server uses, in memory; see `Ledger`."""

    path = Path("memory.sqlite")

    def __init__(self) -> None:
        self.records: list[Round] = []

    @property
    def length(self) -> int:
        return len(self.records)

    def rounds(self, begin: int = 0, end: int | None = None) -> Iterator[Round]:
        return iter(self.records[begin:end])

    def entries(self, begin: int = 0, end: int | None = None) -> Iterator[Entry]:
        return (record.entry for record in self.records[begin:end])

    def remaining_rounds(self, end: int | None = None) -> Iterator[Round]:
        return Ledger.remaining_rounds(self, end)  # type: ignore[arg-type]

    def check(self, record: Round) -> None:
        Ledger.check(self, record)  # type: ignore[arg-type]

    def append(self, record: Round) -> None:
        self.check(record)
        record.entry.encode()
        record.origin()
        self.records.append(record)


def server() -> Server:
    """A server before its first round, whose round is then opened."""
    made: Any = MemoryLedger()
    return Server(settings(), method(), made)


def report(client: int, round_number: int = 0, **changes: Any) -> Report:
    """A report that the server of `settings` takes."""
    values: dict[str, Any] = {
        "round": round_number,
        "client": client,
        "examples": 10 * (client + 1),
        "loss": 1.0,
        "skipped": 0,
        "gradients": np.array([0.5, -0.25], np.float32),
        "digest": bytes(16),
    }
    return Report(**{**values, **changes})
