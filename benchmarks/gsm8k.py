"""FedMeZO on GSM8K beside its control and its baselines: one row a variant.

    python benchmarks/gsm8k.py VARIANT … --model FOLDER --data gsm8k_train.jsonl --out runs/gsm8k

Variants: lora, control, sgd, adamw, full-float32, full-bfloat16, dirichlet. Three clients, H = 30,
LoRA on all linear layers, 500 held-out examples. `control` is `lora` with each client's projected
gradients permuted among its steps before they are committed: it must not fall. `dirichlet` divides
by the number of lines of the answer (its reasoning steps), α = 0.5. Settings may be overridden with
`--set section.key=value`, as on the command line of fedforward.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedforward.config.loading import assign, parse_override, validate
from fedforward.config.schema import Config
from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult
from fedforward.methods.estimators import TwoPoint
from fedforward.methods.fedmezo import FedMeZO
from fedforward.models.libraries import quiet_libraries
from fedforward.training import assembly
from fedforward.training.loop import Session

LORA = {"rank": 8, "alpha": 16, "factors": "B"}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {},
    "control": {},
    "sgd": {"method": {"name": "fedavg", "optimizer": "sgd", "learning_rate": 0.1}},
    "adamw": {"method": {"name": "fedavg", "optimizer": "adamw", "learning_rate": 1e-3}},
    "full-float32": {"model": {"tune": "full"}, "method": {"learning_rate": 2e-4}},
    "full-bfloat16": {
        "model": {"tune": "full", "dtype": "bfloat16"},
        "method": {"learning_rate": 2e-4, "mu": 3e-3},
    },
    "dirichlet": {"federation": {"partition": "dirichlet", "alpha": 0.5, "field": "steps"}},
}


@dataclass(frozen=True, kw_only=True)
class Permuted(FedMeZO):
    """FedMeZO whose server deals every client's projected gradients to the wrong steps."""

    def aggregate(self, round_number: int, results: Sequence[ClientResult], state: Any) -> Entry:
        mixed = []
        for part in results:
            random = np.random.default_rng((part.report.round, part.report.client))
            gradients = random.permutation(part.report.gradients)
            mixed.append(replace(part, report=replace(part.report, gradients=gradients)))
        return super().aggregate(round_number, mixed, state)


class Plain:
    """A listener that prints the rounds that were evaluated."""

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.console = name, console

    def phase(self, text: str) -> None:
        self.console.print(f"{self.name}: {text}", highlight=False)

    def progress(self, done: int, total: int, line: dict[str, Any]) -> None:
        if "heldout_loss" in line:
            text = f"{self.name}: round {done}/{total} held-out {line['heldout_loss']:.4f}"
            self.console.print(f"{text} after {line['seconds']:.0f} s", highlight=False)


def with_steps(source: Path, target: Path) -> Path:
    """The data with a field `steps`: lines of the answer, at most 6."""
    with source.open(encoding="utf-8") as rows, target.open("w", encoding="utf-8") as out:
        for row in map(json.loads, rows):
            row["steps"] = str(min(6, row["answer"].count("\n")))
            out.write(json.dumps(row) + "\n")
    return target


def configure(name: str, model: str, data: Path, overrides: Sequence[str]) -> Config:
    content: dict[str, dict[str, Any]] = {
        "model": {"path": model},
        "lora": dict(LORA),
        "data": {
            "source": str(data),
            "prompt": "### Instruction:\n{question}\n\n### Response:\n",
            "answer": "{answer}",
            "heldout": 500,
            "sequence_length": 256,
        },
        "federation": {"clients": 3, "rounds": 24},
        "method": {
            "local_steps": 30,
            "batch_size": 4,
            "learning_rate": 5e-3,
            "schedule": "cosine",
            "final": 0.2,
            "mu": 1e-3,
        },
        "run": {"evaluate_every": 2},
    }
    for section, values in VARIANTS[name].items():
        content[section].update(values)
    for override in overrides:
        section, key, value = parse_override(override)
        assign(content, section, key, value, override)
    return validate(content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_libraries()
    console = Console(stderr=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = with_steps(arguments.data, arguments.out / "data.jsonl")
    summaries = {}
    build = assembly.build_method
    for name in arguments.variants:
        settings = configure(name, arguments.model, data, arguments.set)
        if name == "control":
            method = settings.method
            estimator = TwoPoint(method.directions, method.mu)
            permuted = Permuted(settings.run.seed, method.local_steps, estimator)
            assembly.build_method = lambda _, permuted=permuted: permuted  # type: ignore[assignment]
        session = Session(settings, arguments.out / name, False, Plain(name, console))
        summaries[name] = session.run()
        assembly.build_method = build
    if arguments.json:
        print(json.dumps(summaries, indent=2))
        return
    table = Table(title="GSM8K, 3 clients")
    columns = ("variant", "start", "end", "fall", "rounds", "seconds", "up", "down", "peak MB")
    for column in (*columns, "inference MB", "changed"):
        table.add_column(column, justify="right")
    for name, summary in summaries.items():
        loss, traffic = summary["heldout_loss"], summary["bytes_per_client_round"]
        share = summary["changed_share"]
        table.add_row(
            name,
            f"{loss['start']:.3f}",
            f"{loss['end']:.3f}",
            f"{loss['start'] - loss['end']:.3f}",
            str(summary["rounds"]),
            f"{summary['seconds']:.0f}",
            f"{traffic['up']:.0f}",
            f"{traffic['down']:.0f}",
            f"{summary['peak_memory_bytes'] / 1e6:.1f}",
            f"{summary['inference_memory_bytes'] / 1e6:.1f}",
            f"{100 * share:.0f} %" if share is not None else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
