"""One coordinator and as many sites as asked for: seconds, bytes and memory of a round.

    python benchmarks/many_sites.py [--sites 100 1000 10000] [--json]

The coordinator, its letters, its ledger and its files are the real ones; sites are stand-ins in
the same process that enrol, report random projected gradients and evaluate at once, so that what
is timed is what the server itself costs. H = 10, three rounds, and an evaluation at the end, for
which every site is sent what it lacks. `fedmezo` has directions of its own for each client, so that
every client is sent every other's scalars; `decomfl` shares them, so that a round is H scalars
however many clients there are. Beyond `--most-bytes` of downlink a round, the sites of a `fedmezo`
round are sampled (participation), as the table says. `late` is a site that joins after `--late`
rounds of the same kind: bytes that it is sent. No PyTorch is imported.
"""

import argparse
import hashlib
import json
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedforward.config import site as sites
from fedforward.config.loading import validate
from fedforward.core.identity import ModelIdentity
from fedforward.deployment.coordinator import Coordinator
from fedforward.deployment.participants import Traffic
from fedforward.deployment.transport import Arrival
from fedforward.directions import Layout
from fedforward.messages.codec import HEADER
from fedforward.messages.envelope import Enrolment, Kind, Letter, packed
from fedforward.messages.report import DIGEST_BYTES, Report
from fedforward.messages.task import Task

STEPS = 10
#: Llama-3B's LoRA of rank 128 on q and v, as in FedMeZO's setting.
LAYOUT = Layout.of({"0.A": (128, 3200), "0.B": (3200, 128)}, {"0": ["0.A", "0.B"]})
IDENTITY = ModelIdentity(LAYOUT, base="00" * 32, classes=(), state_bytes=4 * LAYOUT.parameters)


def state(rounds: int) -> bytes:
    """Stands for the digest of the tuned state after so many rounds."""
    return hashlib.sha256(struct.pack("<I", rounds)).digest()


class StandIns:
    """A link to sites that have no model; counts what passes while a round is open."""

    def __init__(self, sites: int) -> None:
        self.names = [f"site-{number:05}" for number in range(sites)]
        self.out: list[tuple[str, bytes]] = []
        self.random = np.random.default_rng(0)
        self.spent = 0.0  # by the stand-ins themselves

    def present(self) -> Sequence[str]:
        return self.names

    def send(self, site: str, data: bytes) -> None:
        self.out.append((site, data))

    def receive(self) -> Sequence[Arrival]:
        began = time.monotonic()
        out, self.out = self.out, []
        arrived = [Arrival(name, self._answer(Letter.open(data))) for name, data in out]
        self.spent += time.monotonic() - began
        return arrived

    def _answer(self, letter: Letter) -> bytes:
        if letter.kind is Kind.GREETING:
            body = Enrolment("", IDENTITY, examples=100, heldout=10, rounds=0).encode()
            return Letter(Kind.ENROLMENT, letter.run, body).seal()
        # Its head is enough; what follows would be read at ten thousand sites, not at one.
        number, client, _, wanted, *_ = Task.plan()[0].unpack_from(letter.body, HEADER.size)
        if letter.kind is Kind.TASK:
            digest = state(number)[:DIGEST_BYTES] if wanted else b""
            gradients = self.random.standard_normal(STEPS).astype(np.float32)
            report = Report(number, client, 100, 1.0, 0, gradients, digest)
            return Letter(Kind.REPORT, letter.run, report.encode()).seal()
        figures = {"rounds": number, "digest": state(number).hex(), "examples": 10}
        figures |= {"tokens": 100, "heldout_loss": 1.0}
        return Letter(Kind.FIGURES, letter.run, packed(figures)).seal()


def measure(method: str, sites_: int, participation: float, late: int) -> dict[str, Any]:
    """One row; see the module."""
    content: dict[str, dict[str, Any]] = {
        "model": {"path": sites.AT_SITES},
        "data": {"source": sites.AT_SITES, "prompt": "{a}", "answer": "{b}"},
        "federation": {"clients": sites_, "rounds": 3, "participation": participation},
        "method": {"name": method, "local_steps": STEPS, "learning_rate": 1e-6, "mu": 1e-3},
        "run": {"evaluate_every": 3},
    }
    config = validate(content)
    link = StandIns(sites_)
    rounds: list[dict[str, float]] = []

    class Timed(Coordinator):
        def _round(self) -> Any:
            spent, began = link.spent, time.monotonic()
            assert self.members.traffic == Traffic()
            record = super()._round()
            traffic = self.members.traffic
            seconds = time.monotonic() - began - (link.spent - spent)
            rounds.append({"seconds": seconds, "up": traffic.up, "down": traffic.down})
            return record

    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        coordinator = Timed(config, Path(folder) / "run", link, pause=lambda seconds: None)
        coordinator.run()
        whole = time.monotonic() - began - link.spent
        entry = coordinator._server.entry_bytes
    assert "torch" not in sys.modules
    last = rounds[-1]
    asked = max(1, round(participation * sites_))
    return {
        "method": method,
        "sites": sites_,
        "asked": asked,
        "round seconds": last["seconds"],
        "whole seconds": whole,
        "up bytes": last["up"] / asked,
        "down bytes": last["down"] / asked,
        "round MB": (last["up"] + last["down"]) / 1e6,
        "late MB": late * entry / 1e6,
        "process MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--sites", type=int, nargs="+", default=[100, 1000, 10000])
    made.add_argument("--most-bytes", type=float, default=5e7, help="downlink of a fedmezo round")
    made.add_argument("--late", type=int, default=100, help="rounds that a late site lacks")
    made.add_argument("--json", action="store_true")
    arguments = made.parse_args()
    rows = []
    for count in arguments.sites:
        for method in ("fedmezo", "decomfl"):
            # Each of n participants is sent n times H scalars.
            most = int((arguments.most_bytes / (4 * STEPS + 9)) ** 0.5)
            share = min(1.0, most / count) if method == "fedmezo" else 1.0
            # A process each, for the memory.
            with get_context("spawn").Pool(1) as process:
                rows.append(process.apply(measure, (method, count, share, arguments.late)))
            print(f"{method}, {count} sites: done", file=sys.stderr)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(
        box=None, title=f"H = {STEPS}; late: bytes for a site that lacks {arguments.late} rounds"
    )
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
