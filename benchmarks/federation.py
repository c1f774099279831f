"""What the federation itself costs: bytes of every method, catching up, and joining many reports.

    python benchmarks/federation.py --model FOLDER [--json] [--check]

`bytes`: eight clients, H = 10, encoded messages of rounds after the first, as the server and the
clients make them (the projected gradients are drawn at random: their values do not change sizes;
only fedkseed's depend on which candidates are drawn). `late`: a client that joins after 200 rounds,
each party with its own model; its state must be the one of a client that was there. `join`: the
server takes 10,000 reports of 30 projected gradients and closes the round.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedforward.core.registry import METHODS
from fedforward.directions import Distribution, Layout
from fedforward.federation.learning_rates import RateSettings
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import Server, ServerSettings
from fedforward.messages.report import DIGEST_BYTES, Report
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from fedforward.methods.base import Method
from fedforward.methods.estimators import TwoPoint
from fedforward.models.libraries import quiet_libraries

SEED, H, CLIENTS, LATE = 1, 10, 8, 200
ESTIMATOR = TwoPoint(1, 1e-3)
#: Of the model; client c perturbs block c, the third after it, and the last c ones.
BLOCKS = 8


def method(name: str, steps: int = H) -> Method:
    """A method by name, with the paper's number of candidates."""
    kind: Any = METHODS.get(name)
    made: Method = kind(run_seed=SEED, local_steps=steps, estimator=ESTIMATOR)
    return made


def allocate(participants: Sequence[int]) -> Any:
    rows = np.zeros((len(participants), BLOCKS), np.bool_)
    for row, client in enumerate(participants):
        place = client % CLIENTS
        rows[row, [place % BLOCKS, (place + 3) % BLOCKS]] = True
        rows[row, max(0, BLOCKS - place) :] = True
    return rows


def server(folder: Path, own: Method, clients: int, layout: Layout, state_bytes: int) -> Server:
    settings = ServerSettings(
        run_seed=SEED,
        examples=(100,) * clients,
        participation=1.0,
        weights="equal",
        rates=RateSettings(1e-3, 0.0, "fixed", "constant", 0, 1000, 1.0),
        layout=layout,
        distribution=Distribution.GAUSSIAN,
        allocate=allocate if own.capabilities.blocks else None,
        state_bytes=state_bytes,
    )
    path = Path(tempfile.mkdtemp(dir=folder)) / "ledger.sqlite"
    return Server(settings, own, Ledger.create(path, {}))


def made_up(task: Task, count: int, digest: bytes) -> bytes:
    """A report with projected gradients that nobody has measured."""
    random = np.random.default_rng((task.round, task.client))
    gradients = random.standard_normal(count).astype(np.float32)
    proof = digest[:DIGEST_BYTES] if task.digest_wanted else b""
    return Report(task.round, task.client, 100, 2.0, 0, gradients, proof).encode()


def sizes(folder: Path, layout: Layout, tuned: int) -> list[dict[str, Any]]:
    """Bytes up and down per client and round, rounds 2 to 9 (round 1 has no entry to send)."""
    rows = []
    for name in ("fedmezo", "decomfl", "zorba", "fedkseed", "fedkseed-pro"):
        own = method(name)
        side = server(folder, own, CLIENTS, layout, 0)
        up, down = [], []
        for number in range(9):
            tasks = side.open_round()
            reports = [made_up(Task.decode(t), H, bytes(32)) for t in tasks.values()]
            for data in reports:
                side.receive(data)
            side.close_round()
            if number:
                up += [len(data) for data in reports]
                down += [len(data) for data in tasks.values()]
        rows.append({"method": name, "up": max(up), "down": sum(down) / len(down)})
    state = np.zeros(tuned, np.float32)
    snapshot = Snapshot(1, b"", state.tobytes())
    task = Task(1, 0, 1e-3, False, (), snapshot=snapshot.encode())
    report = Report(1, 0, 100, 2.0, 0, np.empty(0, np.float32), payload=state.tobytes())
    rows.append({"method": "fedavg", "up": len(report.encode()), "down": len(task.encode())})
    return rows


def late(folder: Path, path: str, tune: str, name: str, how: str) -> dict[str, Any]:
    """One client that was there, one that comes after 200 rounds, by entries or by a snapshot."""
    from fedforward.federation.client import Client, Replica

    own = method(name)
    there, comer = (model_of(path, tune) for _ in range(2))
    replica, arriving = (Replica(model, own) for model in (there, comer))
    snapshots = how == "snapshot" and not own.capabilities.from_base
    side = server(folder, own, 2, there.layout, there.state_bytes if snapshots else 0)
    for _ in range(LATE):
        task = Task.decode(side.open_round([0])[0])
        if task.digest_wanted:
            replica.catch_up(list(side.ledger.entries(replica.rounds)))
        side.receive(made_up(task, H, replica.digest() if task.digest_wanted else b""))
        side.close_round()
    task_bytes = side.open_round()[1]
    if snapshots:
        # Asked for here in any case; a server does so only where it is fewer bytes.
        snapshot = replica.snapshot()
        missing = tuple(side.ledger.entries(snapshot.rounds))
        task = Task.decode(task_bytes)
        task_bytes = replace(task, snapshot=snapshot.encode(), entries=missing).encode()
    client = Client(1, [None], arriving)
    began = time.perf_counter()
    client.sync(Task.decode(task_bytes))
    seconds = time.perf_counter() - began
    replica.catch_up(list(side.ledger.entries(replica.rounds)))
    return {
        "method": name,
        "tune": tune,
        "how": how if not own.capabilities.from_base else "accumulators",
        "parameters": there.layout.parameters,
        "bytes": len(task_bytes),
        "seconds": seconds,
        "same_state": there.digest() == comer.digest(),
        "break_even": side.break_even() if snapshots else None,
    }


def model_of(path: str, tune: str) -> Any:
    from fedforward.core.steps import ProbePlan
    from fedforward.models.full import FullModel
    from fedforward.models.loading import load
    from fedforward.models.lora import LoraModel

    network, _ = load(path, "float32", "cpu")
    plan = ProbePlan(2, 2, "recompute", 8)
    if tune == "full":
        return FullModel(network, plan=plan, blocks=range(BLOCKS))
    return LoraModel(network, rank=8, alpha=16, plan=plan)


def join(clients: int, steps: int) -> dict[str, Any]:
    """Seconds and bytes of taking so many reports and closing the round, per method."""
    found: dict[str, Any] = {}
    names = list(map(str, range(BLOCKS)))
    layout = Layout.of(dict.fromkeys(names, (100,)), {name: [name] for name in names})
    for name in ("fedmezo", "zorba", "fedkseed"):
        with tempfile.TemporaryDirectory() as folder:
            side = server(Path(folder), method(name, steps), clients, layout, 0)
            tasks = side.open_round()
            reports = [made_up(Task.decode(t), steps, bytes(32)) for t in tasks.values()]
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            began = time.perf_counter()
            for data in reports:
                side.receive(data)
            side.close_round()
            found[name] = {
                "seconds": time.perf_counter() - began,
                "more_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
                "torch": "torch" in sys.modules,
                "process_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--parts", nargs="+", default=["bytes", "late", "join"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 naming what falls short")
    arguments = parser.parse_args()
    if arguments.parts == ["alone"]:
        print(json.dumps(join(10_000, 30)))
        return
    quiet_libraries()
    results: dict[str, Any] = {}
    if "join" in arguments.parts:
        # A process of its own: a server needs no PyTorch.
        command = [sys.executable, __file__, "--model", "none", "--parts", "alone"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results["join"] = json.loads(done.stdout)
    with tempfile.TemporaryDirectory() as folder:
        if "bytes" in arguments.parts:
            model = model_of(arguments.model, "lora")
            results["bytes"] = sizes(Path(folder), model.layout, model.layout.parameters)
        if "late" in arguments.parts:
            results["late"] = [
                late(Path(folder), arguments.model, tune, name, how)
                for name, how in (
                    ("fedmezo", "entries"),
                    ("fedmezo", "snapshot"),
                    ("decomfl", "entries"),
                    ("zorba", "entries"),
                    ("fedkseed", "accumulators"),
                )
                for tune in (("lora", "full") if name != "fedkseed" else ("lora",))
            ]
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        show(results, Console())
    short = list(shortfalls(results))
    if arguments.check and short:
        raise SystemExit("; ".join(short))


def shortfalls(results: dict[str, Any]) -> Any:
    for row in results.get("bytes", []):
        if row["method"] in ("zorba", "decomfl") and row["up"] > 128:
            yield f"{row['method']} sends {row['up']} bytes up, reach 128"
    for row in results.get("late", []):
        if not row["same_state"]:
            yield f"{row['method']}, {row['tune']}: a late client ends elsewhere"
    for name, row in results.get("join", {}).items():
        if row["seconds"] >= 1 or row["more_bytes"] >= 200e6:
            yield f"{name}: {row['seconds']:.2f} s and {row['more_bytes'] / 1e6:.0f} MB to join"


def show(results: dict[str, Any], console: Console) -> None:
    if "bytes" in results:
        table = Table("method", "up", "down", title="bytes per client and round, 8 clients, H = 10")
        for row in results["bytes"]:
            table.add_row(row["method"], f"{row['up']:,}", f"{row['down']:,.0f}")
        console.print(table)
    if "late" in results:
        table = Table("method", "tuned", "by", "bytes", "seconds", "same state", "break-even")
        for row in results["late"]:
            even = "" if row["break_even"] is None else f"{row['break_even']:,} rounds"
            cells = (f"{row['tune']}, {row['parameters']:,}", row["how"], f"{row['bytes']:,}")
            same = "yes" if row["same_state"] else "NO"
            table.add_row(row["method"], *cells, f"{row['seconds']:.3f}", same, even)
        console.print(table)
    if "join" in results:
        table = Table("method", "seconds", "more MB", "process MB", title="10,000 reports, H = 30")
        for name, row in results["join"].items():
            more, whole = row["more_bytes"] / 1e6, row["process_bytes"] / 1e6
            table.add_row(name, f"{row['seconds']:.2f}", f"{more:.0f}", f"{whole:.0f}")
        console.print(table)


if __name__ == "__main__":
    main()
