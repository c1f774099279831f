"""A simulated round of 8 and of 64 clients: in lockstep, and one client after another.

    python benchmarks/simulation.py [--clients 8] [--lengths short] [--shapes small] [--json]

What is timed is `LocalRuntime.run_round`: tasks and reports are encoded, the ledger is a file. LoRA
(rank 8, all linear layers, both factors), H = 10, batch 1. Rows are random tokens, a sentence long
(16 to 48 tokens, as in SST-2 or TREC) or a problem long (100 to 250, as in GSM8K). The ways:

    lockstep N    all clients step by step together, N probes a forward pass
    one by one    clients one after another, one probe a forward pass
    in pairs      clients one after another, both signs of a step in one forward pass

The ways take turns, a round each; medians. The reach is that of lockstep over one by one for
sentences. `tensors` is the most alive in a round of two steps, all rows at the longest length,
above what is alive before; that round also warms up. 64 clients with problems on the ~30M shape
take some ten minutes a dtype and are left out unless `--all` asks for them.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import Column, Reach, Row

from fedforward.core.batches import TokenBatch
from fedforward.federation.client import Client, Replica
from fedforward.federation.learning_rates import RateSettings
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import Server, ServerSettings
from fedforward.methods.estimators import TwoPoint
from fedforward.methods.fedmezo import FedMeZO
from fedforward.training.simulation import LocalRuntime

LENGTHS = {"short": (16, 48), "long": (100, 250), "quick": (4, 8)}
EXAMPLES = 64
REACH = Reach(">=", 1.6)
COLUMNS = (
    Column("shape", "shape"),
    Column("dtype", "dtype"),
    Column("rows", "rows"),
    Column("clients", "clients"),
    Column("way", "way"),
    Column("seconds", "a round, s", ".3f"),
    Column("times_one_by_one", "× one by one", ".2f"),
    Column("times_in_pairs", "× in pairs", ".2f"),
    Column("tensor_bytes", "tensors, MB", ".1f", 1e-6),
    Column("repeats", "rounds timed"),
)


class Rows:
    """A client's batches of one row: random tokens, lengths drawn between two bounds."""

    def __init__(self, vocabulary: int, bounds: tuple[int, int], client: int) -> None:
        random = np.random.default_rng(client)
        lengths = random.integers(bounds[0], bounds[1] + 1, EXAMPLES)
        self.rows = [random.integers(0, vocabulary, (1, int(length))) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> TokenBatch:
        tokens = self.rows[step % len(self.rows)]
        return TokenBatch(tokens, tokens.copy())


def runtime(
    model: Any, clients: int, together: int, steps: int, batches: Sequence[Any], folder: Path
) -> LocalRuntime:
    """A federation on the model as it is, with a new ledger."""
    method = FedMeZO(run_seed=common.RUN_SEED, local_steps=steps, estimator=TwoPoint(1, common.MU))
    rates = RateSettings(common.RATE, 0.0, "fixed", "constant", 0, 1000, 1.0)
    settings = ServerSettings(
        run_seed=common.RUN_SEED,
        examples=tuple(map(len, batches)),
        participation=1.0,
        weights="examples",
        rates=rates,
        layout=model.layout,
        distribution=model.distribution,
    )
    path = Path(tempfile.mkdtemp(dir=folder)) / "ledger.sqlite"
    server = Server(settings, method, Ledger.create(path, {"format": 1}))
    replica = Replica(model, method)
    made = [Client(number, batches[number], replica) for number in range(clients)]
    return LocalRuntime(server, made, model, together)


def ways(arguments: argparse.Namespace) -> dict[str, tuple[int, bool]]:
    """Probes per call and whether all clients run together, by name."""
    found = {f"lockstep {probes}": (probes, True) for probes in arguments.probes_per_call}
    return found | {"one by one": (1, False), "in pairs": (2, False)}


def measure(arguments: argparse.Namespace, shape: str, dtype: str, folder: Path) -> Iterator[Row]:
    base = common.network(shape, dtype, arguments.device)
    models = {
        way: common.lora_model(
            copy.deepcopy(base), arguments.distribution, common.make_plan(arguments, probes)
        )
        for way, (probes, _) in ways(arguments).items()
    }
    for length in arguments.lengths:
        for clients in arguments.clients:
            if (shape, length) == ("~30M", "long") and clients > 8 and not arguments.all:
                continue
            common.note(f"{shape} {dtype} {length} rows, {clients} clients")
            yield from measure_round(arguments, models, shape, dtype, length, clients, folder)


def measure_round(
    arguments: argparse.Namespace,
    models: dict[str, Any],
    shape: str,
    dtype: str,
    length: str,
    clients: int,
    folder: Path,
) -> Iterator[Row]:
    """One row for each way; the rounds of all ways take turns."""
    vocabulary, bounds = common.SHAPES[shape].vocabulary, LENGTHS[length]
    longest = [Rows(vocabulary, (bounds[1], bounds[1]), client) for client in range(clients)]
    batches = [Rows(vocabulary, bounds, client) for client in range(clients)]
    tensors: dict[str, int] = {}
    actions: dict[str, Callable[[], object]] = {}
    ledgers: list[Ledger] = []
    for way, (_, lockstep) in ways(arguments).items():
        together = clients if lockstep else 1
        warm = runtime(models[way], clients, together, 2, longest, folder)
        models[way].clear_cache()
        tensors[way] = common.peak_above(warm.run_round, arguments.device)
        warm.server.ledger.close()
        timed = runtime(models[way], clients, together, arguments.steps, batches, folder)
        actions[way] = timed.run_round
        ledgers.append(timed.server.ledger)
    samples: dict[str, list[float]] = {}
    begin, rounds = time.perf_counter(), 0
    while True:
        common.interleave(common.turned(actions, rounds), 1, arguments.device, samples)
        rounds += 1
        elapsed = time.perf_counter() - begin
        if (
            rounds >= (arguments.repeats or 5)
            or elapsed * (rounds + 1) / rounds > arguments.seconds
        ):
            break
    for ledger in ledgers:
        ledger.close()
    medians = common.medians(samples)
    for way, (probes, lockstep) in ways(arguments).items():
        over = medians["one by one"] / medians[way]
        held = lockstep and length == "short" and arguments.device == "cpu"
        yield {
            "name": f"{shape} {dtype} {length} rows, {clients} clients, {way}",
            "shape": shape,
            "dtype": dtype,
            "rows": length,
            "tokens": list(bounds),
            "clients": clients,
            "way": way,
            "probes_per_call": probes,
            "horizon": arguments.steps,
            "distribution": arguments.distribution,
            "seconds": medians[way],
            "times_one_by_one": over if lockstep else None,
            "times_in_pairs": medians["in pairs"] / medians[way] if lockstep else None,
            "tensor_bytes": tensors[way],
            "repeats": rounds,
            "reaches": dict.fromkeys(("times_one_by_one", "times_in_pairs"), REACH) if held else {},
        }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(common.SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=list(common.DTYPES))
    parser.add_argument("--clients", nargs="+", type=int)
    parser.add_argument("--lengths", nargs="+", choices=list(LENGTHS))
    parser.add_argument("--probes-per-call", nargs="+", type=int, help="of lockstep")
    parser.add_argument("--distribution", choices=common.DISTRIBUTIONS, default="gaussian")
    parser.add_argument("--all", action="store_true", help="leave nothing out")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="for one table of ways; a round is finished"
    )
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    arguments.shapes = arguments.shapes or (["quick"] if quick else ["~30M", "small"])
    arguments.dtypes = arguments.dtypes or (["float32"] if quick else ["float32", "bfloat16"])
    arguments.clients = arguments.clients or ([3] if quick else [8, 64])
    arguments.lengths = arguments.lengths or (["quick"] if quick else ["short", "long"])
    arguments.probes_per_call = arguments.probes_per_call or ([4] if quick else [16, 32])
    arguments.steps = 2 if quick else 10
    if quick:
        arguments.repeats = 1
    common.prepare(arguments)
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = [
            row
            for shape in arguments.shapes
            for dtype in arguments.dtypes
            for row in measure(arguments, shape, dtype, Path(folder))
        ]
    remarks = [
        f"LoRA rank 8, H = {arguments.steps}, batch 1, {arguments.distribution} directions.",
        "The reach is that of sentences; problems stand beside them.",
    ]
    common.finish(arguments, "simulation", found, COLUMNS, remarks)


if __name__ == "__main__":
    main()
