"""What a federation of real processes costs beyond its computation, over TLS and with keys.

    python benchmarks/cluster.py [--runtime nvflare] [--sites 3] [--rounds 8] [--idle 60] [--json]
                                 [--check]

A server and its sites run on this machine's loopback device, as `fedforward server` and
`fedforward client` start them, with the demonstration's model and ten local steps. Seconds of
overhead are those of a round without the slowest site's own steps. Messages are counted
with their envelopes; wire bytes are what passes a counting forwarder in front of each client, TLS
and polling included, between the first round and the last but one. At the end a model server is
stopped for a while, and the bytes of the other sites, who then have nothing to do, are those of
idle polling. Memory is each process's peak (VmHWM), in which shared libraries count again.
"""

import argparse
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

# The harness is that of the tests, at the root of the repository.
sys.path.insert(0, str(Path(__file__).parent.parent))

import common
from common import Column, Reach, Row
from tests.support.cluster import Cluster, Forwarder, peak_bytes

COLUMNS = (
    Column("name", "what"),
    Column("value", "measured", ",.1f"),
    Column("unit", "unit"),
)
REACHES = {"server: coordinator": Reach("<", 300.0)}
STEPS = 10


class Peaks:
    """The most memory of each process, by whose it is and what it does."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.found: dict[tuple[str, str], int] = {}

    def look(self) -> None:
        """Processes that come and go are seen if one looks often."""
        everything = {process.pid: process for process in self.cluster.processes()}
        commands = {command.pid: name for name, command in self.cluster.commands.items()}
        for process in everything.values():
            owner = process
            while owner.pid not in commands and owner.parent in everything:
                owner = everything[owner.parent]
            if owner.pid not in commands or not process.role:
                continue
            key = (commands[owner.pid], process.role)
            try:
                self.found[key] = max(self.found.get(key, 0), peak_bytes(process.pid))
            except (OSError, StopIteration):
                continue


def row(name: str, value: float, unit: str) -> Row:
    reaches = {"value": REACHES[name]} if name in REACHES else {}
    return {"name": name, "value": value, "unit": unit, "reaches": reaches}


def start_up(cluster: Cluster, peaks: Peaks, ports: dict[str, int]) -> list[Row]:
    """Type all commands at once, and see what happens when."""
    began = time.monotonic()
    cluster.serve()
    for name in cluster.sites:
        cluster.join(name, port=ports[name])
    stages = {
        "start-up: sites are served": lambda: "sites are served" in cluster.said("server"),
        "start-up: all sites connected": lambda: all(
            "connected to the server" in cluster.said(name) for name in cluster.sites
        ),
        "start-up: all models and data loaded": lambda: all(
            "ready:" in cluster.said(name) for name in cluster.sites
        ),
        "start-up: the first round opened": lambda: cluster.status().get("what") == "round 1",
    }
    rows = []
    for name, seen in stages.items():
        cluster.wait(name, seen)
        rows.append(row(name, time.monotonic() - began, "s"))
        peaks.look()
    return rows


def of_rounds(lines: list[dict[str, Any]], logs: list[str], last: int) -> list[Row]:
    """Seconds and messages of the rounds from the second to `last`."""
    steps = [
        {int(n): float(s) for n, s in re.findall(r"^round (\d+): \d+ steps in (.*) s$", log, re.M)}
        for log in logs
    ]
    seconds, slowest, up, down = [], [], [], []
    for before, line in pairwise(lines):
        if 2 <= line["round"] <= last:
            seconds.append(line["seconds"] - before["seconds"])
            slowest.append(max(site[line["round"]] for site in steps))
            up.append(line["bytes"]["up"])
            down.append(line["bytes"]["down"])
    overhead = [whole - own for whole, own in zip(seconds, slowest, strict=True)]
    return [
        row("a round, median", statistics.median(seconds), "s"),
        row("its slowest site's steps", statistics.median(slowest), "s"),
        row("overhead of a round, median", statistics.median(overhead), "s"),
        row("overhead of a round, most", max(overhead), "s"),
        row("messages up, client and round", statistics.mean(up), "B"),
        row("messages down, client and round", statistics.mean(down), "B"),
    ]


def measure(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    sites = [f"site{number}" for number in range(arguments.sites)]
    last = arguments.rounds - 1
    changes = {"federation__rounds": arguments.rounds, "method__local_steps": STEPS}
    with ExitStack() as stack:
        kind = Cluster
        if arguments.runtime == "nvflare":
            from tests.support.flare_cluster import FlareCluster as kind  # noqa: N813
        cluster = stack.enter_context(kind(folder, sites, **changes))
        between = {name: stack.enter_context(Forwarder(cluster.port)) for name in sites}
        peaks = Peaks(cluster)

        def bytes_of(names: list[str]) -> tuple[int, int]:
            ways = [between[name] for name in names]
            return sum(way.up for way in ways), sum(way.down for way in ways)

        def reach(number: int) -> None:
            def there() -> bool:
                peaks.look()
                return cluster.committed >= number

            cluster.wait(f"round {number}", there)

        common.note("starting")
        rows = start_up(cluster, peaks, {name: way.port for name, way in between.items()})
        reach(1)
        up, down = bytes_of(sites)
        common.note("rounds")
        reach(last)
        used = [now - then for now, then in zip(bytes_of(sites), (up, down), strict=True)]
        asked = len(sites) * (last - 1)
        wire = [
            row("wire up, client and round", used[0] / asked, "B"),
            row("wire down, client and round", used[1] / asked, "B"),
        ]
        common.note("idling")
        held, *idle = sites
        stopped = cluster.pid("model server", held)
        os.kill(stopped, signal.SIGSTOP)
        try:
            cluster.wait("idle sites", lambda: _idle(cluster, idle))
            before, began = bytes_of(idle), time.monotonic()
            time.sleep(arguments.idle)
            minutes = (time.monotonic() - began) / 60 * len(idle)
            after = bytes_of(idle)
        finally:
            os.kill(stopped, signal.SIGCONT)
        peaks.look()
        cluster.finish()
        rows += of_rounds(_metrics(cluster), [cluster.log(name) for name in sites], last)
    rows += wire
    rows += [
        row(f"idle polling {way}, site and minute", (now - then) / minutes, "B")
        for way, then, now in zip(("up", "down"), before, after, strict=True)
    ]
    return rows + memory(peaks, sites)


def _idle(cluster: Cluster, names: list[str]) -> bool:
    """Whether sites have answered the round that is open, and wait for the others."""
    wanted = cluster.committed + 1
    return all(f"\nround {wanted}: " in cluster.log(name) for name in names) and all(
        cluster.site(name)["pending"] is None for name in names
    )


def _metrics(cluster: Cluster) -> list[dict[str, Any]]:
    text = (cluster.out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def memory(peaks: Peaks, sites: list[str]) -> list[Row]:
    """Peaks of the server's processes, and the largest of the sites'."""
    names = {"command": "command and reverse proxy"}
    rows = []
    server = {role: size for (owner, role), size in peaks.found.items() if owner == "server"}
    for role, size in sorted(server.items()):
        rows.append(row(f"server: {names.get(role, role)}", size / 1e6, "MB"))
    rows.append(row("server: all", sum(server.values()) / 1e6, "MB"))
    roles = sorted({role for owner, role in peaks.found if owner in sites})
    site = {role: max(peaks.found.get((name, role), 0) for name in sites) for role in roles}
    for role, size in site.items():
        rows.append(row(f"site: {role}", size / 1e6, "MB"))
    beside = sum(size for role, size in site.items() if role != "model server")
    return [*rows, row("site: all but the model server", beside / 1e6, "MB")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--runtime", choices=("flower", "nvflare"), default="flower")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8, help="at least 4")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds of idle polling")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.sites, arguments.rounds, arguments.idle = 2, 4, 5.0
    if arguments.sites < 2 or arguments.rounds < 4:
        common.stop("--sites must be at least 2, --rounds at least 4.")
    common.prepare(arguments)
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    remarks = [
        f"{arguments.runtime}: {arguments.sites} sites, {arguments.rounds} rounds of {STEPS} local "
        "steps, TLS and keys, everything on one machine. Shared libraries count in every "
        "process's memory."
    ]
    common.finish(arguments, "cluster", rows, COLUMNS, remarks)


if __name__ == "__main__":
    main()
