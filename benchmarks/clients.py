"""Bytes of tensors alive in a simulation, from 1 to 64 clients on one copy of the base weights.

    python benchmarks/clients.py --model FOLDER --data gsm8k_train.jsonl [--json]

LoRA on all linear layers, batch 1, two local steps. Every client gets a copy of the same 64
examples, in the same order, so that the batches (and so the activations) are equal and what grows
is what clients cost. `alive` is counted between rounds, `peak` is the most within a round.
"""

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedforward.config.loading import validate
from fedforward.models.libraries import quiet_libraries
from fedforward.planning.memory.tracker import bytes_alive, peak_bytes
from fedforward.training.loop import Session


class Silent:
    def phase(self, text: str) -> None:
        pass

    def progress(self, done: int, total: int, line: dict[str, object]) -> None:
        pass


def measure(model: str, data: str, clients: int, probes_per_call: int, out: Path) -> dict[str, int]:
    settings = validate(
        {
            "model": {"path": model},
            "data": {
                "source": data,
                "prompt": "### Instruction:\n{question}\n\n### Response:\n",
                "answer": "{answer}",
                "heldout": 8,
                "limit": 136,
                "sequence_length": 256,
            },
            "federation": {"clients": clients, "rounds": 2},
            "method": {"local_steps": 2, "learning_rate": 1e-4},
            "run": {"probes_per_call": probes_per_call},
        }
    )
    session = Session(settings, out, False, Silent())
    everything = sorted(
        (e for part in session.corpus.clients for e in part), key=lambda e: len(e.tokens)
    )
    for client in session.runtime.clients:
        client.batches.examples = everything[-64:]  # type: ignore[attr-defined]
        client.batches.client = 0  # type: ignore[attr-defined]
    # The first round compiles kernels and allocates what stays.
    session.runtime.run_round()
    session._catch_up()
    alive = bytes_alive()
    peak = peak_bytes(session.runtime.run_round)
    session.ledger.close()
    return {"clients": clients, "alive": alive, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--probes-per-call", type=int, default=0, help="0 is the default plan")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(
                arguments.model,
                arguments.data,
                clients,
                arguments.probes_per_call,
                Path(folder) / str(clients),
            )
            for clients in (1, 4, 16, 64)
        ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title="bytes of tensors alive, LoRA")
    for name in ("clients", "between rounds, MB", "growth", "peak of a round, MB", "growth"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [str(row["clients"])]
        for key in ("alive", "peak"):
            cells += [f"{row[key] / 1e6:.2f}", f"{100 * (row[key] / rows[0][key] - 1):+.2f} %"]
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
