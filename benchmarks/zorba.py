"""ZorBA with budgets for few to all blocks against all blocks active: what the loss falls.

    python benchmarks/zorba.py --model FOLDER --data gsm8k_train.jsonl --out runs/zorba

Eight clients IID, H = 10, one shared direction a step. `all` has every block active on every
client (which is DeComFL); `zorba` lets client i perturb only as many blocks as `ACTIVE` says, and
the planner chooses which. Each has the best of its `--rates` on the first seed, then runs with all
seeds, for equally many rounds. Memory is that of one client's step, as bytes of tensors alive.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedforward.config.loading import validate
from fedforward.config.schema import Config
from fedforward.methods.estimators import TwoPoint
from fedforward.models.libraries import quiet_libraries
from fedforward.planning.budgets import allocator, survey
from fedforward.planning.memory.tracker import bytes_alive, peak_bytes
from fedforward.planning.probe_grouping import step_probes
from fedforward.training import build as experiment
from fedforward.training.metrics import ProgressCallback
from fedforward.training.run import Run

#: Blocks that each client's budget is for.
ACTIVE = [2, 3, 4, 5, 6, 7, 8, 8]
RATES = {"lora": [2.5e-3, 5e-3, 1e-2], "full": [1e-4, 2e-4, 4e-4]}


def printed(name: str, console: Console) -> ProgressCallback:
    """Prints the rounds that were evaluated."""

    def progress(done: int, total: int, line: dict[str, Any]) -> None:
        if "heldout_loss" in line:
            console.print(f"{name}: round {done}/{total}, held-out {line['heldout_loss']:.4f}")

    return progress


def configure(arguments: argparse.Namespace, name: str, rate: float, seed: int) -> Config:
    content: dict[str, dict[str, Any]] = {
        "model": {"path": arguments.model, "tune": arguments.tune, "blocks": "0-7"},
        "lora": {"rank": 8, "alpha": 16.0, "factors": "B"},
        "data": {
            "source": arguments.data,
            "prompt": arguments.prompt.replace("\\n", "\n"),
            "answer": arguments.answer,
            "heldout": 200,
            "limit": 3000,
            "sequence_length": arguments.length,
        },
        "federation": {"clients": 8, "rounds": arguments.rounds},
        "method": {
            "name": "zorba",
            "local_steps": 10,
            "batch_size": arguments.batch,
            "learning_rate": rate,
            "schedule": "cosine",
            "final": 0.2,
        },
        "planning": {"active": ACTIVE} if name == "zorba" else {},
        "run": {"seed": seed, "evaluate_every": arguments.rounds, "threads": arguments.threads},
    }
    return validate(content)


def fall(arguments: argparse.Namespace, name: str, rate: float, seed: int) -> float:
    """The fall of the held-out loss of one run; what was run before is read, not repeated."""
    label = f"{arguments.tune}-{name}-{rate:g}-{seed}"
    out = arguments.out / label
    if not (out / "summary.json").is_file():
        settings = configure(arguments, name, rate, seed)
        try:
            Run(settings, out, True, printed(label, Console(stderr=True))).fit()
        except Exception as error:
            Console(stderr=True).print(f"{label}: {error}")
            return float("-inf")
    losses = json.loads((out / "summary.json").read_text())["heldout_loss"]
    return float(losses["start"] - losses["end"])


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Predicted and measured bytes of every client's step."""
    settings = configure(arguments, "zorba", RATES[arguments.tune][0], 0)
    model, tokenizer = experiment.build_model(settings, experiment.resolve_plan(settings), ())
    corpus = experiment.read_corpus(settings, experiment.corpus_reader(settings), tokenizer, None)
    steps = experiment.widest_steps(settings, corpus)
    resources = survey(settings, model, steps)
    planner = allocator(settings, model, [len(part) for part in corpus.clients], None)
    matrix = planner.plan(range(8)).matrix
    blocks, rows = len(model.layout.blocks), []
    others = bytes_alive() - own_bytes(model)
    for client, batch in enumerate(steps):
        shape = batch.tokens.shape
        model.clear_cache()
        probes = step_probes([batch], 2, TwoPoint(1, 1e-3), matrix[client])
        measured = peak_bytes(lambda probes=probes: model.evaluate(probes)) - others  # type: ignore[misc]
        everything = resources.memory.peak(np.ones(blocks, np.bool_), *shape)
        rows.append(
            {
                "client": client,
                "rows": shape[0],
                "length": shape[1],
                "active": int(matrix[client].sum()),
                "predicted_bytes": int(resources.memory.peak(matrix[client], *shape)),
                "measured_bytes": int(measured),
                "predicted_all_bytes": int(everything),
            }
        )
    return rows


def own_bytes(model: Any) -> int:
    """Bytes of the network's tensors, each storage once."""
    tensors = [*model.network.parameters(), *model.network.buffers()]
    tensors += [model.flat] if hasattr(model, "flat") else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/zorba"))
    parser.add_argument("--tune", choices=["lora", "full"], default="lora")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--prompt", default="### Instruction:\\n{question}\\n\\n### Response:\\n")
    parser.add_argument("--answer", default="{answer}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 below 90 %% of all blocks")
    arguments = parser.parse_args()
    quiet_libraries()
    rates = arguments.rates or RATES[arguments.tune]
    results: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(arguments).items()}}
    for name in ("all", "zorba"):
        first = {rate: fall(arguments, name, rate, arguments.seeds[0]) for rate in rates}
        best = max(first, key=lambda rate: first[rate])
        falls = [fall(arguments, name, best, seed) for seed in arguments.seeds]
        results[name] = {
            "rates": {f"{rate:g}": value for rate, value in first.items()},
            "rate": best,
            "falls": falls,
            "mean": mean(falls),
            "spread": stdev(falls) if len(falls) > 1 else 0.0,
        }
    share = results["zorba"]["mean"] / results["all"]["mean"]
    results |= {"share": share, "memory": memory(arguments)}
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        show(results, Console())
    if arguments.check and share < 0.9:
        raise SystemExit(f"zorba falls by {share:.2f} of what all blocks fall by; reach 0.9")


def show(results: dict[str, Any], console: Console) -> None:
    table = Table("method", "rate", "fall of the held-out loss", "by seed")
    for name in ("all", "zorba"):
        row = results[name]
        falls = ", ".join(f"{value:.3f}" for value in row["falls"])
        table.add_row(name, f"{row['rate']:g}", f"{row['mean']:.3f} ± {row['spread']:.3f}", falls)
    console.print(table)
    console.print(f"zorba / all: {results['share']:.3f}")
    table = Table("client", "active", "predicted MB", "measured MB", "all blocks MB")
    for row in results["memory"]:
        table.add_row(
            str(row["client"]),
            str(row["active"]),
            f"{row['predicted_bytes'] / 1e6:.2f}",
            f"{row['measured_bytes'] / 1e6:.2f}",
            f"{row['predicted_all_bytes'] / 1e6:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
