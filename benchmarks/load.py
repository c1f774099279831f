"""A server under load: many sites a round, thousands of rounds, and ledgers of ten thousand.

    python benchmarks/load.py rounds [--sites 20] [--rounds 2000]
    python benchmarks/load.py sites [--sites 10000] [--rounds 5]
    python benchmarks/load.py ledger [--rounds 10000] [--steps 1 30]

`rounds` and `sites` carry out rounds of a `Server` with `decomfl` and H = 10, from encoded reports
to the ledger on disk, without a network and without models. They show seconds of a round, those of
the processor alone (`cpu`, where others use the machine as well), and the resident memory of the
process after 10, 50 and 100 % of the rounds; no PyTorch is imported.
`ledger` writes a ledger of a simulated run on the demonstration model, with H steps a round of
random scalars, and shows seconds to open it and seconds of `verify`, each with the processor's.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fedforward.directions import Distribution, Layout
from fedforward.federation.learning_rates import RateSettings
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import Server, ServerSettings
from fedforward.messages.codec import HEADER
from fedforward.messages.report import DIGEST_BYTES, Report
from fedforward.messages.task import Task
from fedforward.methods.decomfl import DeComFL

STEPS = 10
#: Llama-3B's LoRA of rank 128 on q and v, as in FedMeZO's setting.
LAYOUT = Layout.of({"0.A": (128, 3200), "0.B": (3200, 128)}, {"0": ["0.A", "0.B"]})


class Stopwatch:
    """Seconds since it was made until it is stopped, and those of the processor."""

    def __init__(self) -> None:
        self.seconds, self.cpu = -time.perf_counter(), -time.process_time()

    def stop(self) -> "Stopwatch":
        self.seconds += time.perf_counter()
        self.cpu += time.process_time()
        return self


def server(path: Path, sites: int) -> Server:
    """A server of so many sites, and its new ledger."""
    settings = ServerSettings(
        run_seed=0,
        examples=(100,) * sites,
        participation=1.0,
        weights="examples",
        rates=RateSettings(1e-6, 0.0, "fixed", "constant", 0, 10**6, 1.0),
        layout=LAYOUT,
        distribution=Distribution.GAUSSIAN,
        deadline=math.inf,
        state_bytes=4 * LAYOUT.parameters,
    )
    return Server(settings, DeComFL(local_steps=STEPS), Ledger.create(path, {}))


def carry_out(sites: int, rounds: int) -> dict[str, Any]:
    """Rounds one after another; see the module."""
    random, memory = np.random.default_rng(0), {}
    seconds, cpu = [], []
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        made = server(Path(folder) / "ledger.sqlite", sites)
        for number in range(rounds):
            opening = Stopwatch()
            tasks = made.open_round()
            opening.stop()
            answers = [_answer(task, random) for task in tasks.values()]
            closing_ = Stopwatch()
            for data in answers:
                made.receive(data)
            made.close_round()
            closing_.stop()
            seconds.append(opening.seconds + closing_.seconds)
            cpu.append(opening.cpu + closing_.cpu)
            if number + 1 in (rounds // 10, rounds // 2, rounds):
                memory[number + 1] = process.memory_info().rss / 1e6
        size = made.ledger.path.stat().st_size / 1e6
        made.ledger.close()
    assert "torch" not in sys.modules
    return {
        "sites": sites,
        "rounds": rounds,
        "median seconds": round(float(np.median(seconds)), 4),
        "slowest seconds": round(max(seconds), 4),
        "median cpu seconds": round(float(np.median(cpu)), 4),
        "resident MB": {str(n): round(value, 1) for n, value in memory.items()},
        "ledger MB": round(size, 1),
    }


def _answer(task: bytes, random: np.random.Generator) -> bytes:
    # Its head is enough: no site does anything here.
    number, client, _, wanted, *_ = Task.plan()[0].unpack_from(task, HEADER.size)
    gradients = random.standard_normal(STEPS).astype(np.float32)
    digest = bytes(DIGEST_BYTES) if wanted else b""
    return Report(number, client, 100, 1.0, 0, gradients, digest).encode()


def ledger(rounds: int, steps: int) -> dict[str, Any]:
    """A ledger of so many rounds with so many steps each; see the module."""
    from fedforward.config.loading import validate
    from fedforward.demo.text import ANSWER, PROMPT, site_examples
    from fedforward.training.replay import verify
    from fedforward.training.run import Run

    # A disk would take minutes to have each round.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        rows = "".join(json.dumps(row) + "\n" for row in site_examples(seed=0, per_site=10))
        (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
        content = {
            "model": {"path": str(files("fedforward.demo").joinpath("model"))},
            "data": {"source": str(folder / "rows.jsonl"), "prompt": PROMPT, "answer": ANSWER},
            "federation": {"clients": 1, "rounds": rounds},
            "method": {"local_steps": steps, "learning_rate": 1e-6, "batch_size": 1},
            "run": {"threads": 1},
        }
        content["data"] |= {"heldout": 2, "sequence_length": 64}
        run = Run(validate(content), folder / "run")
        # As a run writes it, without forward passes.
        random = np.random.default_rng(0)
        examples = len(run.corpus.clients[0])
        for number in range(rounds):
            (data,) = run.server.open_round().values()
            wanted = Task.decode(data).digest_wanted
            gradients = random.standard_normal(steps).astype(np.float32)
            digest = run.replica.digest() if wanted and number == 0 else bytes(DIGEST_BYTES)
            report = Report(number, 0, examples, 1.0, 0, gradients, digest if wanted else b"")
            run.server.receive(report.encode())
            run.server.close_round()
        run.ledger.close()
        run.directory.unlock()
        path = folder / "run" / "ledger.sqlite"
        opened = min((_opened(path) for _ in range(3)), key=lambda watch: watch.cpu)
        parameters = run.model.layout.parameters
        first = Stopwatch()
        verify(folder / "run", rounds=1)
        first.stop()
        watch = Stopwatch()
        proof = verify(folder / "run")
        watch.stop()
    return {
        "rounds": rounds,
        "steps a round": steps,
        "parameters": parameters,
        "open seconds": round(opened.seconds, 2),
        "open cpu": round(opened.cpu, 2),
        "verify seconds": round(watch.seconds, 1),
        "verify cpu": round(watch.cpu, 1),
        "verify of one round, cpu": round(first.cpu, 1),
        # Digests in reports are made up, as no forward pass told them; the state is the ledger's.
        "state digest": proof.state_digest[:16],
    }


def _opened(path: Path) -> Stopwatch:
    watch = Stopwatch()
    with closing(Ledger(path, read_only=True)):
        return watch.stop()


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("what", choices=("rounds", "sites", "ledger"))
    made.add_argument("--sites", type=int)
    made.add_argument("--rounds", type=int)
    made.add_argument("--steps", type=int, nargs="+", default=[1, 30])
    arguments = made.parse_args()
    if arguments.what == "ledger":
        for steps in arguments.steps:
            print(json.dumps(ledger(arguments.rounds or 10_000, steps)), flush=True)
        return
    sites, rounds = (20, 2000) if arguments.what == "rounds" else (10_000, 5)
    print(json.dumps(carry_out(arguments.sites or sites, arguments.rounds or rounds)))


if __name__ == "__main__":
    main()
